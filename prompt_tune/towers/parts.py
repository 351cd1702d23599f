"""Positions of a sequence, grouped by what they are, and the tensors that stand there.

A `Part` is one kind of position (the start token, the context, the class name, ...) with the places
it takes in every class. A `Stream` is the hidden states of some parts, packed: only positions that
exist are stored, class after class, so unequal lengths cost nothing in any matrix product. Its
batch dimension is 1 for states that do not depend on the image, and a part of a single class
stands for states that all classes share.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class _Gather(torch.autograd.Function):
    """`x[:, index]` whose gradient is a gather too: every source is taken at most once.

    Places whose gradient is known to be zero may repeat a source; `keep` masks the others.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, keep)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, keep = ctx.saved_tensors
        out = grad.index_select(1, inverse)
        return (out if keep is None else out * keep), None, None, None


@dataclass(frozen=True)
class _Tables:
    """Index tensors of a part on one device."""

    position: Int[Tensor, "classes longest"]  # -1 where a class has fewer
    flat: Int[Tensor, "size"]
    valid: Bool[Tensor, "classes longest"]


@dataclass(frozen=True)
class _Side:
    """Where the rows of several parts stand in a padded table of all classes, on one device."""

    unpack: Int[Tensor, "padded"]
    pack: Int[Tensor, "size"]
    valid: Bool[Tensor, "padded 1"]


class Part:
    """One kind of position, and where it stands in every class.

    Args:
        name: what stands there.
        rank: order of the kinds along the sequence; a causal query sees its own rank and below.
        positions: per class, the positions it takes; one entry alone is shared by all classes.
    """

    def __init__(self, name: str, rank: int, positions: Sequence[Sequence[int]]) -> None:
        self.name, self.rank = name, rank
        self.positions = tuple(tuple(p) for p in positions)
        self.classes = len(self.positions)
        self.longest = max(len(p) for p in self.positions)
        self.size = sum(len(p) for p in self.positions)
        self.end = 1 + max(max(p, default=-1) for p in self.positions)
        self.even = self.size == self.classes * self.longest
        self._tables: dict[torch.device, _Tables] = {}
        self._sides: dict[tuple[tuple[Part, ...], torch.device], _Side] = {}
        self._over: dict[int, Part] = {}
        self.hidden: dict[Any, Tensor | None] = {}  # of attention, for queries of this part

    def over(self, classes: int) -> "Part":
        """The same part, repeated for every class where it was shared."""
        if self.classes == classes:
            return self
        if classes not in self._over:
            self._over[classes] = Part(self.name, self.rank, self.positions * classes)
        return self._over[classes]

    def some(self, classes: slice) -> "Part":
        """The same part of some of the classes."""
        return Part(self.name, self.rank, self.positions[classes])

    def on(self, device: torch.device) -> _Tables:
        """The index tensors on `device`."""
        if device not in self._tables:
            padded = [list(p) + [-1] * (self.longest - len(p)) for p in self.positions]
            position = torch.tensor(padded, dtype=torch.long).reshape(self.classes, self.longest)
            tables = position, position[position >= 0], position >= 0
            self._tables[device] = _Tables(*(t.to(device) for t in tables))
        return self._tables[device]

    def beside(self, others: tuple["Part", ...], device: torch.device) -> _Side:
        """Index tensors of this part and others, of equally many classes, side by side."""
        if (others, device) not in self._sides:
            parts, begin, places = (self, *others), 0, []
            for part in parts:
                valid = part.on(torch.device("cpu")).valid
                count = valid.flatten().cumsum(0).view_as(valid) - 1 + begin
                places.append(count.masked_fill(~valid, -1))
                begin += part.size
            row = torch.cat(places, dim=1).flatten()
            pack = torch.empty(begin, dtype=torch.long)
            pack[row[row >= 0]] = (row >= 0).nonzero().flatten()
            tables = row.clamp(min=0), pack, (row >= 0)[:, None]
            self._sides[others, device] = _Side(*(t.to(device) for t in tables))
        return self._sides[others, device]


@dataclass(frozen=True, eq=False)
class Stream:
    """Hidden states of some parts, one part after the other along the packed dimension."""

    x: Float[Tensor, "b size w"]
    parts: tuple[Part, ...]

    @property
    def batch(self) -> int:
        """1 where no state depends on the image."""
        return int(self.x.shape[0])

    def split(self) -> tuple[Tensor, ...]:
        """The states of each part; views."""
        return self.x.split([p.size for p in self.parts], dim=1)

    def table(self) -> Float[Tensor, "b classes longest w"]:
        """The parts of every class side by side; what stands in the padding is arbitrary."""
        first, *others = self.parts
        x = self.x
        if first.classes > 1 and (others or not first.even):
            side = first.beside(tuple(others), x.device)
            x = _Gather.apply(x, side.unpack, side.pack, None)
        return x.unflatten(1, (first.classes, -1))

    @staticmethod
    def packed(table: Float[Tensor, "b classes longest w"], parts: tuple[Part, ...]) -> "Stream":
        """The inverse of `table`."""
        first, *others = parts
        x = table.flatten(1, 2)
        if first.classes > 1 and (others or not first.even):
            side = first.beside(tuple(others), x.device)
            x = _Gather.apply(x, side.pack, side.unpack, side.valid)
        return Stream(x, parts)

    def positions(self) -> Int[Tensor, "size"]:
        """The place of every row in its class's sequence."""
        return torch.cat([p.on(self.x.device).flat for p in self.parts])

    def plus(self, offset: Float[Tensor, "positions w"]) -> "Stream":
        """The states with a vector of their position added."""
        return Stream(self.x + offset[self.positions()], self.parts)

    def normed(self, norm: nn.LayerNorm) -> "Stream":
        """LayerNorm of every state."""
        return Stream(norm(self.x), self.parts)

    def dense(self) -> "Stream":
        """Itself: these states are written out."""
        return self

    def only(self, names: Collection[str]) -> "Stream":
        """The stream of some of the parts."""
        if all(p.name in names for p in self.parts):
            return self
        pairs = [(x, p) for x, p in zip(self.split(), self.parts, strict=True) if p.name in names]
        return Stream.of([Stream(x, (p,)) for x, p in pairs])

    def over(self, classes: int) -> "Stream":
        """The stream with its shared states repeated for every class."""
        if all(p.classes == classes for p in self.parts):
            return self
        repeated = [
            x if p.classes == classes else x.repeat(1, classes, 1)
            for x, p in zip(self.split(), self.parts, strict=True)
        ]
        return Stream(torch.cat(repeated, dim=1), tuple(p.over(classes) for p in self.parts))

    @staticmethod
    def of(streams: Sequence["Stream"]) -> "Stream":
        """Several streams as one, at the largest of their batches."""
        if len(streams) == 1:
            return streams[0]
        batch = max(s.batch for s in streams)
        x = torch.cat([s.x.expand(batch, -1, -1) for s in streams], dim=1)
        return Stream(x, tuple(p for s in streams for p in s.parts))

    @staticmethod
    def grouped(streams: Sequence["Stream"]) -> list["Stream"]:
        """The same states in as few streams as there are batches."""
        by_batch: dict[int, list[Stream]] = {}
        for stream in streams:
            by_batch.setdefault(stream.batch, []).append(stream)
        return [Stream.of(group) for group in by_batch.values()]
