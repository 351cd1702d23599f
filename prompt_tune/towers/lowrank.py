"""Prompt rows that stay coordinates in a small basis, through LayerNorm and the key projection.

A row of width w is given by E coordinates, E far below w, in a basis that all rows share. It may
add a vector of its position p times a factor of its own, and a shift that is the same for all:

    x = c basis + f offset[p] + shift

Every affine map keeps that form, and so does LayerNorm. With C the centring of the w components,
and the shift, where there is one, as a further vector of the basis,

    |C x|^2 / w = c G c^T + 2 f c g[p] + f^2 |C offset[p]|^2 / w,
    G = (C basis) (C basis)^T / w,   g[p] = (C basis) (C offset[p])^T / w,
    s = (|C x|^2 / w + eps)^(-1/2)                                   one number a row
    LN(x) = (s c) (gamma * C basis) + s f (gamma * C offset[p]) + beta.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prompt_tune.towers.parts import Part, Stream


@dataclass(frozen=True, eq=False)
class LowRank:
    """The rows of some parts, in coordinates.

    Coordinates and basis are in float32 or more, whatever the tower's precision: they are small,
    and the length of a row comes from them.

    Args:
        rows: the coordinates, `[b, size, E]`; where there is an offset, its factor is behind them.
        basis: what the coordinates count.
        dtype: the tower's, in which rows are written out.
        offset: a vector for each position of the sequence.
        shift: a vector that every row has.
        known: a norm, and what it makes of these rows.
        written: what `table` gives, where it is known.
    """

    rows: Stream
    basis: Float[Tensor, "e width"]
    dtype: torch.dtype
    offset: Float[Tensor, "positions width"] | None = None
    shift: Float[Tensor, "width"] | None = None
    known: tuple[nn.LayerNorm, "LowRank"] | None = None
    written: Float[Tensor, "b classes longest e"] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the rows are."""
        return self.rows.parts

    @property
    def batch(self) -> int:
        """1 where no row depends on the image."""
        return self.rows.batch

    @property
    def coordinates(self) -> Float[Tensor, "b size e"]:
        """Those in the basis, without the factor of the offset."""
        return self.rows.x[..., : self.basis.shape[0]]

    @property
    def factor(self) -> Float[Tensor, "b size f"]:
        """How often every row has the offset of its position; of width 0 without offset."""
        return self.rows.x[..., self.basis.shape[0] :]

    def only(self, names: Collection[str]) -> "LowRank":
        """The rows of some of the parts."""
        rows = self.rows.only(names)
        return self if rows is self.rows else replace(self, rows=rows, known=None, written=None)

    def table(self) -> Float[Tensor, "b classes longest e"]:
        """Coordinates, a one for the shift and the factor of every row; see `Stream.table`."""
        if self.written is not None:
            return self.written
        one = torch.ones_like(self.rows.x[..., :1])
        every = torch.cat([self.coordinates, one, self.factor], dim=-1)
        return Stream(every, self.parts).table()

    def dense(self) -> Stream:
        """The rows written out, for where their own outputs are needed."""
        x = self.coordinates @ self.basis
        if self.offset is not None:
            x = x + self.factor * self.offset[self.rows.positions()]
        if self.shift is not None:
            x = x + self.shift
        return Stream(x.to(self.dtype), self.parts)

    def plus(self, offset: Float[Tensor, "positions width"]) -> "LowRank":
        """The rows, without offset so far, with that of their position added."""
        x = torch.cat([self.rows.x, torch.ones_like(self.rows.x[..., :1])], dim=-1)
        offset = offset[: max(p.end for p in self.parts)].to(self.basis.dtype)
        return replace(self, rows=Stream(x, self.parts), offset=offset)

    def normed(self, norm: nn.LayerNorm) -> "LowRank":
        """LayerNorm of every row."""
        if self.known is not None and self.known[0] is norm:
            return self.known[1]
        with torch.autocast(self.basis.device.type, enabled=False):
            return self._normed(norm)

    def _normed(self, norm: nn.LayerNorm) -> "LowRank":
        c, factor, basis, offset = self.coordinates, self.factor, self.basis, self.offset
        gamma, beta = norm.weight.to(basis.dtype), norm.bias.to(basis.dtype)
        if self.shift is not None:
            basis = torch.cat([basis, self.shift[None]])
            c = torch.cat([c, torch.ones_like(c[..., :1])], dim=-1)
        basis = basis - basis.mean(dim=1, keepdim=True)
        square = (c @ (basis @ basis.T) * c).sum(dim=-1, keepdim=True)
        if offset is not None:
            at = self.rows.positions()
            offset = offset - offset.mean(dim=1, keepdim=True)
            cross = (c * (offset @ basis.T)[at]).sum(dim=-1, keepdim=True)
            square = square + factor * (2 * cross + factor * offset.square().sum(dim=1)[at, None])
            offset = gamma * offset
        # Rounding may leave the square of a row that is nearly constant below zero.
        scale = (square.clamp(min=0) / basis.shape[1] + norm.eps).rsqrt()
        rows = Stream(scale * torch.cat([c, factor], dim=-1), self.parts)
        return LowRank(rows, gamma * basis, self.dtype, offset, beta)


def normed_together(
    c: Float[Tensor, "k b size r"],
    basis: Float[Tensor, "k r width"],
    parts: tuple[Part, ...],
    dtype: torch.dtype,
    norms: Sequence[nn.LayerNorm],
) -> list[LowRank]:
    """Rows without offset and shift, each of whose `k` sets goes through a norm of its own.

    All sets are normed at once; every set remembers what its norm makes of it. The norms have one
    epsilon.
    """
    with torch.autocast(basis.device.type, enabled=False):
        gamma = torch.stack([norm.weight for norm in norms])[:, None].to(basis.dtype)
        beta = [norm.bias.to(basis.dtype) for norm in norms]
        centred = basis - basis.mean(dim=2, keepdim=True)
        gram = centred @ centred.transpose(1, 2)
        square = ((c.flatten(1, 2) @ gram).view_as(c) * c).sum(dim=-1, keepdim=True)
        scaled = (square.clamp(min=0) / basis.shape[2] + norms[0].eps).rsqrt() * c
        every = F.pad(scaled, (0, 1), value=1.0).flatten(0, 1)
        tables = Stream(every, parts).table().unflatten(0, c.shape[:2]).unbind()
        each = zip(
            c.unbind(), basis.unbind(), scaled.unbind(), (gamma * centred).unbind(), strict=True
        )
        return [
            LowRank(
                Stream(x, parts),
                b,
                dtype,
                known=(n, LowRank(Stream(y, parts), g, dtype, None, shift, written=table)),
            )
            for (x, b, y, g), table, n, shift in zip(each, tables, norms, beta, strict=True)
        ]
