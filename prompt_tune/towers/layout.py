"""Where everything stands in each class's prompt, and what a block gets at the prompt positions.

Order of a class's sequence: start, context, knowledge rows (prefix, middle, suffix), the tokens of
the name and what follows it, end. Row counts differ between classes, so every class has positions
of its own from the rows on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cache.errors import ModelError, PromptOverflowError
from prompt_tune.towers.lowrank import LowRank, normed_together
from prompt_tune.towers.parts import Part, Stream

_RANK = {n: i for i, n in enumerate(("start", "context", "prefix", "middle", "suffix", "name"))}
END = "end"
_SHARED = ("start", "context")
_ROWS = ("prefix", "middle", "suffix")


@dataclass(frozen=True)
class Stage:
    """What the input of one block gets at the prompt positions.

    A part left None has no positions in the layout; at blocks after the first it may also mean
    that the part is carried through from the block before.

    With a `basis` the rows are coordinates in it: the width of prefix, suffix and middle is then
    its rank r, and what stands at a position is `row @ basis`.

    Args:
        context: `[n_context, width]` shared by all classes, or `[classes, n_context, width]`, or
            `[batch, classes or 1, n_context, width]` where it depends on the image.
        prefix: `[batch or 1, classes, p, width]`, the first rows; may depend on the image.
        suffix: `[batch or 1, classes, s, width]`, the last rows; may depend on the image.
        middle: `[sum over classes of (rows - p - s), width]`, class after class; the rows between
            prefix and suffix, the same for every image.
        basis: `[r, width]`, or None for rows that are written out.
    """

    context: Float[Tensor, "*batch_classes n_context width"] | None
    prefix: Float[Tensor, "batch classes p width"] | None = None
    suffix: Float[Tensor, "batch classes s width"] | None = None
    middle: Float[Tensor, "rows width"] | None = None
    basis: Float[Tensor, "r width"] | None = None

    def some(self, classes: slice, middle: slice) -> "Stage":
        """What some classes get, whose middle rows are those of `middle`; views."""
        context = self.context
        if context is not None and context.ndim > 2 and context.shape[-3] > 1:
            context = context[classes] if context.ndim == 3 else context[:, classes]
        return replace(
            self,
            context=context,
            prefix=None if self.prefix is None else self.prefix[:, classes],
            suffix=None if self.suffix is None else self.suffix[:, classes],
            middle=None if self.middle is None else self.middle[middle],
        )


class Tokenizing(Protocol):
    """What a layout needs of a text tower."""

    context_length: int

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Unpadded ids from start to end."""


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """The parts of all classes' prompts; make one with `build`.

    Args:
        class_names: in label order, underscores replaced by spaces.
        parts: by name; a part without positions is absent. `end` is the end token alone.
        start_id: id of the start token.
        name_ids: per class, the tokens of the name and its ending.
        end_id: id of the end token.
        row_counts: per class, its knowledge rows.
        lengths: per class, all tokens from start to end.
    """

    class_names: tuple[str, ...]
    parts: dict[str, Part]
    start_id: int
    name_ids: tuple[tuple[int, ...], ...]
    end_id: int
    row_counts: tuple[int, ...]
    lengths: tuple[int, ...]
    _chunks: dict[int, list[tuple["PromptLayout", slice, slice]]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @staticmethod
    def build(
        tower: Tokenizing,
        class_names: Sequence[str],
        *,
        n_context: int,
        row_counts: Sequence[int] | None = None,
        intervened: tuple[int, int] = (0, 0),
        ending: str = ".",
    ) -> "PromptLayout":
        """The layout of prompts "context, rows, name, ending" for `tower`.

        The name is tokenised together with `ending`, which gives the same ids as tokenising the
        whole sentence: both tokenizers split at spaces first.

        Args:
            tower: whose tokenizer and context length count.
            class_names: in label order.
            n_context: learnable context positions.
            row_counts: knowledge rows of each class; None for prompts without.
            intervened: how many rows at the beginning (prefix) and at the end (suffix) are given
                apart from the middle.
            ending: what follows the name.

        Raises:
            ModelError: a class has fewer rows than are intervened on.
            PromptOverflowError: a prompt is longer than the tower's context.
        """
        names = tuple(" ".join(name.replace("_", " ").split()) for name in class_names)
        counts = tuple(row_counts) if row_counts is not None else (0,) * len(names)
        if len(counts) != len(names) or not names:
            message = f"{len(counts)} row counts for {len(names)} classes"
            raise ValueError(message)
        if any(counts) or any(intervened):
            _check_rows(names, counts, intervened)
        ids = tower.tokenize([name + ending for name in names])
        lengths = tuple(
            n_context + count + len(own) for count, own in zip(counts, ids, strict=True)
        )
        for name, count, own in zip(names, counts, ids, strict=True):
            _check_length(tower, name, n_context, count, len(own) - 2)
        return PromptLayout(
            class_names=names,
            parts=_parts(n_context, counts, intervened, lengths),
            start_id=ids[0][0],
            name_ids=tuple(tuple(own[1:-1]) for own in ids),
            end_id=ids[0][-1],
            row_counts=counts,
            lengths=lengths,
        )

    def chunks(self, size: int) -> list[tuple["PromptLayout", slice, slice]]:
        """Layouts of at most `size` classes each, with their classes and their middle rows."""
        if size not in self._chunks:
            middle = self.parts.get("middle")
            ends = [0]
            for c in range(self.classes):
                ends.append(ends[-1] + (len(middle.positions[c]) if middle else 0))
            self._chunks[size] = [
                (self._some(slice(i, j)), slice(i, j), slice(ends[i], ends[j]))
                for i in range(0, self.classes, size)
                for j in [min(i + size, self.classes)]
            ]
        return self._chunks[size]

    def _some(self, classes: slice) -> "PromptLayout":
        parts = {n: p if n in _SHARED else p.some(classes) for n, p in self.parts.items()}
        return PromptLayout(
            class_names=self.class_names[classes],
            parts={name: part for name, part in parts.items() if part.size},
            start_id=self.start_id,
            name_ids=self.name_ids[classes],
            end_id=self.end_id,
            row_counts=self.row_counts[classes],
            lengths=self.lengths[classes],
        )

    def streams(
        self, stage: Stage, dtype: torch.dtype, *, complete: bool, low: LowRank | None = None
    ) -> list[Stream | LowRank]:
        """The rows of a stage, each part by itself, or those of a basis together.

        Args:
            stage: what to place.
            dtype: the tower's.
            complete: whether every prompt part of the layout must be given.
            low: the rows, where they are placed already.
        """
        names = ("context", *_ROWS) if low is None else ("context",)
        streams = self._streams(stage, names, complete=complete)
        rows = [s for name, s in streams.items() if stage.basis is not None and name != "context"]
        full = [Stream(s.x.to(dtype), s.parts) for s in streams.values() if s not in rows]
        return [*full, *(_low(rows, stage.basis, dtype) if low is None else [low])]

    def rows_together(
        self, stages: Sequence[Stage], dtype: torch.dtype, norms: Sequence[nn.LayerNorm]
    ) -> list[LowRank] | None:
        """The rows of stages that are normed at once; None where stages or norms are unlike."""
        bases = [s.basis for s in stages if s.basis is not None]
        given = [self._streams(s, _ROWS, complete=False) for s in stages]
        shapes = {tuple((name, s.x.shape) for name, s in one.items()) for one in given}
        unlike = len(shapes) != 1 or len({norm.eps for norm in norms}) != 1
        if unlike or len(bases) != len(stages) or not given[0]:
            return None
        batch = max(s.batch for s in given[0].values())
        stacked = [torch.stack([one[name].x for one in given]) for name in given[0]]
        wide = torch.promote_types(dtype, torch.float32)
        rows = torch.cat([x.expand(-1, batch, -1, -1) for x in stacked], dim=2).to(wide)
        parts = tuple(p for s in given[0].values() for p in s.parts)
        return normed_together(rows, torch.stack(bases).to(wide), parts, dtype, norms)

    def _streams(self, stage: Stage, names: Sequence[str], *, complete: bool) -> dict[str, Stream]:
        streams = {}
        for name in names:
            part, x = self.parts.get(name), getattr(stage, name)
            empty = x is None or x.shape[-2] == 0
            if (part is None and not empty) or (part is not None and x is None and complete):
                message = f"stage and layout differ in whether there is a {name}"
                raise ValueError(message)
            if part is not None and x is not None:
                streams[name] = _stream(part, x, self.classes)
        return streams


def _stream(part: Part, x: Tensor, classes: int) -> Stream:
    if part.name == "context" and x.ndim > 2 and (x.ndim == 3 or x.shape[1] > 1):
        part = part.over(classes)
    shape = {2: (part.size,), 3: (classes, part.longest), 4: (part.classes, part.longest)}
    if x.ndim not in shape or x.shape[max(0, x.ndim - 3) : -1] != shape[x.ndim]:
        message = f"{part.name} has shape {tuple(x.shape)}, the layout has {part.size} positions"
        raise ValueError(message)
    batch = x.shape[0] if x.ndim == 4 else 1
    return Stream(x.reshape(batch, part.size, x.shape[-1]), (part,))


def _low(streams: Sequence[Stream], basis: Tensor | None, dtype: torch.dtype) -> list[LowRank]:
    if basis is None or not streams:
        return []
    together, wide = Stream.of(streams), torch.promote_types(dtype, torch.float32)
    return [
        LowRank(Stream(together.x.to(wide), together.parts), basis.to(wide).contiguous(), dtype)
    ]


def _check_rows(names: Sequence[str], counts: Sequence[int], intervened: tuple[int, int]) -> None:
    for name, count in zip(names, counts, strict=True):
        if count < sum(intervened):
            raise ModelError(
                "too few knowledge rows to intervene on",
                where=f"class {name!r}",
                found=count,
                wanted=f"at least {sum(intervened)} "
                f"({intervened[0]} prefix + {intervened[1]} suffix)",
                do="Store more rows, or lower method.prefix and method.suffix.",
            )


def _check_length(tower: Tokenizing, name: str, n_context: int, rows: int, words: int) -> None:
    needed = 1 + n_context + rows + words + 1
    if needed <= tower.context_length:
        return
    counted = [
        "1 start",
        f"{n_context} context",
        *([f"{rows} knowledge"] if rows else []),
        f"{words} name",
        "1 end",
    ]
    lower = "knowledge.keep or method.n_context" if rows else "method.n_context"
    raise PromptOverflowError(
        "the prompt is longer than the text tower's context",
        where=f"class {name!r}",
        found=f"{needed} tokens ({' + '.join(counted)})",
        wanted=f"at most {tower.context_length}",
        do=f"Lower {lower}, or shorten the class name.",
    )


def _parts(
    n_context: int,
    counts: Sequence[int],
    intervened: tuple[int, int],
    lengths: Sequence[int],
) -> dict[str, Part]:
    prefix, suffix = intervened
    first = 1 + n_context
    places: dict[str, list[range]] = {
        "start": [range(1)],
        "context": [range(1, first)],
        "prefix": [range(first, first + prefix) for _ in counts],
        "middle": [range(first + prefix, first + n - suffix) for n in counts],
        "suffix": [range(first + n - suffix, first + n) for n in counts],
        "name": [range(first + n, end - 1) for n, end in zip(counts, lengths, strict=True)],
        END: [range(end - 1, end) for end in lengths],
    }
    rank = {**_RANK, END: len(_RANK)}
    return {name: Part(name, rank[name], at) for name, at in places.items() if any(map(len, at))}
