"""A frozen text tower: plain texts, or prompts with learnable parts through the live engine."""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cache.errors import ModelError, PromptOverflowError
from prompt_tune.execution import Execution, recomputed
from prompt_tune.towers import live
from prompt_tune.towers.layout import END, PromptLayout, Stage
from prompt_tune.towers.lowrank import LowRank
from prompt_tune.towers.parts import Part, Stream
from prompt_tune.towers.tokens import token_ids

Outputs = Mapping[str, tuple[Part, Tensor]]


class TextTower(ABC):
    """What both kinds of text tower share.

    Not a module: whoever keeps a tower registers none of its frozen parameters.

    Args:
        module: the tower's module; frozen and put in eval mode.
        tokenizer: open_clip's tokenizer for it.
        context_length: the most tokens a prompt may have.
    """

    kind: ClassVar[Literal["causal", "bert"]]
    width: int
    embed_dim: int
    blocks: Sequence[live.Block]
    first_norm: nn.LayerNorm | None = None
    execution = Execution()

    def __init__(self, module: nn.Module, tokenizer: Any, context_length: int) -> None:
        self.module = module.eval().requires_grad_(requires_grad=False)
        self.tokenizer = tokenizer
        self.context_length = context_length

    def executing(self, execution: Execution) -> Self:
        """A tower of the same weights that runs as `execution` says."""
        own = self.own
        other = copy.copy(self)
        other.execution = execution
        other.blocks = live.compiled(own) if execution.compiled else own
        return other

    @functools.cached_property
    def own(self) -> Sequence[live.Block]:
        """The blocks as they are."""
        return self.blocks

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._table().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self._table().weight.dtype

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text from start to end, unpadded and never cut."""
        return token_ids(self.tokenizer, texts)

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Float[Tensor, "n width"]:
        """The token table's rows, without position."""
        index = torch.tensor(list(ids), dtype=torch.long, device=self.device)
        return self._table()(index)

    def encode_texts(
        self, texts: Sequence[str], *, batch_size: int = 64
    ) -> Float[Tensor, "n embed"]:
        """Un-normalised embeddings of plain texts, computed by open_clip's own forward.

        Raises:
            PromptOverflowError: a text is longer than the context.
        """
        ids = self.tokenize(texts)
        for text, own in zip(texts, ids, strict=True):
            if len(own) > self.context_length:
                raise PromptOverflowError(
                    "the text is longer than the text tower's context",
                    where=repr(text if len(text) <= 60 else text[:57] + "..."),
                    found=f"{len(own)} tokens",
                    wanted=f"at most {self.context_length}",
                    do="Shorten the template or the class name.",
                )
        parts = [self._plain(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
        return torch.cat(parts)

    def encode(
        self, layout: PromptLayout, stages: Sequence[Stage]
    ) -> Float[Tensor, "batch classes embed"]:
        """Un-normalised embeddings of every class's prompt, differentiable in the stages.

        Stage 0 enters with the other tokens, positions included. Stage k overwrites its parts at
        the input of block k, without position. The number of stages is the prompt depth; after it
        the prompt positions are carried through. Batch is 1 where no stage depends on the image.

        Raises:
            ModelError: the depth is not between 1 and the tower's.
        """
        if not 1 <= len(stages) <= self.depth:
            raise ModelError(
                "the prompt depth does not fit the text tower",
                found=len(stages),
                wanted=f"1 to {self.depth}",
                do="Change method.text_depth.",
            )
        size = self.execution.class_chunk
        with self.execution.autocast(self.device):
            if size is None or size >= layout.classes:
                return self._encode(layout, stages).to(self.dtype)
            chunks = [
                recomputed(partial(self._encode, own, [s.some(*where) for s in stages]))
                for own, *where in layout.chunks(size)
            ]
        return torch.cat(chunks, dim=1).to(self.dtype)

    def _encode(
        self, layout: PromptLayout, stages: Sequence[Stage]
    ) -> Float[Tensor, "batch classes embed"]:
        inputs = [self._placed(s) for s in self._inputs(layout, stages[0])]
        low = self._low(layout, stages)
        replaced = [self._replaced(layout, stages, k, low) for k in range(self.depth)]
        read = self.reads & set(layout.parts)
        causal = self.kind == "causal"
        outputs = live.run(self.blocks, inputs, replaced, read=read, causal=causal)
        return self._pool(outputs)

    def _inputs(self, layout: PromptLayout, stage: Stage) -> list[live.Rows]:
        names = [i for own in layout.name_ids for i in own]
        tokens = self.embed([layout.start_id, *names, *[layout.end_id] * layout.classes])
        sizes = [layout.parts[p].size if p in layout.parts else 0 for p in ("start", "name", END)]
        start, *rest = tokens[None].split(sizes, dim=1)
        parts = [layout.parts[p] for p in ("name", END) if p in layout.parts]
        given = [
            Stream(start, (layout.parts["start"],)),
            *layout.streams(stage, self.dtype, complete=True),
            Stream(torch.cat(rest, dim=1), tuple(parts)),
        ]
        return _grouped(given)

    def _low(self, layout: PromptLayout, stages: Sequence[Stage]) -> list[LowRank | None]:
        """The rows of every stage behind the first, where blocks norm them all at once."""
        norms = [norm for b in self.blocks[1 : len(stages)] if (norm := b.norm) is not None]
        low: list[LowRank] | None = None
        if norms:
            low = layout.rows_together(stages[1:], self.dtype, norms)
        return [None] * len(stages) if low is None else [None, *low]

    def _replaced(
        self,
        layout: PromptLayout,
        stages: Sequence[Stage],
        k: int,
        low: Sequence[LowRank | None],
    ) -> list[live.Rows]:
        """What overwrites the input of block k."""
        given: list[live.Rows] = [*self._constant(layout, k)]
        if k < len(stages):
            given += layout.streams(stages[k], self.dtype, complete=False, low=low[k])
        return _grouped(given)

    def _constant(self, layout: PromptLayout, k: int) -> list[Stream]:  # noqa: ARG002
        """What enters block k whatever the prompts are."""
        return []

    def _placed(self, rows: live.Rows) -> live.Rows:
        """What enters block 0 from token embeddings."""
        rows = rows.plus(self._positions())
        return rows if self.first_norm is None else rows.normed(self.first_norm)

    @property
    @abstractmethod
    def reads(self) -> frozenset[str]:
        """Names of the parts that pooling reads."""

    @abstractmethod
    def _table(self) -> nn.Embedding:
        """The token table."""

    @abstractmethod
    def _plain(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "n embed"]:
        """Embeddings of token ids by the library's own forward."""

    @abstractmethod
    def _positions(self) -> Float[Tensor, "positions w"]:
        """What is added to the token embeddings at every position."""

    @abstractmethod
    def _pool(self, outputs: Outputs) -> Float[Tensor, "b classes embed"]:
        """The embedding from the last block's output."""


def _grouped(rows: Sequence[live.Rows]) -> list[live.Rows]:
    """Written-out states in as few streams as there are batches."""
    low = [r for r in rows if isinstance(r, LowRank)]
    return [*Stream.grouped([r for r in rows if isinstance(r, Stream)]), *low]


def padded(ids: Sequence[Sequence[int]], length: int, pad: int, device: torch.device) -> Tensor:
    """Token ids as a table of `length` columns."""
    rows = [[*own, *[pad] * (length - len(own))] for own in ids]
    return torch.tensor(rows, dtype=torch.long, device=device)
