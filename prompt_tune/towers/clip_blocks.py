"""open_clip's own transformer block, taken apart; CLIP's text and image towers are made of it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cache.errors import ModelError

_QUICK = 1.702


class _QuickGelu(torch.autograd.Function):
    """`x sigmoid(1.702 x) = silu(1.702 x) / 1.702`, which keeps its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * _QUICK, inplace=True).div_(_QUICK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, x * _QUICK)


class ClipBlock:
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.heads = int(block.attn.num_heads)
        self.norm: nn.LayerNorm | None = block.ln_1

    def query(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        """Query projection."""
        return self._project(entered, slice(None, entered.shape[-1]))

    def key_value(
        self, entered: Float[Tensor, "b n w"], *, bias: bool = True
    ) -> Float[Tensor, "b n 2w"]:
        """Key projection, then value projection, with or without their biases."""
        return self._project(entered, slice(entered.shape[-1], None), bias=bias)

    def close(self, x: Float[Tensor, "b n w"], attended: Float[Tensor, "b n w"]) -> Tensor:
        """The block's output from its input and the attended values."""
        x = x + self.block.ls_1(self.block.attn.out_proj(attended))
        return x + self.block.ls_2(self._mlp(self.block.ln_2(x)))

    def _mlp(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        mlp = self.block.mlp
        if type(mlp.gelu) is not QuickGELU:
            return mlp(x)
        hidden: Tensor = _QuickGelu.apply(mlp.c_fc(x))
        return mlp.c_proj(hidden)

    def _project(self, x: Tensor, rows: slice, *, bias: bool = True) -> Tensor:
        attention = self.block.attn
        added = attention.in_proj_bias if bias else None
        return F.linear(x, attention.in_proj_weight[rows], None if added is None else added[rows])


def clip_blocks(transformer: nn.Module, tower: str) -> Sequence[ClipBlock]:
    """The blocks of an open_clip transformer.

    Raises:
        ModelError: they are of another kind.
    """
    blocks = list(getattr(transformer, "resblocks", ()))
    for block in blocks:
        if type(block) is not ResidualAttentionBlock:
            raise ModelError(
                f"this backbone's {tower} tower is built of blocks that are not supported",
                found=type(block).__name__,
                wanted=ResidualAttentionBlock.__name__,
            )
    return [ClipBlock(block) for block in blocks]
