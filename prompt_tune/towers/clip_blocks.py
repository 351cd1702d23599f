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
from prompt_tune.towers.frozen import linear, low

_QUICK = 1.702


class _QuickMlp(torch.autograd.Function):
    """Two frozen linear maps around `x sigmoid(1.702 x) = silu(1.702 x) / 1.702`.

    Keeps the scaled input of `silu` only. Both scales go into the products, and cancel in the
    gradient.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        x: Float[Tensor, "b n w"],
        first: Float[Tensor, "m w"],
        first_bias: Float[Tensor, "m"],
        second: Float[Tensor, "w m"],
        second_bias: Float[Tensor, "w"],
    ) -> Tensor:
        """The second map's output."""
        flat = x.flatten(0, 1)
        scaled = torch.addmm(first_bias, flat, first.T, beta=_QUICK, alpha=_QUICK)
        ctx.save_for_backward(scaled, first, second)
        out = torch.addmm(second_bias, F.silu(scaled), second.T, alpha=1 / _QUICK)
        return out.view(*x.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        scaled, first, second = ctx.saved_tensors
        inner = torch.ops.aten.silu_backward(grad.flatten(0, 1) @ second, scaled)
        return (inner @ first).view(*grad.shape[:2], -1), None, None, None, None


class ClipBlock:
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.heads = int(block.attn.num_heads)
        self.hidden = int(block.mlp.c_fc.out_features)
        self.norm: nn.LayerNorm | None = block.ln_1

    def query(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        """Query projection."""
        return self._project(entered, slice(None, entered.shape[-1]))

    def key_value(
        self, entered: Float[Tensor, "b n w"], *, bias: bool = True
    ) -> Float[Tensor, "b n 2w"]:
        """Key projection, then value projection, with or without their biases."""
        return self._project(entered, slice(entered.shape[-1], None), bias=bias)

    def query_key_value(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n 3w"]:
        """Query, key and value projections, in this order."""
        return self._project(entered, slice(None))

    def close(self, x: Float[Tensor, "b n w"], attended: Float[Tensor, "b n w"]) -> Tensor:
        """The block's output from its input and the attended values."""
        return self.closing(self.block, x, attended)

    @staticmethod
    def closing(
        block: Any, x: Float[Tensor, "b n w"], attended: Float[Tensor, "b n w"]
    ) -> Float[Tensor, "b n w"]:
        """The same of any block's module."""
        x = x + block.ls_1(linear(attended, block.attn.out_proj))
        return x + block.ls_2(ClipBlock._mlp(block.mlp, block.ln_2(x)))

    @staticmethod
    def _mlp(mlp: Any, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        first, second = mlp.c_fc, mlp.c_proj
        trained = first.weight.requires_grad
        if type(mlp.gelu) is not QuickGELU or trained or torch.compiler.is_compiling():
            return mlp(x)
        weights = [low(w) for w in (first.weight, first.bias, second.weight, second.bias)]
        out: Tensor = _QuickMlp.apply(x.to(weights[0].dtype), *weights)
        return out

    def _project(self, x: Tensor, rows: slice, *, bias: bool = True) -> Tensor:
        attention = self.block.attn
        added = low(attention.in_proj_bias)[rows] if bias else None
        return F.linear(x, low(attention.in_proj_weight)[rows], added)


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
