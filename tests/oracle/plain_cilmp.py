"""CILMP as plainly as it can be written: every position of every sequence, in float64.

Nothing of the product is used. Weights come as flat dictionaries under the names of open_clip
(`CLIP`, and `CustomTextCLIP` with a Hugging Face BERT and a timm ViT). One sequence per image and
class, every block computes every position, every intervened row is built at its full width.

Parameters of the method, by name:

    stage.K.context [n, width]            stage.K.projection.A [r, D], .B [width, r]
    stage.K.prefix.R [D, r]  .W [r, 2D] or [r, D]  .b [r]  .U1 [r, e]  .b1 [r]  .U2 [D, r]  .b2 [D]
    stage.K.suffix.*  likewise            visual_prompt.K [n, vision width]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
# masks[stage][0 prefix, 1 suffix][class, position, image, D]: 1 keeps, 0 drops.
Masks = Sequence[Sequence[Tensor]]


def under(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights below `prefix`, in float64."""
    return {k.removeprefix(prefix): v.double() for k, v in weights.items() if k.startswith(prefix)}


def block_count(weights: Weights, prefix: str) -> int:
    return 1 + max(
        int(k.removeprefix(prefix).split(".")[0]) for k in weights if k.startswith(prefix)
    )


def norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None) -> Tensor:
    """Softmax attention over `[n, positions, width]`; `seen[n or 1, query, key]`."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    scores = split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
    return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(-2)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# --- text towers ---------------------------------------------------------------------------------


@dataclass
class CausalText:
    """CLIP's text tower; `weights` as in open_clip's `CLIP`."""

    weights: Weights
    heads: int
    quick: bool = True

    def __post_init__(self) -> None:
        self.w = under({k: v for k, v in self.weights.items() if not k.startswith("visual.")}, "")
        self.depth = block_count(self.w, "transformer.resblocks.")
        self.length = len(self.w["positional_embedding"])

    def tokens(self, ids: Sequence[int]) -> Tensor:
        return self.w["token_embedding.weight"][list(ids)]

    def pad(self, live: Tensor) -> Tensor:
        """To the whole context, with the token 0, as the published code does."""
        return torch.cat([live, self.tokens([0] * (self.length - len(live)))])

    def enter(self, x: Tensor) -> Tensor:
        return x + self.w["positional_embedding"]

    def block(self, k: int, x: Tensor, lengths: Sequence[int]) -> Tensor:
        w = under(self.w, f"transformer.resblocks.{k}.")
        y = norm(x, w, "ln_1", 1e-5)
        q, key, v = F.linear(y, w["attn.in_proj_weight"], w["attn.in_proj_bias"]).chunk(3, -1)
        seen = torch.ones(self.length, self.length, dtype=torch.bool).tril()[None]
        x = x + linear(attention(q, key, v, self.heads, seen), w, "attn.out_proj")
        y = linear(norm(x, w, "ln_2", 1e-5), w, "mlp.c_fc")
        return x + linear(quick_gelu(y) if self.quick else F.gelu(y), w, "mlp.c_proj")

    def pool(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        x = norm(x, self.w, "ln_final", 1e-5)
        end = torch.stack([row[n - 1] for row, n in zip(x, lengths, strict=True)])
        return end @ self.w["text_projection"]


@dataclass
class BertText:
    """A Hugging Face BERT in open_clip's `HFTextEncoder`; pooled by `cls` or `mean`."""

    weights: Weights
    heads: int
    pooler: str
    length: int

    def __post_init__(self) -> None:
        self.w = under(self.weights, "text.")
        self.depth = block_count(self.w, "transformer.encoder.layer.")

    def tokens(self, ids: Sequence[int]) -> Tensor:
        return self.w["transformer.embeddings.word_embeddings.weight"][list(ids)]

    def pad(self, live: Tensor) -> Tensor:
        return torch.cat([live, self.tokens([0] * (self.length - len(live)))])

    def enter(self, x: Tensor) -> Tensor:
        w = under(self.w, "transformer.embeddings.")
        x = (
            x
            + w["position_embeddings.weight"][: self.length]
            + w["token_type_embeddings.weight"][0]
        )
        return norm(x, w, "LayerNorm", 1e-12)

    def block(self, k: int, x: Tensor, lengths: Sequence[int]) -> Tensor:
        w = under(self.w, f"transformer.encoder.layer.{k}.")
        real = torch.arange(self.length) < torch.tensor(lengths)[:, None]
        q, key, v = (linear(x, w, f"attention.self.{n}") for n in ("query", "key", "value"))
        out = linear(attention(q, key, v, self.heads, real[:, None]), w, "attention.output.dense")
        x = norm(x + out, w, "attention.output.LayerNorm", 1e-12)
        y = linear(F.gelu(linear(x, w, "intermediate.dense")), w, "output.dense")
        return norm(x + y, w, "output.LayerNorm", 1e-12)

    def pool(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        if self.pooler == "cls":
            x = x[:, 0]
        else:
            x = torch.stack([row[:n].mean(0) for row, n in zip(x, lengths, strict=True)])
        if "proj.weight" in self.w:
            return linear(x, self.w, "proj")
        return linear(F.gelu(linear(x, self.w, "proj.0")), self.w, "proj.2")


# --- image towers --------------------------------------------------------------------------------


@dataclass
class ClipImage:
    """OpenAI's ViT; `weights` as in open_clip's `CLIP`."""

    weights: Weights
    heads: int
    quick: bool = True

    def __post_init__(self) -> None:
        self.w = under(self.weights, "visual.")
        self.depth = block_count(self.w, "transformer.resblocks.")

    def patches(self, images: Tensor) -> Tensor:
        kernel = self.w["conv1.weight"]
        x = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        first = self.w["class_embedding"].expand(len(x), 1, -1)
        return torch.cat([first, x], 1) + self.w["positional_embedding"]

    def before(self, x: Tensor) -> Tensor:
        return norm(x, self.w, "ln_pre", 1e-5)

    def block(self, k: int, x: Tensor) -> Tensor:
        w = under(self.w, f"transformer.resblocks.{k}.")
        y = norm(x, w, "ln_1", 1e-5)
        q, key, v = F.linear(y, w["attn.in_proj_weight"], w["attn.in_proj_bias"]).chunk(3, -1)
        x = x + linear(attention(q, key, v, self.heads, None), w, "attn.out_proj")
        y = linear(norm(x, w, "ln_2", 1e-5), w, "mlp.c_fc")
        return x + linear(quick_gelu(y) if self.quick else F.gelu(y), w, "mlp.c_proj")

    def pool(self, x: Tensor) -> Tensor:
        return norm(x[:, 0], self.w, "ln_post", 1e-5) @ self.w["proj"]


@dataclass
class TimmImage:
    """A timm ViT with a class token and a linear projection, in open_clip's `TimmModel`."""

    weights: Weights
    heads: int

    def __post_init__(self) -> None:
        self.w = under(self.weights, "visual.")
        self.depth = block_count(self.w, "trunk.blocks.")

    def patches(self, images: Tensor) -> Tensor:
        kernel, bias = (
            self.w["trunk.patch_embed.proj.weight"],
            self.w["trunk.patch_embed.proj.bias"],
        )
        x = F.conv2d(images, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        first = self.w["trunk.cls_token"].expand(len(x), 1, -1)
        return torch.cat([first, x], 1) + self.w["trunk.pos_embed"]

    def before(self, x: Tensor) -> Tensor:
        return x

    def block(self, k: int, x: Tensor) -> Tensor:
        w = under(self.w, f"trunk.blocks.{k}.")
        q, key, v = linear(norm(x, w, "norm1", 1e-6), w, "attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, key, v, self.heads, None), w, "attn.proj")
        y = linear(norm(x, w, "norm2", 1e-6), w, "mlp.fc1")
        return x + linear(F.gelu(y), w, "mlp.fc2")

    def pool(self, x: Tensor) -> Tensor:
        return linear(norm(x[:, 0], self.w, "trunk.norm", 1e-6), self.w, "head.proj")


# --- the method ----------------------------------------------------------------------------------


@dataclass
class PlainCilmp:
    """The whole computation.

    Attributes:
        start: ids before the context.
        tails: per class, the ids of its name, "." and the end token.
        hidden: per class, `[rows, D]`, or None for no rows at all.
        logit_scale: already exponentiated.
    """

    text: CausalText | BertText
    image: ClipImage | TimmImage
    parameters: Weights
    start: Sequence[int]
    tails: Sequence[Sequence[int]]
    hidden: Sequence[Tensor] | None
    prefix: int
    suffix: int
    logit_scale: float
    dropout: float = 0.1

    def __post_init__(self) -> None:
        self.stages = sum(k.endswith(".context") for k in self.parameters)
        self.visual = sum(k.startswith("visual_prompt.") for k in self.parameters)

    def image_features(self, images: Tensor) -> Tensor:
        p, tower = self.parameters, self.image
        x = tower.patches(images.double())
        patches = x.shape[1]

        def prompts(k: int) -> Tensor:
            return p[f"visual_prompt.{k}"].expand(len(images), -1, -1)

        if self.visual:
            x = torch.cat([x, prompts(0)], 1)
        x = tower.before(x)
        for k in range(tower.depth):
            if 0 < k < self.visual:
                x = torch.cat([x[:, :patches], prompts(k)], 1)
            x = tower.block(k, x)
        return F.normalize(tower.pool(x), dim=-1)

    def intervene(self, h: Tensor, v: Tensor, name: str, mask: Tensor | None) -> Tensor:
        """`Dropout(h + R (W u + b - R^T h))` for one row and one image."""
        p = {k.removeprefix(f"{name}."): w for k, w in self.parameters.items() if name in k}
        u = h
        if "U1" in p:
            m = p["U2"] @ (p["U1"] @ v + p["b1"]) + p["b2"]
            u = torch.cat([h, m * h])
        out = h + p["R"] @ (p["W"] @ u + p["b"] - p["R"].T @ h)
        return out if mask is None else out * mask / (1 - self.dropout)

    def rows(self, stage: int, label: int, v: Tensor, image: int, masks: Masks | None) -> Tensor:
        """`t = B (A h')` for every row of one class and one image."""
        hidden = self.hidden[label].double()
        tokens = []
        for i, h in enumerate(hidden):
            name, group, at = "", 0, i
            if i < self.prefix:
                name = f"stage.{stage}.prefix"
            elif i >= len(hidden) - self.suffix:
                name, group, at = f"stage.{stage}.suffix", 1, i - len(hidden) + self.suffix
            if name:
                mask = None if masks is None else masks[stage][group][label, at, image].double()
                h = self.intervene(h, v, name, mask)
            a, b = (self.parameters[f"stage.{stage}.projection.{n}"] for n in "AB")
            tokens.append(b @ (a @ h))
        return torch.stack(tokens)

    def prompt(self, stage: int, label: int, v: Tensor, image: int, masks: Masks | None) -> Tensor:
        context = self.parameters[f"stage.{stage}.context"]
        if self.hidden is None:
            return context
        return torch.cat([context, self.rows(stage, label, v, image, masks)])

    def text_features(self, v: Tensor, masks: Masks | None = None) -> Tensor:
        """`[images, classes, embed]`, normalised."""
        tower, pairs = self.text, [(b, c) for b in range(len(v)) for c in range(len(self.tails))]
        sequences, lengths, spans = [], [], []
        for b, c in pairs:
            prompt = self.prompt(0, c, v[b], b, masks)
            head, tail = tower.tokens(self.start), tower.tokens(self.tails[c])
            live = torch.cat([head, prompt, tail])
            sequences.append(tower.pad(live))
            lengths.append(len(live))
            spans.append((len(head), len(head) + len(prompt)))
        x = tower.enter(torch.stack(sequences))
        for k in range(tower.depth):
            if 0 < k < self.stages:
                replaced = [
                    torch.cat([x[n, :i], self.prompt(k, c, v[b], b, masks), x[n, j:]])
                    for n, ((b, c), (i, j)) in enumerate(zip(pairs, spans, strict=True))
                ]
                x = torch.stack(replaced)
            x = tower.block(k, x, lengths)
        features = tower.pool(x, lengths).unflatten(0, (len(v), -1))
        return F.normalize(features, dim=-1)

    def logits(self, images: Tensor, masks: Masks | None = None) -> Tensor:
        v = self.image_features(images)
        return self.logit_scale * torch.einsum("be,bce->bc", v, self.text_features(v, masks))

    def step(
        self, images: Tensor, labels: Tensor, masks: Masks | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits, mean cross-entropy and its gradient with respect to every parameter."""
        names = list(self.parameters)
        self.parameters = {
            k: p.detach().double().requires_grad_() for k, p in self.parameters.items()
        }
        logits = self.logits(images, masks)
        loss = F.cross_entropy(logits, labels)
        grads = torch.autograd.grad(loss, [self.parameters[n] for n in names])
        return logits.detach(), loss.detach(), dict(zip(names, grads, strict=True))
