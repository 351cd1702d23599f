"""Dropout on rows of a language model's width, at the memory of their coordinates.

A row is `h + R delta`. Its D elements are dropped one by one and the rest divided by 1 - p, so the
row has to be built: for a moment, and again in the backward, but it is never kept.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class DroppedProjection(torch.autograd.Function):
    """`A (m * (h + R delta))` of several stages; rows of width D are rebuilt in the backward.

    `kept` is the mask m, or the seed to draw it from with odds `dropout`; nothing is divided by
    1 - p here.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        h: Float[Tensor, "rows width"],
        delta: Float[Tensor, "stages rows batch rank"],
        rotation: Float[Tensor, "stages width rank"],
        down: Float[Tensor, "stages rank width"],
        dropout: float,
        kept: Tensor | int,
    ) -> Float[Tensor, "stages rows batch rank"]:
        """The dropped rows in the coordinates of `down`."""
        ctx.dropout, ctx.kept = dropout, kept
        ctx.save_for_backward(h, delta, rotation, down)
        mask = DroppedProjection._mask(ctx, h, delta)
        x = DroppedProjection._dropped(h, delta, rotation, mask)
        return torch.bmm(x, down.transpose(1, 2)).view_as(delta)

    @staticmethod
    def _mask(ctx: Any, h: Tensor, delta: Tensor) -> Tensor:
        if isinstance(ctx.kept, Tensor):
            return ctx.kept
        return draw_kept((*delta.shape[:3], h.shape[1]), ctx.dropout, ctx.kept, h.device)

    @staticmethod
    def _dropped(
        h: Tensor, delta: Tensor, rotation: Tensor, mask: Tensor
    ) -> Float[Tensor, "stages rows*batch width"]:
        x = torch.bmm(delta.flatten(1, 2), rotation.transpose(1, 2))
        x.view(mask.shape).add_(h[:, None]).mul_(mask)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of delta, rotation and down."""
        h, delta, rotation, down = ctx.saved_tensors
        mask = DroppedProjection._mask(ctx, h, delta)
        x = DroppedProjection._dropped(h, delta, rotation, mask)
        grad = grad.flatten(1, 2)
        grad_down = torch.bmm(grad.transpose(1, 2), x)
        inner = torch.bmm(grad, down, out=x)
        inner.view(mask.shape).mul_(mask)
        # Products of long rows: several times as fast as with the long dimension first.
        grad_rotation = torch.bmm(delta.flatten(1, 2).transpose(1, 2), inner).transpose(1, 2)
        across = rotation.transpose(1, 2).contiguous().transpose(1, 2)
        grad_delta = torch.bmm(inner, across).view_as(delta)
        return None, grad_delta, grad_rotation, grad_down, None, None
