"""timm's vision transformer inside open_clip's `TimmModel`, as in BiomedCLIP."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from cache.errors import ModelError
from prompt_tune.towers.frozen import linear, low
from prompt_tune.towers.image import CLASS, PATCHES, REGISTERS, ImageTower


class TimmBlock:
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`, each with its layer scale."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.heads = int(block.attn.num_heads)
        self.hidden = int(block.mlp.fc1.out_features)
        self.norm: nn.LayerNorm | None = block.norm1

    def query(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        """Query projection."""
        return self._project(entered, slice(None, self.block.attn.attn_dim))

    def key_value(
        self, entered: Float[Tensor, "b n w"], *, bias: bool = True
    ) -> Float[Tensor, "b n 2w"]:
        """Key projection, then value projection, with or without their biases."""
        return self._project(entered, slice(self.block.attn.attn_dim, None), bias=bias)

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
        x = x + block.ls1(linear(block.attn.norm(attended), block.attn.proj))
        return x + block.ls2(TimmBlock._mlp(block.mlp, block.norm2(x)))

    @staticmethod
    def _mlp(mlp: Any, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        if type(mlp) is not Mlp or type(mlp.fc1) is not nn.Linear:
            return mlp(x)
        return linear(mlp.norm(mlp.act(linear(x, mlp.fc1))), mlp.fc2)

    def _project(self, x: Tensor, rows: slice, *, bias: bool = True) -> Tensor:
        qkv = self.block.attn.qkv
        added = qkv.bias if bias else None
        return F.linear(x, low(qkv.weight)[rows], None if added is None else low(added)[rows])


class TimmImageTower(ImageTower):
    """A timm `VisionTransformer`, read at its class token or averaged.

    Raises:
        ModelError: the trunk is another class, its blocks are, or it pools otherwise.
    """

    def __init__(self, visual: Any) -> None:
        super().__init__(visual, visual.image_size)
        trunk = visual.trunk
        _check(trunk)
        self.trunk, self.head = trunk, visual.head
        self.blocks: Sequence[TimmBlock] = [TimmBlock(block) for block in trunk.blocks]
        self.width = int(trunk.embed_dim)
        self.embed_dim = _out(visual)
        counts = {CLASS: int(trunk.has_class_token), REGISTERS: int(trunk.num_reg_tokens)}
        self._counts = {name: n for name, n in counts.items() if n}
        self.prefix = tuple(self._counts)
        if trunk.global_pool == "token":
            self.reads = frozenset({CLASS})
        else:
            with_prefix = self.prefix if trunk.pool_include_prefix else ()
            self.reads = frozenset({PATCHES, *with_prefix})

    @property
    def tokens(self) -> int:
        """Patches and what stands before them."""
        return int(self.trunk.patch_embed.num_patches) + sum(self._prefix_sizes())

    def _prefix_sizes(self) -> tuple[int, ...]:
        return tuple(self._counts.values())

    def _embed(self, images: Tensor) -> Float[Tensor, "batch length width"]:
        x = self.trunk._pos_embed(self.trunk.patch_embed(images))
        return self.trunk.norm_pre(x)

    def _norm_first(self, prompts: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        return self.trunk.norm_pre(prompts)

    def _pool(self, x: Float[Tensor, "batch read width"]) -> Float[Tensor, "batch embed"]:
        pooled = self.trunk.fc_norm(self.trunk.norm(x).mean(dim=1))
        return self.head(self.trunk.head(pooled))


def _check(trunk: Any) -> None:
    if type(trunk) is not VisionTransformer:
        _refuse(type(trunk).__name__)
    if trunk.attn_pool is not None or trunk.global_pool not in ("token", "avg"):
        _refuse(f"{type(trunk).__name__} with pooling {trunk.global_pool!r}")
    for block in trunk.blocks:
        attention: Any = getattr(block, "attn", None)
        if type(block) is not Block or type(attention) is not Attention:
            _refuse(f"{type(block).__name__} with {type(attention).__name__}")
        if not isinstance(attention.q_norm, nn.Identity) or attention.gate is not None:
            _refuse("Attention with normalised queries or a gate")


def _refuse(found: str) -> None:
    raise ModelError(
        "this backbone's image tower is not supported",
        found=f"timm's {found}",
        wanted="a timm VisionTransformer of plain blocks, pooled by 'token' or 'avg'",
    )


def _out(visual: Any) -> int:
    linear = [m for m in visual.head.modules() if isinstance(m, nn.Linear)]
    if linear:
        return int(linear[-1].out_features)
    trunk = visual.trunk
    return int(trunk.head.out_features if isinstance(trunk.head, nn.Linear) else trunk.embed_dim)
