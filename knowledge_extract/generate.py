"""Forward passes: answers closed by the end token, and plain reading.

Sequences are padded on the right with explicit positions and an attention mask, so a row computes
the same thing whatever stands beside it; what remains is floating-point order. Measured on
SmolLM2-135M, CPU, one thread, 32 questions, batches of 2, 8 and 32 against each row alone: the
largest difference of any layer's state, relative to its norm, and how many of the 32 answers of 12
tokens changed (tests/knowledge_extract/test_real.py repeats the float32 rows).

    quantisation  compute   answers + end token   given texts   answers changed
    none          float32   3e-6                  1e-6          0
    nf4           float32   3e-6                  1e-6          0
    fp4           float32   3e-6                  1e-6          0
    int8          float32   0 (rows run alone; batched it would be 0.3, and 3 of 8 change)
    none          bfloat16  0.04, where the text is the same    0.02    3 to 7
    nf4           bfloat16  0.05, where the text is the same    0.02    2 to 6
    none          float16   0.007, where the text is the same   0.003   1 to 2

In 16 bits the rounding of a matrix product depends on its shape, so a near tie between two tokens
can fall the other way in another batch; `batch_size: 1` rules that out.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from knowledge_extract.capture import Capture, EnoughError
from knowledge_extract.keyvalues import roomy
from knowledge_extract.model import LanguageModel
from knowledge_extract.pooling import Reader, rows_at

States = Float[Tensor, "rows layers width"]

SHARED_FROM = 8  # tokens of a shared beginning that are worth a forward of their own


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


def _forward(language: LanguageModel, module: nn.Module, **arguments: Any) -> Any:
    """One forward with those arguments the architecture knows (Bloom takes no positions)."""
    known = inspect.signature(module.forward).parameters
    kept = {k: v for k, v in arguments.items() if k in known}
    moved = {k: v.to(language.device) if isinstance(v, Tensor) else v for k, v in kept.items()}
    return module(**moved, return_dict=True)


@torch.inference_mode()
def read(
    language: LanguageModel,
    sequences: Sequence[Sequence[int]],
    capture: Capture,
    readers: Mapping[str, Reader],
) -> dict[str, States]:
    """The wanted rows of one forward over whole sequences, by block name.

    Nothing above the highest wanted layer is computed, and no logits.
    """
    ids, mask = pad_right(sequences, language.pad)
    capture.arm(readers, stop=True)
    with suppress(EnoughError):
        _forward(
            language,
            language.model.base_model,
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=torch.arange(ids.shape[1]).expand_as(ids),
            use_cache=False,
        )
    return {block: capture.take(block) for block in readers}


def shared_beginning(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences have in common at their beginning."""
    ordered = sorted(tuple(sequence) for sequence in sequences)
    same = (a == b for a, b in zip(ordered[0], ordered[-1], strict=False))
    return sum(takewhile(bool, same))


def _prefill(
    language: LanguageModel, prompts: Sequence[Sequence[int]], slots: int
) -> tuple[Bool[Tensor, "rows slots"], int, Any]:
    """Reads all but the last token of each prompt: the mask, the slots filled, and the cache.

    Where all prompts begin with the same tokens (a chat template, a question's opening), these are
    read once.
    """
    heads = [prompt[:-1] for prompt in prompts]
    memory = roomy(language.model.config, len(prompts), slots)
    common = shared_beginning(heads) if memory is not None and len(prompts) > 1 else 0
    common = common if common >= SHARED_FROM else 0
    ids, mask = pad_right(heads, language.pad)
    filled = ids.shape[1]
    room = torch.zeros(len(prompts), slots - filled, dtype=torch.bool)
    seen = mask.clone()
    seen[:, :1] = True  # padding must attend to something, or it would hold no number
    for start, stop, rows in ((0, common, 1), (common, filled, len(prompts))):
        if start == stop:
            continue
        out = _forward(
            language,
            language.model.base_model,
            input_ids=ids[:rows, start:stop],
            attention_mask=seen[:rows, :stop].long(),
            position_ids=torch.arange(start, stop).expand(rows, -1),
            past_key_values=memory,
            use_cache=True,
        )
        memory = out.past_key_values
    return torch.cat([mask, room], dim=1), filled, memory


