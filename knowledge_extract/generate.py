"""Forward passes: greedy answers closed by the end token, and plain reading.

Sequences are padded on the right with explicit positions and an attention mask, so a row computes
the same thing whatever stands beside it; what remains is floating-point order. Measured on
SmolLM2-135M, CPU, two threads, eight classes, batches of 2, 4 and 8 against each row alone: the
largest difference of any layer's state, relative to its norm, and how many of the eight answers of
12 tokens changed (tests/knowledge_extract/test_real.py repeats the float32 rows).

    quantisation  compute   answers + end token   given texts   answers changed
    none          float32   3e-6                  2e-6          0
    nf4           float32   3e-6                  2e-6          0
    fp4           float32   3e-6                  2e-6          0
    int8          float32   0 (rows run alone; batched it would be 0.3, and 3 answers change)
    none          bfloat16  0.04, where the text is the same    0.03    2
    nf4           bfloat16  0.03, where the text is the same    0.05    2

In bfloat16 the rounding of a matrix product depends on its shape, so a near tie between two tokens
can fall the other way in another batch; `batch_size: 1` rules that out.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knowledge_extract.capture import Capture
from knowledge_extract.model import LanguageModel
from knowledge_extract.pooling import Reader, rows_at

States = Float[Tensor, "rows layers width"]


@dataclass(frozen=True)
class Generated:
    """Answers without their end token, and the end token's states by block name."""

    answers: list[list[int]]
    states: dict[str, States]


def pad_right(
    sequences: Sequence[Sequence[int]], pad: int
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Token ids padded on the right, and the mask of the real ones."""
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = True
    return ids, mask


def _forward(language: LanguageModel, **arguments: Any) -> Any:
    """One forward with those arguments the architecture knows (Bloom takes no positions)."""
    known = inspect.signature(language.model.forward).parameters
    kept = {k: v for k, v in arguments.items() if k in known}
    moved = {k: v.to(language.device) if isinstance(v, Tensor) else v for k, v in kept.items()}
    return language.model(**moved, return_dict=True)


@torch.inference_mode()
def read(
    language: LanguageModel,
    sequences: Sequence[Sequence[int]],
    capture: Capture,
    readers: Mapping[str, Reader],
) -> dict[str, States]:
    """The wanted rows of one forward over whole sequences, by block name."""
    ids, mask = pad_right(sequences, language.pad)
    capture.arm(readers)
    _forward(
        language,
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=torch.arange(ids.shape[1]).expand_as(ids),
        use_cache=False,
        logits_to_keep=1,
    )
    return {block: capture.take(block) for block in readers}


def _prefill(language: LanguageModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    """The most likely next token of each prompt, and the key-value cache."""
    last = mask.sum(dim=1) - 1
    places, where = torch.unique(last, return_inverse=True)
    out = _forward(
        language,
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=torch.arange(ids.shape[1]).expand_as(ids),
        use_cache=True,
        logits_to_keep=places,
    )
    if out.logits.shape[1] != len(places):  # this architecture returns every position
        where = last
    rows = torch.arange(len(ids))
    return out.logits.cpu()[rows, where].argmax(dim=-1), out.past_key_values


@dataclass
class _Row:
    """One prompt on its way to an answer."""

    length: int
    answer: list[int]
    done: bool = False


@torch.inference_mode()
def generate(
    language: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    stops: frozenset[int],
    max_new_tokens: int,
    capture: Capture | None = None,
    blocks: Sequence[str] = (),
) -> Generated:
    r"""Greedy answers, and the states of the end token read through the same key-value cache.

    Each step feeds $t_k = \arg\max p(\cdot\mid t_{<k})$. A row that reaches a stop token, or
    `max_new_tokens`, is fed `end` instead, and the states of that position are kept: no second
    pass over prompt and answer.

    Differs: the published recipe runs a second forward over the whole sequence and keeps whichever
    stop token an answer happened to end with. Sampling settings, penalties and processors of the
    model's generation config are ignored.

    Args:
        language: the model.
        prompts: token ids, any lengths.
        end: closes every sequence.
        stops: tokens at which an answer ends; never part of it.
        max_new_tokens: longest answer.
        capture: keeps the states of `end`; without it they are not computed.
        blocks: names under which `capture` keeps them.
    """
    ids, mask = pad_right(prompts, language.pad)
    filled = ids.shape[1]
    room = torch.zeros((len(prompts), max_new_tokens + 1), dtype=torch.bool)
    mask = torch.cat([mask, room], dim=1)
    rows = [_Row(len(p), []) for p in prompts]
    kept = _Kept(capture, blocks if capture is not None else (), len(rows))
    kept.expect([])
    following, memory = _prefill(language, ids, mask[:, :filled])
    for slot in range(filled, mask.shape[1]):
        fed, positions, closing = _next_tokens(rows, following.tolist(), end, stops, max_new_tokens)
        if capture is None and len(closing) == sum(not r.done for r in rows):
            break
        mask[:, slot] = torch.tensor([not row.done for row in rows])
        kept.expect(closing)
        out = _forward(
            language,
            input_ids=torch.tensor(fed)[:, None],
            attention_mask=mask[:, : slot + 1].long(),
            position_ids=torch.tensor(positions)[:, None],
            past_key_values=memory,
            use_cache=True,
            logits_to_keep=1,
        )
        following, memory = out.logits.cpu()[:, -1].argmax(dim=-1), out.past_key_values
        kept.collect(closing)
        for number in closing:
            rows[number].done = True
        if all(row.done for row in rows):
            break
    return Generated([row.answer for row in rows], kept.states())


class _Kept:
    """The end token's states, which rows reach at different steps."""

    def __init__(self, capture: Capture | None, blocks: Sequence[str], rows: int) -> None:
        self._capture = capture
        self._found = {block: [torch.empty(0)] * rows for block in blocks}

    def expect(self, closing: Sequence[int]) -> None:
        """The next forward feeds the end token to these rows."""
        if self._capture is not None:
            reader = rows_at(closing, [0] * len(closing))
            self._capture.arm(dict.fromkeys(self._found, reader) if closing else {})

    def collect(self, closing: Sequence[int]) -> None:
        """Takes what that forward left."""
        if self._capture is not None and closing:
            for block, states in self._found.items():
                for number, state in zip(closing, self._capture.take(block), strict=True):
                    states[number] = state

    def states(self) -> dict[str, States]:
        """All rows, by block name."""
        return {block: torch.stack(states) for block, states in self._found.items()}


def _next_tokens(
    rows: Sequence[_Row], following: Sequence[int], end: int, stops: frozenset[int], most: int
) -> tuple[list[int], list[int], list[int]]:
    """What each row is fed, at which position, and which rows are fed the end token."""
    fed, positions, closing = [], [], []
    for number, (row, token) in enumerate(zip(rows, following, strict=True)):
        positions.append(row.length + len(row.answer))
        if row.done or token in stops or len(row.answer) == most:
            fed.append(end)
            if not row.done:
                closing.append(number)
            continue
        row.answer.append(token)
        fed.append(token)
    return fed, positions, closing
