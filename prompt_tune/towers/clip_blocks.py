"""open_clip's own transformer block, taken apart; CLIP's text and image towers are made of it."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from cache.errors import ModelError


class ClipBlock:
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.heads = int(block.attn.num_heads)

    def enter(self, x: Tensor) -> Tensor:
        """The normalised input."""
        return self.block.ln_1(x)

    def query(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        """Query projection."""
        return self._project(entered, slice(None, entered.shape[-1]))

    def key_value(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n 2w"]:
        """Key projection, then value projection."""
        return self._project(entered, slice(entered.shape[-1], None))

    def close(self, x: Float[Tensor, "b n w"], attended: Float[Tensor, "b n w"]) -> Tensor:
        """The block's output from its input and the attended values."""
        x = x + self.block.ls_1(self.block.attn.out_proj(attended))
        return x + self.block.ls_2(self.block.mlp(self.block.ln_2(x)))

    def _project(self, x: Tensor, rows: slice) -> Tensor:
        bias = self.block.attn.in_proj_bias
        weight = self.block.attn.in_proj_weight[rows]
        return F.linear(x, weight, None if bias is None else bias[rows])


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