@dataclass
class _Row:
    """One prompt on its way to an answer: what it is fed next, and at which position."""

    number: int
    fed: int
    position: int
    answer: list[int]
    closing: bool = False
    done: bool = False

    def take(self, token: int, *, end: int, stops: frozenset[int], most: int, close: bool) -> None:
        """Goes on after a step.

        Args:
            token: the most likely next one.
            end: closes the answer.
            stops: tokens at which the answer ends.
            most: tokens of the longest answer.
            close: whether the end token is fed at all.
        """
        self.position += 1
        ends = token in stops or len(self.answer) == most
        if not ends and not self.closing:
            self.answer.append(token)
            self.fed = token
        self.done = self.closing or (not close and (ends or len(self.answer) == most))
        if ends and close:
            self.fed, self.closing = end, True


def _order_of_the_rest(rows: Sequence[_Row]) -> list[int]:
    """The rows that are not done: where one left, one from behind takes its place."""
    left = [place for place, row in enumerate(rows) if not row.done]
    behind = [place for place in left if place >= len(left)]
    return [behind.pop(0) if rows[place].done else place for place in range(len(left))]


def greedy(logits: Float[Tensor, "rows tokens"], _numbers: Sequence[int]) -> list[int]:
    """The most likely token of every row."""
    found: list[int] = logits.argmax(dim=-1).tolist()  # the device is waited for once
    return found


def to_the_end(_number: int, _answer: Sequence[int]) -> bool:
    """No answer is enough before the model ends it."""
    return False


@dataclass(frozen=True)
class Decoding:
    """How answers grow.

    Args:
        choose: the next tokens, from the logits of rows and their numbers in the batch.
        enough: whether the answer of a row needs no more tokens; only where no states are kept.
    """

    choose: Callable[[Tensor, Sequence[int]], list[int]] = greedy
    enough: Callable[[int, Sequence[int]], bool] = to_the_end


GREEDY = Decoding()


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
    decoding: Decoding = GREEDY,
) -> Generated:
    r"""Answers, and the states of the end token read through the same key-value cache.

    Each step feeds $t_k = \arg\max p(\cdot\mid t_{<k})$, or what `decoding` chooses. A row that
    reaches a stop token, or `max_new_tokens`, is fed `end` instead, the states of that position are
    kept, and the row leaves the batch: no second pass over prompt and answer.

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
        decoding: how tokens are chosen.
    """
    kept = _Kept(capture, blocks if capture is not None else (), len(prompts))
    kept.expect([])
    slots = max(len(prompt) for prompt in prompts) + max_new_tokens + 1
    mask, slot, memory = _prefill(language, prompts, slots)
    rows = [_Row(n, p[-1], len(p) - 1, []) for n, p in enumerate(prompts)]
    answers = [row.answer for row in rows]
    while rows:
        mask[:, slot] = True
        slot += 1
        closing = [place for place, row in enumerate(rows) if row.closing]
        kept.expect(closing)
        out = _forward(
            language,
            language.model,
            input_ids=torch.tensor([[row.fed] for row in rows]),
            attention_mask=mask[:, :slot].long(),
            position_ids=torch.tensor([[row.position] for row in rows]),
            past_key_values=memory,
            use_cache=True,
            logits_to_keep=1,
        )
        memory = out.past_key_values
        kept.collect(closing, [rows[place].number for place in closing])
        following = decoding.choose(out.logits[:, -1], [row.number for row in rows])
        for row, token in zip(rows, following, strict=True):
            row.take(token, end=end, stops=stops, most=max_new_tokens, close=capture is not None)
            row.done = row.done or decoding.enough(row.number, row.answer)
        order = _order_of_the_rest(rows)
        if 0 < len(order) < len(rows):
            mask = mask[order]
            memory.reorder_cache(torch.tensor(order))
        rows = [rows[place] for place in order]
    return Generated(answers, kept.states())


class _Kept:
    """The end token's states, which rows reach at different steps."""

    def __init__(self, capture: Capture | None, blocks: Sequence[str], rows: int) -> None:
        self._capture = capture
        self._found = {block: [torch.empty(0)] * rows for block in blocks}

    def expect(self, closing: Sequence[int]) -> None:
        """The next forward feeds the end token at these places of the batch."""
        if self._capture is not None:
            reader = rows_at(closing, [0] * len(closing))
            self._capture.arm(dict.fromkeys(self._found, reader) if closing else {})

    def collect(self, closing: Sequence[int], numbers: Sequence[int]) -> None:
        """Takes what that forward left for the rows of these numbers."""
        if self._capture is not None and closing:
            for block, states in self._found.items():
                for number, state in zip(numbers, self._capture.take(block), strict=True):
                    states[number] = state

    def states(self) -> dict[str, States]:
        """All rows, by block name."""
        return {block: torch.stack(states) for block, states in self._found.items()}
