"""Conditional low-rank interventions on frozen hidden rows, and their projection to prompt tokens.

With h a row of width D, v the image feature and r the rank (CILMP, Du et al. 2025; its ancestor is
LoReFT, `h + R^T (W h + b - R h)`, Wu et al. 2024, eq. 2, in pyreft):

    m  = U2 (U1 v + b1) + b2                        two linear maps, no activation between
    h' = Dropout(h + R (W [h; m * h] + b - R^T h))  on the first and the last rows of a class
    t  = B (A h')                                   on every row, h' = h for those between

Computed without anything of width D per image. With z = U1 v + b1 and W = [W1 | W2],

    delta = W [h; m * h] + b - R^T h = k + K z,  k = (W1 + W2 diag(b2) - R^T) h + b,
                                                 K = W2 diag(h) U2
    A h'  = A h + (A R) delta

is affine in z, and k, K, A h, A R do not depend on the image. K is linear in h,

    K[o, i] = sum_d (W2[o, d] U2[d, i]) h[d],

so that one product of the rows with the tables of all stages gives every k and K. Dropout falls on
the D elements of h': training builds them, some stages of a group at a time (`row_dropout`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prompt_tune.row_dropout import DroppedProjection

BUILT = {"cpu": 2**22, "cuda": 2**29}
"""Bytes of intervened rows that dropout builds at a time; a CPU is faster inside its caches."""


class Projection(nn.Module):
    """`t = B (A h)`: low-rank, without bias, scale or residual."""

    def __init__(self, source: int, width: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, source))
        self.B = nn.Parameter(torch.empty(width, rank))
        nn.init.uniform_(self.A, -(source**-0.5), source**-0.5)
        nn.init.uniform_(self.B, -(rank**-0.5), rank**-0.5)


class Intervention(nn.Module):
    """One conditional low-rank intervention, shared by the rows of a group and by all classes.

    `R` starts with orthonormal columns and, unlike in pyreft, is not kept so: the published code
    does not constrain it. The others start as `torch.nn.Linear` does.

    Args:
        source: width D of the hidden rows.
        rank: r.
        image_width: width of the image feature; None leaves the image out, and then `W` acts on
            h alone and U1, b1, U2, b2 do not exist.
        precision: of W, b, U1, b1, U2, b2 as parameters; the computation is in that of the rows.
    """

    def __init__(
        self,
        source: int,
        rank: int,
        image_width: int | None,
        *,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.conditional = image_width is not None
        self.R = nn.Parameter(torch.empty(source, rank))
        nn.init.orthogonal_(self.R)
        self.W, self.b = _linear(2 * source if self.conditional else source, rank, precision)
        if image_width is not None:
            self.U1, self.b1 = _linear(image_width, rank, precision)
            self.U2, self.b2 = _linear(rank, source, precision)


def _linear(inputs: int, outputs: int, precision: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
    start = nn.Linear(inputs, outputs)
    return nn.Parameter(start.weight.data.to(precision)), nn.Parameter(
        start.bias.data.to(precision)
    )


@dataclass(frozen=True)
class Changes:
    """`delta = k + K z` of each stage, in the coordinates of its `R`, up to the image.

    Attributes:
        k: `[stages, rows, rank]`.
        turned: K, `[stages, rows * rank, rank]`, and U1 and b1 of all stages; None without image.
    """

    k: Tensor
    turned: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(
        cls,
        group: Sequence[Intervention],
        h: Float[Tensor, "rows width"],
        rotation: Float[Tensor, "stages width rank"],
    ) -> Self:
        """Of the interventions of one group, one for each stage, on all of its rows."""
        dtype, width = h.dtype, h.shape[1]

        def all_stages(name: str) -> Tensor:
            return stacked([getattr(one, name).to(dtype) for one in group])

        w, b, rotation = all_stages("W"), all_stages("b"), rotation.to(dtype).transpose(1, 2)
        if not group[0].conditional:
            return cls(mapped(h, w - rotation) + b[:, None], None)
        w1, w2 = w.split(width, dim=-1)
        fixed = w1 + w2 * all_stages("b2")[:, None] - rotation
        table = (w2[:, :, None] * all_stages("U2").transpose(1, 2)[:, None]).flatten(1, 2)
        rank = w.shape[1]
        k, turned = mapped(h, torch.cat([fixed, table], dim=1)).split([rank, rank**2], dim=-1)
        u1, b1 = all_stages("U1").flatten(0, 1), all_stages("b1").flatten()
        return cls(k + b[:, None], (turned.reshape(len(group), -1, rank), u1, b1))

    def given(self, v: Float[Tensor, "batch image"]) -> Float[Tensor, "stages rows #batch rank"]:
        """The changes for each image; batch 1 unconditioned."""
        if self.turned is None:
            return self.k[:, :, None]
        turned, u1, b1 = self.turned
        z = F.linear(v, u1, b1).unflatten(1, (len(turned), -1)).permute(1, 2, 0)
        moved = (turned @ z).unflatten(1, self.k.shape[1:])
        return self.k[:, :, None] + moved.transpose(2, 3)


@dataclass(frozen=True)
class Fixed:
    """`A h'` of each stage without dropout, up to the image: nothing of it has the rows' width.

    Attributes:
        inner: A R, `[stages, rank, rank]`.
        changes: delta, up to the image.
        base: A h, `[stages, rows, rank]`.
    """

    inner: Tensor
    changes: Changes
    base: Tensor

    @classmethod
    def of(
        cls,
        group: Sequence[Intervention],
        h: Float[Tensor, "rows width"],
        down: Float[Tensor, "stages rank width"],
    ) -> Self:
        """Of the interventions of one group, one for each stage, on all of its rows."""
        rotation = stacked([one.R for one in group])
        return cls(down @ rotation, Changes.of(group, h, rotation), mapped(h, down))

    def rows(self, v: Float[Tensor, "batch image"]) -> Float[Tensor, "stages rows #batch rank"]:
        """The coordinates of the rows for each image; batch 1 unconditioned."""
        delta = self.changes.given(v)
        moved = (delta.flatten(1, 2) @ self.inner.transpose(1, 2)).view_as(delta)
        return self.base[:, :, None] + moved


def project_dropped(
    group: Sequence[Intervention],
    h: Float[Tensor, "rows width"],
    v: Float[Tensor, "batch image"],
    down: Float[Tensor, "stages rank width"],
    dropout: float,
    *,
    kept: Sequence[Tensor | None] | None = None,
) -> list[Float[Tensor, "rows batch rank"]]:
    """`A h'` with dropout on every element of h', for each stage, image, class and row anew.

    As many stages are taken at once, or rows of one, as `BUILT` allows. Without `kept`, the masks
    of each such block are drawn from a seed that torch's global generator gives: they depend on the
    sizes and the kind of device, not on the memory there is.
    """
    rotation = stacked([one.R for one in group])
    delta = Changes.of(group, h, rotation).given(v).expand(-1, -1, len(v), -1)
    most = BUILT.get(h.device.type, 2**29) // (len(v) * h.shape[1] * h.element_size())
    some, own = max(1, most // len(h)), max(1, most)
    found: list[Tensor] = []
    tables = zip(
        *(_split(x, some, 0) for x in (delta, rotation, down / (1 - dropout))), strict=True
    )
    for k, (moves, turn, onto) in enumerate(tables):
        parts = []
        for i, (rows, move) in enumerate(zip(h.split(own), _split(moves, own, 1), strict=True)):
            mask: Tensor | int = int(torch.randint(2**62, ())) if kept is None else 0
            if kept is not None:
                given = [_given(one, h, v).split(own)[i] for one in kept[k * some : (k + 1) * some]]
                mask = torch.stack(given)
            args = rows, move.contiguous(), turn, onto, dropout, mask
            parts.append(DroppedProjection.apply(*args))
        found += (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).unbind()
    return found


def _split(x: Tensor, size: int, dim: int) -> Sequence[Tensor]:
    """`x` in pieces; itself where it is one."""
    return (x,) if x.shape[dim] <= size else x.split(size, dim=dim)


def _given(kept: Tensor | None, h: Tensor, v: Tensor) -> Bool[Tensor, "rows batch width"]:
    assert kept is not None  # noqa: S101 - masks are given for all stages that have rows
    return kept.reshape(len(h), len(v), -1)


def stacked(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters of all stages; their gradients are brought in order at once."""
    joined = torch.stack(list(parameters))
    return joined.flatten().view_as(joined)


def mapped(
    h: Float[Tensor, "rows width"], tables: Float[Tensor, "stages q width"]
) -> Float[Tensor, "stages rows q"]:
    """`table h` for the tables of all stages, in one product."""
    flat = h @ tables.flatten(0, 1).T
    return flat.unflatten(1, (len(tables), -1)).transpose(0, 1)
