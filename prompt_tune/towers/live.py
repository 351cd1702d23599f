"""The live-token engine: a frozen transformer computed only where somebody reads the result.

At block k the output of position p is computed if and only if

    k is not the last block and block k+1 does not replace p, or
    k is the last block and pooling reads p.

A position replaced at block k+1 gives block k its keys and values and nothing else. Every state is
kept at the smallest shape it has: what depends neither on the image nor on the class is computed
once, what depends only on the class once per class. The result, gradients included, is that of the
full computation.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prompt_tune.towers.attention import KeyValue, attend, visibility
from prompt_tune.towers.parts import Part, Stream


class Block(Protocol):
    """One frozen transformer block, taken apart."""

    heads: int

    def enter(self, x: Tensor) -> Tensor:
        """What queries, keys and values are projected from: the normalised input, or the input."""

    def query(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        """Query projection."""

    def key_value(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n 2w"]:
        """Key projection, then value projection."""

    def close(self, x: Float[Tensor, "b n w"], attended: Float[Tensor, "b n w"]) -> Tensor:
        """The block's output from its input and the attended values."""


_Masks = dict[tuple[tuple[str, ...], tuple[str, ...]], Bool[Tensor, "c n m"] | None]


def run(
    blocks: Sequence[Block],
    inputs: Sequence[Stream],
    replaced: Sequence[Sequence[Stream]],
    *,
    read: Collection[str],
    causal: bool,
) -> dict[str, tuple[Part, Float[Tensor, "b size w"]]]:
    """The last block's output at the parts that pooling reads.

    Args:
        blocks: the tower's blocks.
        inputs: what enters block 0.
        replaced: for each block, the parts whose input is overwritten; entry 0 is ignored.
        read: names of the parts that pooling reads.
        causal: a query sees its own position and earlier ones only.
    """
    streams, masks = list(inputs), _Masks()
    for k, block in enumerate(blocks):
        if k:
            streams = [*streams, *replaced[k]]
        present = {p.name for s in streams for p in s.parts}
        if k == len(blocks) - 1:
            alive = present & set(read)
        else:
            alive = present - {p.name for s in replaced[k + 1] for p in s.parts}
        step = _Step(block, streams, masks, causal=causal)
        streams = [step.output(*group) for group in _groups(streams, alive, causal=causal)]
    return {p.name: (p, x) for s in streams for x, p in zip(s.split(), s.parts, strict=True)}


def _visible(part: Part, parts: Iterable[Part], *, causal: bool) -> list[Part]:
    return [p for p in parts if not causal or p.rank <= part.rank]


def _groups(
    streams: Sequence[Stream], alive: Collection[str], *, causal: bool
) -> list[tuple[int, tuple[str, ...]]]:
    """Live parts whose outputs depend on the same things, as (classes, names)."""
    batch = {p.name: s.batch for s in streams for p in s.parts}
    parts = [p for s in streams for p in s.parts]
    groups: dict[tuple[int, int], list[str]] = {}
    for part in parts:
        if part.name in alive:
            seen = _visible(part, parts, causal=causal)
            shape = max(batch[p.name] for p in seen), max(p.classes for p in seen)
            groups.setdefault(shape, []).append(part.name)
    return [(classes, tuple(names)) for (_, classes), names in groups.items()]


class _Keys:
    """Keys and values of each part, projected when first seen and at the shape of their stream."""

    def __init__(self, block: Block, entered: Sequence[Stream]) -> None:
        self.block, self.entered = block, entered
        self.parts = [p for s in entered for p in s.parts]
        self.known: dict[str, KeyValue] = {}

    def of(self, parts: Sequence[Part]) -> list[KeyValue]:
        missing = {p.name for p in parts} - set(self.known)
        for stream in self.entered:
            if missing & {p.name for p in stream.parts}:
                self._project(stream.only(missing))
        return [self.known[p.name] for p in parts]

    def _project(self, stream: Stream) -> None:
        projected = Stream(self.block.key_value(stream.x), stream.parts)
        for part, x in zip(stream.parts, projected.split(), strict=True):
            table = part.unpack(x).unflatten(-1, (2, self.block.heads, -1))
            key, value = table.permute(3, 0, 1, 4, 2, 5).unbind(0)
            self.known[part.name] = KeyValue(part, key, value)


class _Step:
    """One block over the streams that enter it."""

    def __init__(
        self, block: Block, streams: Sequence[Stream], masks: _Masks, *, causal: bool
    ) -> None:
        self.block, self.streams, self.masks, self.causal = block, streams, masks, causal
        self.entered = [Stream(block.enter(s.x), s.parts) for s in streams]
        self.keys = _Keys(block, self.entered)

    def output(self, classes: int, names: tuple[str, ...]) -> Stream:
        """The block's output at the parts `names`."""
        here = _select(self.streams, names).over(classes)
        entered = _select(self.entered, names).over(classes)
        parts = here.parts
        last = max(parts, key=lambda p: p.rank)
        seen = self.keys.of(_visible(last, self.keys.parts, causal=self.causal))
        mask = self._mask(parts, [k.part for k in seen], here.x.device)

        query = _table(Stream(self.block.query(entered.x), parts))
        query = query.unflatten(-1, (self.block.heads, -1)).transpose(2, 3)
        out = attend(query, seen, mask).transpose(2, 3).flatten(-2)
        return Stream(self.block.close(here.x, _packed(out, parts)), parts)

    def _mask(
        self, queries: Sequence[Part], keys: Sequence[Part], device: torch.device
    ) -> Bool[Tensor, "c n m"] | None:
        names = tuple(p.name for p in queries), tuple(p.name for p in keys)
        if names not in self.masks:
            self.masks[names] = visibility(queries, keys, device, causal=self.causal)
        return self.masks[names]


def _select(streams: Sequence[Stream], names: Collection[str]) -> Stream:
    wanted = [s for s in streams if any(p.name in names for p in s.parts)]
    return Stream.of([s.only(names) for s in wanted])


def _table(stream: Stream) -> Float[Tensor, "b c n w"]:
    """All parts of every class side by side, padded."""
    if all(p.classes == 1 for p in stream.parts):
        return stream.x.unsqueeze(1)
    tables = [p.unpack(x) for p, x in zip(stream.parts, stream.split(), strict=True)]
    return tables[0] if len(tables) == 1 else torch.cat(tables, dim=2)


def _packed(table: Float[Tensor, "b c n w"], parts: Sequence[Part]) -> Float[Tensor, "b s w"]:
    """The inverse of `_table`."""
    if all(p.classes == 1 for p in parts):
        return table.squeeze(1)
    pieces = table.split([p.longest for p in parts], dim=2)
    packed = [p.pack(x) for p, x in zip(parts, pieces, strict=True)]
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim=1)
