"""open_clip's own vision transformer."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from cache.errors import ModelError
from prompt_tune.towers.clip_blocks import clip_blocks
from prompt_tune.towers.image import CLASS, PATCHES, ImageTower


class VitImageTower(ImageTower):
    """open_clip's `VisionTransformer`, read at its class token or averaged over its patches.

    Raises:
        ModelError: it pools by attention, or does not pool.
    """

    def __init__(self, visual: Any) -> None:
        super().__init__(visual, visual.image_size)
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            found = "attention" if visual.attn_pool is not None else repr(visual.pool_type)
            raise ModelError(
                "this backbone's image tower is not supported",
                found=f"{type(visual).__name__} with pooling {found}",
                wanted="pooling 'tok' or 'avg'",
            )
        self.visual = visual
        self.blocks = clip_blocks(visual.transformer, "image")
        self.width = int(visual.class_embedding.shape[0])
        self.embed_dim = self.width if visual.proj is None else int(visual.proj.shape[1])
        self.reads = frozenset({CLASS if visual.pool_type == "tok" else PATCHES})

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return int(self.visual.positional_embedding.shape[0])

    def _embed(self, images: Tensor) -> Float[Tensor, "batch length width"]:
        return self.visual._embeds(images)

    def _norm_first(self, prompts: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        return self.visual.ln_pre(prompts)

    def _pool(self, x: Float[Tensor, "batch read width"]) -> Float[Tensor, "batch embed"]:
        if self.visual.final_ln_after_pool:
            x = self.visual.ln_post(x.mean(dim=1))
        else:
            x = self.visual.ln_post(x).mean(dim=1)
        return x if self.visual.proj is None else x @ self.visual.proj
