"""LoRA: low-rank changes of the attention projections of either tower, by peft."""

import copy
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.class_side import of_classes
from prompt_tune.method import Batch, Method, MethodConfig, Problem
from prompt_tune.towers import text_tower

Positive = Annotated[int, Field(ge=1)]
Projection = Literal["q", "k", "v", "o"]

MODULES = {
    "q": ("attn.qkv.q", "attention.self.query"),
    "k": ("attn.qkv.k", "attention.self.key"),
    "v": ("attn.qkv.v", "attention.self.value"),
    "o": ("attn.proj", "attention.output.dense"),
}
"""How module names end in an adapted vision transformer or causal text tower, and in a BERT."""


class LoraConfig(MethodConfig):
    """Settings of LoRA."""

    name: str = "lora"
    towers: Literal["image", "text", "both"] = "both"
    projections: Annotated[tuple[Projection, ...], Field(min_length=1)] = ("q", "k", "v", "o")
    rank: Positive = 4
    alpha: Annotated[float, Field(gt=0)] = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On what enters A, in training."""


class LoRA(Method):
    """Low-rank adaptation (Hu et al., ICLR 2022, eq. 3) of the towers' attention.

    Each chosen projection W of every block of a copy of the towers becomes

        W x + (alpha / rank) B A dropout(x),   A [rank, in] as torch starts a linear map, B = 0,

    with A and B trained. With v_b and t_c the normalised features of the adapted towers, of an
    image and of the template with the class name,

        logit[b, c] = exp(s) <v_b, t_c>,   loss = mean cross-entropy,

    so training starts at zero-shot. All four projections and alpha = rank follow sections 4 and 7
    of the paper; the towers and the loss are those of CLIP-LoRA (Zanella and Ben Ayed, "Low-rank
    few-shot adaptation of vision-language models", CVPR workshops 2024), whose settings are the
    preset `lora-clip`: rank 2 on q, k and v, dropout 0.25. With `towers: text` cached image
    features are enough.

    The towers run by open_clip's own forward, each caption through the whole text tower at every
    step, and `class_chunk` and `checkpoint_image` do not apply. peft's layer for
    `nn.MultiheadAttention` is not used: it adds the change to the frozen weight and subtracts it
    again in every forward, so that rounding moves the frozen weights. Fused projections are
    divided into linear maps, and q, k and v have an A each.

    Differs: the published code of CLIP-LoRA scales by alpha / sqrt(rank), with alpha 1; the preset
    has the alpha that gives the same here. It trains in mixed fp16.
    """

    Config = LoraConfig
    frozen_text: Tensor

    def __init__(self, config: LoraConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        import peft

        self.reads_images, self.towers = config.towers != "text", config.towers
        model = problem.backbone.model
        adapted: Any = copy.deepcopy(model.visual if config.towers == "image" else model)
        if config.towers == "text":
            adapted.visual = nn.Identity()
        if config.towers != "image":
            self.text = text_tower(adapted, problem.backbone.tokenizer)
        _divide(adapted)
        self.captions = [problem.template.format(name) for name in problem.class_names]
        frozen = F.normalize(problem.backbone.text.encode_texts(self.captions), dim=-1)
        self.register_buffer("frozen_text", frozen, persistent=False)
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=[end for one in config.projections for end in MODULES[one]],
        )
        self.adapted = peft.inject_adapter_in_model(settings, adapted).eval()

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's signature
        """Sets the mode of the adapters; the towers stay in evaluation mode."""
        super().train(mode)
        self.adapted.eval()
        for name, module in self.adapted.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def image_features(self, batch: Batch) -> Float[Tensor, "batch embed"]:
        """L2-normalised image features of the adapted tower, or of the frozen one."""
        if not self.reads_images:
            return super().image_features(batch)
        frozen = self.backbone.image
        visual: Any = self.adapted if self.towers == "image" else self.adapted.visual
        with frozen.execution.autocast(frozen.device):
            features = visual(batch.pixels.to(frozen.dtype))
        return F.normalize(features.to(frozen.dtype), dim=-1)

    @of_classes
    def text_features(self) -> Float[Tensor, "classes embed"]:
        """Text features of every class, before normalisation or after it."""
        if self.towers == "image":
            return self.frozen_text
        with self.backbone.text.execution.autocast(self.text.device):
            return self.text.encode_texts(self.captions).to(self.text.dtype)

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        return self.cosine_logits(self.image_features(batch), self.text_features()[None])


class _Divided(nn.Module):
    """A fused projection as three linear maps, for queries, keys and values."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        biases = (None, None, None) if bias is None else bias.chunk(3)
        maps = [_linear(w, b) for w, b in zip(weight.chunk(3), biases, strict=True)]
        self.q, self.k, self.v = maps

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n 3w"]:
        """Queries, keys and values side by side."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


class _Attention(nn.Module):
    """Self-attention as open_clip's blocks call `nn.MultiheadAttention`, made of linear maps."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = fused.num_heads
        self.qkv = _Divided(fused.in_proj_weight, fused.in_proj_bias)
        self.proj = _linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self,
        query: Float[Tensor, "b n w"],
        _key: Tensor,
        _value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        **_: object,
    ) -> tuple[Float[Tensor, "b n w"], None]:
        """What is attended, and no weights."""
        apart = self.qkv(query).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = apart.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(out.transpose(1, 2).flatten(-2)), None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def _divide(model: nn.Module) -> None:
    """Makes linear maps of the fused projections of open_clip's and timm's attention."""
    for module in [m for m in model.modules() if hasattr(m, "attn")]:
        attention: Any = module.attn
        if isinstance(attention, nn.MultiheadAttention):
            module.attn = _Attention(attention)
        elif isinstance(getattr(attention, "qkv", None), nn.Linear):
            attention.qkv = _Divided(attention.qkv.weight, attention.qkv.bias)


METHOD = LoRA
