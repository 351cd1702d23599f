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

is affine in z, and k, K, A h, A R do not depend on the image. Dropout falls on the D elements of
h', so training has to build them: one stage and group at a time, again in the backward, never kept.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prompt_tune.towers import Stage

Kept = Bool[Tensor, "classes rows batch width"]
"""Elements that dropout keeps; a float tensor of zeros and ones does as well."""


def draw_kept(shape: tuple[int, ...], dropout: float, seed: int, device: torch.device) -> Tensor:
    """A keep-mask that is a function of `seed`: each element is dropped with odds `dropout`.

    Four elements share one random 64-bit word, which costs a quarter of `bernoulli_`.

    Differs: the odds are rounded to a multiple of 2^-16 (0.1 becomes 0.100006).
    """
    count = math.prod(shape)
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    kept = words.view(torch.int16) >= round(dropout * 2**16) - 2**15
    return kept[:count].view(shape)


class _DroppedProjection(torch.autograd.Function):
    """`A Dropout(h + R delta)`; the row of width D is rebuilt in the backward.

    `kept` is a mask, or the seed to draw it from.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        h: Float[Tensor, "rows width"],
        delta: Float[Tensor, "rows batch rank"],
        rotation: Float[Tensor, "width rank"],
        down: Float[Tensor, "rank width"],
        dropout: float,
        kept: Tensor | int,
    ) -> Tensor:
        ctx.dropout, ctx.kept = dropout, kept
        ctx.save_for_backward(h, delta, rotation, down)
        mask = _DroppedProjection._mask(ctx, h, delta)
        return _DroppedProjection._dropped(h, delta, rotation, mask, dropout) @ down.T

    @staticmethod
    def _mask(ctx: Any, h: Tensor, delta: Tensor) -> Tensor:
        if isinstance(ctx.kept, Tensor):
            return ctx.kept
        shape = (len(h), delta.shape[1], h.shape[1])
        return draw_kept(shape, ctx.dropout, ctx.kept, h.device)

    @staticmethod
    def _dropped(h: Tensor, delta: Tensor, rotation: Tensor, mask: Tensor, p: float) -> Tensor:
        x = delta @ rotation.T
        return x.add_(h[:, None]).mul_(mask).div_(1 - p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, delta, rotation, down = ctx.saved_tensors
        mask = _DroppedProjection._mask(ctx, h, delta)
        x = _DroppedProjection._dropped(h, delta, rotation, mask, ctx.dropout)
        grad_down = grad.flatten(0, 1).T @ x.flatten(0, 1)
        inner = torch.matmul(grad, down, out=x).mul_(mask).div_(1 - ctx.dropout)
        grad_rotation = inner.flatten(0, 1).T @ delta.flatten(0, 1)
        return None, inner @ rotation, grad_rotation, grad_down, None, None


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

    def delta(
        self, h: Float[Tensor, "rows width"], v: Float[Tensor, "batch image"]
    ) -> Float[Tensor, "rows #batch rank"]:
        """`k + K z`, the change of each row in the coordinates of `R`; batch 1 unconditioned."""
        dtype, width = h.dtype, h.shape[1]
        w, b = self.W.to(dtype), self.b.to(dtype)
        if not self.conditional:
            return F.linear(h, w - self.R.T, b)[:, None]
        u2 = self.U2.to(dtype)
        z = F.linear(v, self.U1.to(dtype), self.b1.to(dtype))
        fixed = F.linear(h, w[:, :width] + w[:, width:] * self.b2.to(dtype) - self.R.T, b)
        # K = W2 diag(h) U2 is linear in h: one product for all rows.
        table = (w[:, None, width:] * u2.T).flatten(0, 1)
        turned = (h @ table.T).unflatten(1, (len(w), -1))
        return fixed[:, None] + z @ turned.transpose(1, 2)

    def project(
        self,
        h: Float[Tensor, "rows width"],
        v: Float[Tensor, "batch image"],
        down: Float[Tensor, "rank width"],
    ) -> Float[Tensor, "rows #batch rank"]:
        """`A h'` without dropout: nothing of the rows' width is built per image."""
        return (h @ down.T)[:, None] + self.delta(h, v) @ (down @ self.R).T

    def project_dropped(
        self,
        h: Float[Tensor, "rows width"],
        v: Float[Tensor, "batch image"],
        down: Float[Tensor, "rank width"],
        dropout: float,
        kept: Bool[Tensor, "rows batch width"] | None = None,
    ) -> Float[Tensor, "rows batch rank"]:
        """`A h'` with dropout on every element of h', for each image, class and row anew.

        Without `kept`, the mask is drawn from a seed that comes from torch's global generator.
        """
        delta = self.delta(h, v).expand(-1, len(v), -1).contiguous()
        mask = int(torch.randint(2**62, ())) if kept is None else kept
        out: Tensor = _DroppedProjection.apply(h, delta, self.R, down, dropout, mask)
        return out


