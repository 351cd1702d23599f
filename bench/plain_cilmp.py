"""CILMP on OpenAI's ViT-B/16 as the method is described, without this project's engine.

The rivals of `bench/tune.py`. All 77 positions of every class and image go through every block,
every knowledge row is built at its full width. `batched` has no loops over images, classes and
rows and uses `scaled_dot_product_attention`; `literal` intervenes image by image and row by row, as
the published code is organised, and is the same everywhere else.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainCilmp:
    """Logits of one batch.

    Args:
        clip: an open_clip `CLIP` with a ViT, frozen.
        parameters: the method's, by the names of `prompt_tune.methods.cilmp`.
        rows: knowledge rows `[classes, rows, D]`.
        tails: per class, the ids of its name, "." and the end token.
        prefix: intervened rows at the beginning, and `suffix` at the end.
    """

    def __init__(
        self,
        clip: nn.Module,
        parameters: Mapping[str, Tensor],
        rows: Tensor,
        tails: Sequence[Sequence[int]],
        *,
        start: int,
        prefix: int,
        suffix: int,
        form: Literal["batched", "literal"] = "batched",
        dropout: float = 0.0,
    ) -> None:
        self.clip, self.p, self.hidden, self.form = clip, parameters, rows, form
        self.prefix, self.suffix, self.dropout = prefix, suffix, dropout
        self.stages = sum(name.endswith(".context") for name in parameters)
        self.visual = sum(name.startswith("visual_prompt.") for name in parameters)
        n = parameters["stage.0.context"].shape[0] + rows.shape[1]
        self.span = (1, 1 + n)
        ids = [[start, *[0] * n, *tail] for tail in tails]
        self.end = torch.tensor([len(one) - 1 for one in ids])
        padded = torch.tensor([[*one, *[0] * (77 - len(one))] for one in ids])
        table = clip.token_embedding
        self.embedded = table(padded.to(table.weight.device)).detach()

    def _block(self, block: nn.Module, x: Tensor, *, causal: bool) -> Tensor:
        attn = block.attn
        qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = (
            part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + attn.out_proj(out.transpose(1, 2).flatten(-2))
        return x + block.mlp(block.ln_2(x))

    def _intervene(self, h: Tensor, v: Tensor, name: str) -> Tensor:
        """`Dropout(h + R (W [h, m(v) h] + b - R^T h))`, `[images, classes, rows, D]`."""
        p = {key.removeprefix(f"{name}."): w for key, w in self.p.items() if key.startswith(name)}
        m = (v @ p["U1"].T + p["b1"]) @ p["U2"].T + p["b2"]

        def one(rows: Tensor, factor: Tensor) -> Tensor:
            steered = factor * rows
            u = torch.cat([rows.expand_as(steered), steered], -1)
            out = rows + (u @ p["W"].T + p["b"] - rows @ p["R"]) @ p["R"].T
            return F.dropout(out, self.dropout, training=self.dropout > 0)

        if self.form == "batched":
            return one(h[None], m[:, None, None])
        images = [torch.stack([one(h[:, i], factor) for i in range(h.shape[1])], 1) for factor in m]
        return torch.stack(images)

    def _prompt(self, stage: int, v: Tensor) -> Tensor:
        """Context and rows of one stage, `[images * classes, positions, width]`."""
        h, name, size = self.hidden, f"stage.{stage}", len(v)
        parts = [
            self._intervene(h[:, : self.prefix], v, f"{name}.prefix"),
            h[None, :, self.prefix : h.shape[1] - self.suffix].expand(size, -1, -1, -1),
            self._intervene(h[:, h.shape[1] - self.suffix :], v, f"{name}.suffix"),
        ]
        a, b = self.p[f"{name}.projection.A"], self.p[f"{name}.projection.B"]
        tokens = torch.cat(parts, 2) @ a.T @ b.T
        context = self.p[f"{name}.context"].expand(size, len(h), -1, -1)
        return torch.cat([context, tokens], 2).flatten(0, 1)

    def image_features(self, images: Tensor) -> Tensor:
        """Normalised features under the visual prompts."""
        tower, size = self.clip.visual, len(images)
        x = tower.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([tower.class_embedding.expand(size, 1, -1), x], 1)
        x = x + tower.positional_embedding
        patches = x.shape[1]
        for k, block in enumerate(tower.transformer.resblocks):
            if k < self.visual:
                prompt = self.p[f"visual_prompt.{k}"].expand(size, -1, -1)
                x = torch.cat([x[:, :patches], prompt], 1)
            if k == 0:
                x = tower.ln_pre(x)
            x = self._block(block, x, causal=False)
        return F.normalize(tower.ln_post(x[:, 0]) @ tower.proj, dim=-1)

    def text_features(self, v: Tensor) -> Tensor:
        """Features of every class for every image, `[images, classes, embed]`, normalised."""
        first, last = self.span
        x = self.embedded.repeat(len(v), 1, 1)
        for k, block in enumerate(self.clip.transformer.resblocks):
            if k < self.stages:
                x = torch.cat([x[:, :first], self._prompt(k, v), x[:, last:]], 1)
            if k == 0:
                x = x + self.clip.positional_embedding
            x = self._block(block, x, causal=True)
        x = self.clip.ln_final(x)[torch.arange(len(x)), self.end.repeat(len(v))]
        return F.normalize(x @ self.clip.text_projection, dim=-1).unflatten(0, (len(v), -1))

    def logits(self, v: Tensor) -> Tensor:
        """Scaled similarities for given image features."""
        return self.clip.logit_scale.exp() * torch.einsum("be,bce->bc", v, self.text_features(v))
