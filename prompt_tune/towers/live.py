"""The live-token engine: a frozen transformer computed only where somebody reads the result.

At block k the output of position p is computed if and only if

    k is not the last block and block k+1 does not replace p, or
    k is the last block and pooling reads p.

A position replaced at block k+1 gives block k its keys and values and nothing else. Every state is
kept at the smallest shape it has: what depends neither on the image nor on the class is computed
once, what depends only on the class once per class, and rows of low rank stay coordinates until an
output of theirs is needed. The result, gradients included, is that of the full computation.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prompt_tune.execution import recomputed
from prompt_tune.towers.attention import (
    Keys,
    KeyValue,
    LowRankKeyValue,
    SharedKeyValue,
    attend,
    hidden,
)
from prompt_tune.towers.lowrank import LowRank
from prompt_tune.towers.parts import Part, Stream

Rows = Stream | LowRank


class Block(Protocol):
    """One frozen transformer block, taken apart.

    `hidden` is the width of the MLP's inner layer; `norm` is the LayerNorm through which queries,
    keys and values see the input, if they do.
    """

    heads: int
    hidden: int
    norm: nn.LayerNorm | None

    def query(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        """Query projection."""

    def key_value(
        self, entered: Float[Tensor, "b n w"], *, bias: bool = True
    ) -> Float[Tensor, "b n 2w"]:
        """Key projection, then value projection, with or without their biases."""

    def close(self, x: Float[Tensor, "b n w"], attended: Float[Tensor, "b n w"]) -> Tensor:
        """The block's output from its input and the attended values."""

    def query_key_value(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n 3w"]:
        """Query, key and value projections, in this order."""

    @staticmethod
    def closing(block: Any, x: Float[Tensor, "b n w"], attended: Float[Tensor, "b n w"]) -> Tensor:
        """The same of any block's module."""


OfBlock = TypeVar("OfBlock", bound=Block)


def compiled(blocks: Sequence[OfBlock]) -> list[OfBlock]:
    """The same blocks, closed by code that is compiled once for all of them."""
    closing = torch.compile(blocks[0].closing)
    others = [copy.copy(block) for block in blocks]
    for other in others:
        other.closing = closing  # type: ignore[method-assign]
    return others


_Masks = dict[tuple[tuple[str, ...], tuple[str, ...]], Bool[Tensor, "c n m"] | None]


def run(
    blocks: Sequence[Block],
    inputs: Sequence[Rows],
    replaced: Sequence[Sequence[Rows]],
    *,
    read: Collection[str],
    causal: bool,
    recompute: bool = False,
) -> dict[str, tuple[Part, Float[Tensor, "b size w"]]]:
    """The last block's output at the parts that pooling reads.

    Args:
        blocks: the tower's blocks.
        inputs: what enters block 0.
        replaced: for each block, the parts whose input is overwritten; entry 0 is ignored.
        read: names of the parts that pooling reads.
        causal: a query sees its own position and earlier ones only.
        recompute: whether every block is computed again for the backward.
    """
    streams, outputs, masks = list(inputs), list[Stream](), _Masks()
    for k, block in enumerate(blocks):
        if k:
            streams = [*outputs, *replaced[k]]
        present = {p.name for s in streams for p in s.parts}
        if k == len(blocks) - 1:
            alive = present & set(read)
        else:
            alive = present - {p.name for s in replaced[k + 1] for p in s.parts}
        step = partial(_outputs, block, streams, masks, alive, causal=causal)
        outputs = recomputed(step) if recompute else step()
    return {p.name: (p, x) for s in outputs for x, p in zip(s.split(), s.parts, strict=True)}


def _outputs(
    block: Block,
    streams: Sequence[Rows],
    masks: _Masks,
    alive: Collection[str],
    *,
    causal: bool,
) -> list[Stream]:
    step = _Step(block, streams, masks, causal=causal)
    return [step.output(*group) for group in _groups(streams, alive, causal=causal)]


def entered(block: Block, rows: Rows) -> Rows:
    """What queries, keys and values are projected from: the normalised input, or the input."""
    return rows if block.norm is None else rows.normed(block.norm)


def _visible(part: Part, parts: Iterable[Part], *, causal: bool) -> list[Part]:
    return [p for p in parts if not causal or p.rank <= part.rank]


def _groups(
    streams: Sequence[Rows], alive: Collection[str], *, causal: bool
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


_BIASES: WeakKeyDictionary[Any, dict[Any, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def _biases(block: Block, shared: int, basis: int, like: Float[Tensor, "1 n 2w"]) -> Tensor:
    """The biases of key and value, but zeros at the vectors of a basis; made once."""
    known, asked = _BIASES.setdefault(block, {}), (shared, basis, like.dtype, like.device)
    if asked not in known:
        bias = block.key_value(like.new_zeros(1, 1, like.shape[-1] // 2))
        known[asked] = bias.repeat(1, like.shape[1], 1).to(like.dtype)
        known[asked][:, shared : shared + basis] = 0
    return known[asked]


class _Keys:
    """Keys and values, projected when first seen and at the shape of their stream."""

    def __init__(self, block: Block, entered: Sequence[Rows]) -> None:
        self.block, self.entered = block, entered
        self.parts = [p for s in entered for p in s.parts]
        self.projected: list[list[Stream]] = [[] for _ in entered]
        self.bases: dict[int, KeyValue] = {}
        self.tables: dict[int, KeyValue] = {}
        self.whole: dict[int, KeyValue] = {}

    def of(self, parts: Sequence[Part]) -> list[Keys | SharedKeyValue]:
        """Those of some parts; the rows of one basis together."""
        names = {p.name for p in parts}
        together = self._together(names)
        keys: list[Keys | SharedKeyValue] = []
        for k, stream in enumerate(self.entered):
            if together is not None and k in together:
                continue
            if names.isdisjoint(p.name for p in stream.parts):
                continue
            found = stream.only(names)
            if isinstance(found, LowRank):
                keys.append(self._in_coordinates(k, found))
            else:
                keys.extend(self._written_out(k, found))
        if together is not None:
            keys.append(self._shared(*together))
        return keys

    def with_queries(self, names: Collection[str], classes: int) -> Float[Tensor, "b c n w"] | None:
        """The queries of a whole stream, projected with its keys and values where there are few."""
        for k, s in enumerate(self.entered):
            if {p.name for p in s.parts} == set(names) and isinstance(s, Stream):
                few = sum(p.longest for p in s.parts) * 3 * self.block.heads < 2 * s.x.shape[-1]
                if few and all(p.classes == classes > 1 for p in s.parts) and not self.projected[k]:
                    every = Stream(self.block.query_key_value(s.x), s.parts).table()
                    query, own = every.split([s.x.shape[-1], 2 * s.x.shape[-1]], dim=-1)
                    self.whole[k] = self._key_value(s.parts, own)
                    return query
        return None

    def _together(self, names: Collection[str]) -> tuple[int, int] | None:
        """What all images and classes share, and rows whose basis goes with it, if all is seen."""
        shared, low = [], []
        for k, s in enumerate(self.entered):
            if all(p.name in names for p in s.parts):
                if isinstance(s, LowRank):
                    low += [k] if s.offset is None and s.shift is not None else []
                elif s.batch == 1 and all(p.classes == 1 for p in s.parts):
                    shared.append(k)
        return (shared[0], low[0]) if len(shared) == len(low) == 1 else None

    def _shared(self, k: int, of_rows: int) -> SharedKeyValue:
        """Key and value of the stream `k` and of the basis of rows, in one projection."""
        stream, low = self.entered[k], self.entered[of_rows]
        assert isinstance(stream, Stream)  # noqa: S101 - see `_together`
        assert isinstance(low, LowRank) and low.shift is not None  # noqa: S101, PT018
        if of_rows not in self.tables:
            shared, basis = stream.x.flatten(0, 1), low.basis.to(low.dtype)
            every = torch.cat([shared, basis, low.shift[None].to(low.dtype)])[None]
            linear = self.block.key_value(every, bias=False)
            linear = linear + _biases(self.block, len(shared), len(basis), linear)
            self.tables[of_rows] = self._key_value(stream.parts, linear[:, None])
        parts = (*stream.parts, *low.parts)
        return SharedKeyValue(parts, self.tables[of_rows], low.table())

    def _written_out(self, k: int, stream: Stream) -> Iterator[KeyValue]:
        if k in self.whole and stream.parts == self.whole[k].parts:
            yield self.whole[k]
            return
        known, names = self.projected[k], {p.name for p in stream.parts}
        missing = names - {p.name for s in known for p in s.parts}
        if missing:
            new = stream.only(missing)
            known.append(Stream(self.block.key_value(new.x), new.parts))
        for some in known:
            for classes in dict.fromkeys(p.classes for p in some.parts):
                wanted = {p.name for p in some.parts if p.classes == classes} & names
                if wanted:
                    alike = some.only(wanted)
                    yield self._key_value(alike.parts, alike.table())

    def _in_coordinates(self, k: int, low: LowRank) -> LowRankKeyValue:
        if k not in self.bases:
            linear = self.block.key_value(low.basis.to(low.dtype), bias=False)
            shift = torch.zeros_like(low.basis[0]) if low.shift is None else low.shift
            constant = self.block.key_value(shift[None].to(low.dtype))
            self.bases[k] = self._key_value((), torch.cat([linear, constant])[None, None])
        offset = None
        if low.offset is not None:
            every = self.block.key_value(low.offset.to(low.dtype), bias=False)
            at = torch.cat([p.on(every.device).position for p in low.parts], dim=1)
            offset = self._key_value(low.parts, every[at.clamp(min=0)][None])
        return LowRankKeyValue(low.parts, low.table().to(low.dtype), self.bases[k], offset)

    def _key_value(self, parts: tuple[Part, ...], x: Float[Tensor, "b c m 2w"]) -> KeyValue:
        table = x.unflatten(-1, (2, self.block.heads, -1))
        both = table.permute(3, 0, 1, 4, 2, 5)
        key, value = both.unbind()
        return KeyValue(parts, key, value, both)


class _Step:
    """One block over the streams that enter it."""

    def __init__(
        self, block: Block, streams: Sequence[Rows], masks: _Masks, *, causal: bool
    ) -> None:
        self.block, self.streams, self.masks, self.causal = block, streams, masks, causal
        self.entered = [entered(block, s) for s in streams]
        self.keys = _Keys(block, self.entered)

    def output(self, classes: int, names: tuple[str, ...]) -> Stream:
        """The block's output at the parts `names`."""
        here = _select(self.streams, names).over(classes)
        entered = _select(self.entered, names).over(classes)
        parts = here.parts
        last = max(parts, key=lambda p: p.rank)
        query = self.keys.with_queries(names, classes)
        if query is None:
            query = Stream(self.block.query(entered.x), parts).table()
        seen = self.keys.of(_visible(last, self.keys.parts, causal=self.causal))
        mask = self._mask(parts, [p for k in seen for p in k.parts], here.x.device)
        query = query.unflatten(-1, (self.block.heads, -1)).transpose(2, 3)
        out = attend(query, seen, mask).transpose(2, 3).flatten(-2)
        return Stream(self.block.close(here.x, Stream.packed(out, parts).x), parts)

    def _mask(
        self, queries: Sequence[Part], keys: Sequence[Part], device: torch.device
    ) -> Bool[Tensor, "c n m"] | None:
        names = tuple(p.name for p in queries), tuple(p.name for p in keys)
        if names not in self.masks:
            self.masks[names] = hidden(queries, keys, device, causal=self.causal)
        return self.masks[names]


def _select(streams: Sequence[Rows], names: Collection[str]) -> Stream:
    wanted = [s.only(names) for s in streams if any(p.name in names for p in s.parts)]
    return Stream.of([s.dense() for s in wanted])