def _linear(inputs: int, outputs: int, precision: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
    start = nn.Linear(inputs, outputs)
    return nn.Parameter(start.weight.data.to(precision)), nn.Parameter(
        start.bias.data.to(precision)
    )


@dataclass(frozen=True)
class Sizes:
    """Sizes of a prompt stage.

    Attributes:
        source: width of the hidden rows.
        text: width of the text tower.
        image: width of the image feature, or None for interventions that do not read it.
        context: number of context tokens.
        prefix: how many of a class's first rows are intervened.
        suffix: how many of its last rows.
        rank: of interventions and projection.
    """

    source: int
    text: int
    image: int | None
    context: int
    prefix: int
    suffix: int
    rank: int


class Rows(nn.Module):
    """The frozen hidden rows of all classes, apart by group; they follow the module's device.

    Args:
        values: per class, `[rows, width]`, at least `prefix + suffix` rows each.
        prefix: rows of the first group.
        suffix: rows of the last group.
    """

    prefix: Float[Tensor, "classes*prefix width"]
    suffix: Float[Tensor, "classes*suffix width"]
    middle: Float[Tensor, "rows width"]

    def __init__(self, values: tuple[Tensor, ...], prefix: int, suffix: int) -> None:
        super().__init__()
        self.classes = len(values)
        ends = [len(h) - suffix for h in values]
        for name, parts in (
            ("prefix", [h[:prefix] for h in values]),
            ("suffix", [h[n:] for h, n in zip(values, ends, strict=True)]),
            ("middle", [h[prefix:n] for h, n in zip(values, ends, strict=True)]),
        ):
            self.register_buffer(name, torch.cat(parts), persistent=False)


class PromptStage(nn.Module):
    """The prompt tokens at one block's input: context, and the class's rows where there are any.

    A stage has parameters of its own and shares them between all classes. Every stage starts again
    from the same frozen rows, not from the output of the stage before.
    """

    def __init__(
        self, sizes: Sizes, *, rows: bool = True, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.empty(sizes.context, sizes.text))
        nn.init.normal_(self.context, std=0.02)
        self.prefix = self.suffix = self.projection = None
        if rows:
            new = (sizes.source, sizes.rank, sizes.image)
            if sizes.prefix:
                self.prefix = Intervention(*new, precision=precision)
            if sizes.suffix:
                self.suffix = Intervention(*new, precision=precision)
            self.projection = Projection(sizes.source, sizes.text, sizes.rank)

    def forward(
        self,
        rows: Rows | None,
        v: Float[Tensor, "batch image"],
        *,
        dropout: float = 0.0,
        kept: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Stage:
        """The stage's tokens; with dropout above 0 they are drawn for every image.

        Args:
            rows: the frozen rows, or None.
            v: normalised image features.
            dropout: the rate.
            kept: keep-masks of the prefix and suffix rows instead of drawn ones.
        """
        context = self.context.to(v.dtype)
        if rows is None or self.projection is None:
            return Stage(context)
        down, up = self.projection.A, self.projection.B

        def tokens(group: Intervention | None, h: Tensor, mask: Tensor | None) -> Tensor | None:
            if group is None:
                return None
            if dropout == 0.0:
                low = group.project(h, v, down)
            else:
                mask = None if mask is None else mask.flatten(0, 1)
                low = group.project_dropped(h, v, down, dropout, mask)
            return low.unflatten(0, (rows.classes, -1)).permute(2, 0, 1, 3) @ up.T

        masks = kept or (None, None)
        return Stage(
            context,
            tokens(self.prefix, rows.prefix, masks[0]),
            tokens(self.suffix, rows.suffix, masks[1]),
            (rows.middle @ down.T) @ up.T,
        )
