"""Attention of a few live queries over keys that are stored at their smallest shape.

Keys and values are tensors, or coordinates c of positions in the keys and values of a basis, with
f times those of an offset where there is one; only c and f depend on the image:

    q . key = (key(basis)^T q) . c + f (q . key(offset)),
    sum_j a_j value_j = value(basis) (sum_j a_j c_j) + sum_j a_j f_j value(offset_j).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from prompt_tune.towers.mixed import MixedAttention
from prompt_tune.towers.parts import Part

Query = Float[Tensor, "b c heads n d"]
Scores = Float[Tensor, "b c heads n m"]
FEW = 64  # queries


@dataclass(frozen=True, eq=False)
class KeyValue:
    """Keys and values of some parts: `[b or 1, classes or 1, heads, positions, head width]`."""

    parts: tuple[Part, ...]
    key: Float[Tensor, "b c heads m d"]
    value: Float[Tensor, "b c heads m d"]
    both: Float[Tensor, "2 b c heads m d"] | None = None

    @property
    def stacked(self) -> Float[Tensor, "2 b c heads m d"]:
        """Key and value as one tensor."""
        return torch.stack([self.key, self.value]) if self.both is None else self.both

    @property
    def shape(self) -> tuple[int, int]:
        """Images and classes."""
        return self.key.shape[0], self.key.shape[1]

    def dense(self) -> "KeyValue":
        """Itself."""
        return self

    @property
    def shared(self) -> "KeyValue | None":
        """What all images and classes have in common."""
        return self if self.shape == (1, 1) else None

    def scores(self, query: Query, shared: Tensor | None) -> Scores:
        """Every query with every key, from the scores of what is shared where they are known."""
        return self.products(query) if shared is None else shared

    def summed(self, weights: Scores) -> tuple[Scores | None, Query | None]:
        """The weights of the values that are shared, and the weighted sum of the others."""
        return (weights, None) if self.shape == (1, 1) else (None, self.sums(weights))

    def products(self, query: Query) -> Scores:
        """`q . key`."""
        return _product("bchnd", query, "hmd", self.key, "bchnm")

    def sums(self, weights: Scores) -> Query:
        """`sum_j a_j value_j`."""
        return _product("bchnm", weights, "hmd", self.value, "bchnd")

    @staticmethod
    def of(keys: Sequence["KeyValue"]) -> "KeyValue":
        """Several of one shape as one."""
        if len(keys) == 1:
            return keys[0]
        key, value = (
            torch.cat(x, dim=3) for x in zip(*((k.key, k.value) for k in keys), strict=True)
        )
        return KeyValue(tuple(p for k in keys for p in k.parts), key, value)


@dataclass(frozen=True, eq=False)
class LowRankKeyValue:
    """Keys and values of some parts, in coordinates.

    Args:
        parts: whose they are.
        rows: the coordinates, and the offset's factor behind them.
        basis: key and value of what the coordinates count, `[1, 1, heads, E, head width]`.
        offset: key and value of every position's offset, `[1, classes, heads, m, head width]`.
    """

    parts: tuple[Part, ...]
    rows: Float[Tensor, "b c m e"]
    basis: KeyValue
    offset: KeyValue | None

    @property
    def shape(self) -> tuple[int, int]:
        """Images and classes."""
        return self.rows.shape[0], self.rows.shape[1]

    @property
    def _rank(self) -> int:
        return self.basis.key.shape[3]

    def dense(self) -> KeyValue:
        """Keys and values written out."""
        rows = self.rows[:, :, None]
        key, value = (rows[..., : self._rank] @ x for x in (self.basis.key, self.basis.value))
        if self.offset is not None:
            factor = rows[..., self._rank :]
            key, value = key + factor * self.offset.key, value + factor * self.offset.value
        return KeyValue(self.parts, key, value)

    @property
    def shared(self) -> KeyValue:
        """The basis."""
        return self.basis

    def scores(self, query: Query, shared: Scores | None) -> Scores:
        """Every query with every key, from the scores of the basis where they are known."""
        shared = self.basis.products(query) if shared is None else shared
        rows = self.rows[..., : self._rank].transpose(2, 3)
        out = (shared.flatten(2, 3) @ rows).unflatten(2, shared.shape[2:4])
        if self.offset is None:
            return out
        return out + self.offset.products(query) * self.rows[:, :, None, None, :, self._rank]

    def summed(self, weights: Scores) -> tuple[Scores, Query | None]:
        """The weights of the basis, and the weighted sum of the offsets."""
        inner = weights.flatten(2, 3) @ self.rows[..., : self._rank]
        inner = inner.unflatten(2, weights.shape[2:4])
        if self.offset is None:
            return inner, None
        return inner, self.offset.sums(weights * self.rows[:, :, None, None, :, self._rank])


@dataclass(frozen=True, eq=False)
class SharedKeyValue:
    """Keys and values that all images and classes share, the last of them a basis of rows.

    Args:
        parts: of the shared ones, then of the rows.
        table: key and value of the shared ones, then of the basis.
        rows: coordinates in the basis, without offset.
    """

    parts: tuple[Part, ...]
    table: KeyValue
    rows: Float[Tensor, "b c m e"]

    @property
    def shape(self) -> tuple[int, int]:
        """Images and classes."""
        return self.rows.shape[0], self.rows.shape[1]

    def apart(self) -> tuple[KeyValue, LowRankKeyValue]:
        """The shared ones, and the rows with their basis."""
        count = self.table.key.shape[3] - self.rows.shape[3]
        sizes = [count, self.rows.shape[3]]
        keys, values = (x.split(sizes, dim=3) for x in (self.table.key, self.table.value))
        own = tuple(p for p in self.parts if p in self.table.parts)
        others = tuple(p for p in self.parts if p not in self.table.parts)
        basis = KeyValue((), keys[1], values[1])
        return (
            KeyValue(own, keys[0], values[0]),
            LowRankKeyValue(others, self.rows, basis, None),
        )


Keys = KeyValue | LowRankKeyValue


def hidden(
    queries: Sequence[Part], keys: Sequence[Part], device: torch.device, *, causal: bool
) -> Bool[Tensor, "c n m"] | None:
    """Which key a query does not see, or None where every query sees every key.

    Dimensions along which nothing changes may have size 1. A padded key is never seen; a padded
    query sees every real key, so that its softmax is finite.
    """
    first, asked = queries[0], (tuple(queries), tuple(keys), device, causal)
    if asked not in first.hidden:
        first.hidden[asked] = _hidden(queries, keys, device, causal=causal)
    return first.hidden[asked]


def _hidden(
    queries: Sequence[Part], keys: Sequence[Part], device: torch.device, *, causal: bool
) -> Bool[Tensor, "c n m"] | None:
    at_key = _cat_positions(keys)
    seen = at_key[:, None, :] >= 0
    if causal:
        at_query = _cat_positions(queries)
        at_query = torch.where(at_query < 0, at_key.max(), at_query)
        seen = seen & (at_query[:, :, None] >= at_key[:, None, :])
    return None if bool(seen.all()) else (~seen).to(device)


def _cat_positions(parts: Sequence[Part]) -> Tensor:
    classes = max(p.classes for p in parts)
    tables = [p.on(torch.device("cpu")).position for p in parts]
    return torch.cat([t.expand(classes, -1) for t in tables], dim=1)


def attend(
    query: Float[Tensor, "b c heads n d"],
    keys: Sequence[Keys | SharedKeyValue],
    unseen: Bool[Tensor, "c n m"] | None,
) -> Float[Tensor, "b c heads n d"]:
    """Softmax attention over the concatenation of `keys`, each broadcast over images and classes.

    Few queries are scored part by part, so that shared keys and values are never copied per image
    and class, and those in coordinates never written out; many queries go through
    `scaled_dot_product_attention`.
    """
    own = (query.shape[0], query.shape[1])
    few = 3 * query.shape[3] < 2 * query.shape[4]
    if len(keys) == 2 and few:
        first, second = keys
        known = isinstance(first, KeyValue) and isinstance(second, SharedKeyValue)
        if known and first.shape == own == second.shape:
            return _mixed(query, first, second, unseen)  # type: ignore[arg-type]
    every = [one for k in keys for one in (k.apart() if isinstance(k, SharedKeyValue) else (k,))]
    shapes = [own, *(k.shape for k in every)]
    full = max(b for b, _ in shapes), max(c for _, c in shapes)
    small = any(isinstance(k, LowRankKeyValue) or k.shape != full for k in every)
    # Scores, their softmax and one copy, against keys and values: 3 heads n < 2 heads d.
    if small and few:
        return _by_part(query, every, unseen, full)
    return _fused(query.expand(*full, -1, -1, -1), [k.dense() for k in every], unseen)


def _mixed(
    query: Tensor, own: KeyValue, shared: SharedKeyValue, unseen: Tensor | None
) -> Float[Tensor, "b c heads n d"]:
    table, rows = shared.table, shared.rows.to(query.dtype)
    tensors = query, own.stacked, table.stacked.flatten(1, 3), rows
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = MixedAttention.apply(*tensors, unseen)
    return out


def _fused(query: Tensor, keys: Sequence[KeyValue], unseen: Tensor | None) -> Tensor:
    batch, classes, heads, n, width = query.shape

    every = [k.stacked.expand(-1, batch, classes, -1, -1, -1) for k in keys]
    key, value = torch.cat(every, dim=4).reshape(2, batch, classes * heads, -1, width).unbind()
    mask = None
    if unseen is not None:
        mask = ~unseen[:, None].expand(classes, heads, -1, -1).flatten(0, 1)[None]
    query = query.reshape(batch, classes * heads, n, width)
    # PyTorch's kernel for CPUs takes 2 to 7 times as long back through few queries in bf16.
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and n <= FEW:
        with torch.autocast("cpu", enabled=False):
            query, key, value = query.float(), key.float(), value.float()
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).bfloat16()
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.reshape(batch, classes, heads, n, width)


def _by_part(
    query: Tensor, keys: Sequence[Keys], unseen: Tensor | None, full: tuple[int, int]
) -> Tensor:
    query = query * query.shape[-1] ** -0.5
    common = [k.shared for k in keys if k.shared is not None]
    together = KeyValue.of(common) if common else None
    pieces = _scores(query, keys, together)
    scores = torch.cat([p.expand(*full, -1, -1, -1) for p in pieces], dim=-1)
    if unseen is not None:
        scores = scores.masked_fill(unseen[:, None], -torch.inf)
    weights = scores.softmax(dim=-1).split([p.shape[-1] for p in pieces], dim=-1)
    parts = [k.summed(w) for w, k in zip(weights, keys, strict=True)]
    out = [own for _, own in parts if own is not None]
    if together is not None:
        inner = [w for w, _ in parts if w is not None]
        out.append(together.sums(torch.cat(inner, dim=-1)))
    return functools.reduce(torch.add, out)


def _scores(query: Query, keys: Sequence[Keys], together: KeyValue | None) -> list[Scores]:
    shared: Iterator[Scores] = iter(())
    if together is not None:
        sizes = [k.shared.key.shape[3] for k in keys if k.shared is not None]
        shared = iter(together.products(query).split(sizes, dim=-1))
    return [k.scores(query, None if k.shared is None else next(shared)) for k in keys]


def _product(left: str, a: Tensor, right: str, b: Tensor, out: str) -> Tensor:
    """An einsum whose second operand drops the batch and class dimensions it does not have."""
    for axis, letter in ((1, "c"), (0, "b")):
        if b.shape[axis] == 1 and a.shape[axis] != 1:
            b = b.squeeze(axis)
        else:
            right = letter + right
    return torch.einsum(f"{left},{right}->{out}", a, b)
