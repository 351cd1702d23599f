"""PromptSRC: deep prompts in both towers, held near what the frozen towers say."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.class_side import of_classes
from prompt_tune.context import STD, start_context
from prompt_tune.method import Batch, Method, MethodConfig, Problem
from prompt_tune.towers import PromptLayout, Stage

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class PromptSrcConfig(MethodConfig):
    """Settings of PromptSRC; the defaults are the published ones."""

    name: str = "promptsrc"
    n_context: Positive = 4
    context: str | None = "a photo of a"
    """Words whose token embeddings start the context of block 0; null starts it at random."""
    visual_prompts: Positive = 4
    text_depth: Positive = 9
    """Blocks of the text tower that get a context of their own."""
    visual_depth: Positive = 9
    """Blocks of the image tower that get prompts of their own."""
    text_weight: Weight = 25.0
    image_weight: Weight = 10.0
    logit_weight: Weight = 1.0


class PromptSRC(Method):
    """Prompting with self-regulating constraints, as its published code computes it.

    Khattak et al., "Self-regulating prompts: foundational model adaptation without forgetting",
    ICCV 2023.

    Independent trained prompts overwrite the prompt positions at the first `text_depth` and
    `visual_depth` blocks, as in MaPLe without its coupling. With v_b and t_c the normalised
    features under prompts, v'_b the normalised feature of the frozen image tower, and t'_c the
    normalised mean, over the templates, of the un-normalised frozen text features of class c,

        z[b, c] = exp(s) <v_b, t_c>,   z'[b, c] = exp(s) <v'_b, t'_c>,
        loss = cross-entropy(z) + text_weight mean|t - t'| + image_weight mean|v - v'|
               + logit_weight sum_b KL(softmax z'_b || softmax z_b) / (B C),

    the L1 means over all B or C times embed entries. The published third part, the
    Gaussian-weighted mean of the prompts over epochs, is `train.average: trainables`, with
    `average_mean` and `average_std` in the preset. v' is the cached feature of the view where
    views are enumerated, and computed in every step where they are `live`.

    Differs: the templates are those of the data (at least its one template); the published code
    has 60 of ImageNet for every data set.
    Differs: depths are cut to those of the towers. Averaging takes the trained prompts in fp32,
    not all weights in fp16.
    """

    Config = PromptSrcConfig
    reads_images = True
    reads_features = True
    teacher: Tensor

    def __init__(self, config: PromptSrcConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.settings = config
        text, image = problem.backbone.text, problem.backbone.image
        size = config.n_context
        first = start_context(text, config.context, size)
        deeper = range(1, min(config.text_depth, text.depth))
        self.context = nn.ParameterList(
            [first, *(STD * torch.randn(size, text.width) for _ in deeper)]
        )
        self.visual_prompt = nn.ParameterList(
            STD * torch.randn(config.visual_prompts, image.width)
            for _ in range(min(config.visual_depth, image.depth))
        )
        self.layout = PromptLayout.build(text, problem.class_names, n_context=size)
        raw = [
            text.encode_texts([template.format(name) for name in problem.class_names])
            for template in problem.templates or (problem.template,)
        ]
        teacher = F.normalize(torch.stack(raw).mean(dim=0), dim=-1)
        self.register_buffer("teacher", teacher, persistent=False)

    def image_features(self, batch: Batch) -> Float[Tensor, "batch embed"]:
        """L2-normalised image features under the visual prompts."""
        prompts = list(self.visual_prompt)
        return F.normalize(self.backbone.image.encode(batch.pixels, prompts), dim=-1)

    @of_classes
    def text_features(self) -> Float[Tensor, "classes embed"]:
        """L2-normalised text features of every class under the contexts."""
        stages = [Stage(context) for context in self.context]
        return F.normalize(self.backbone.text.encode(self.layout, stages)[0], dim=-1)

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        return self.backbone.logit_scale * self.image_features(batch) @ self.text_features().T

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Cross-entropy and the three constraints."""
        at, scale = self.settings, self.backbone.logit_scale
        image, text = self.image_features(batch), self.text_features()
        logits = scale * image @ text.T
        with torch.no_grad():
            frozen = super().image_features(batch)
            target = F.log_softmax(scale * frozen @ self.teacher.T, dim=1)
        own = F.log_softmax(logits, dim=1)
        divergence = F.kl_div(own, target, reduction="sum", log_target=True) / logits.numel()
        return (
            F.cross_entropy(logits, batch.labels)
            + at.text_weight * F.l1_loss(text, self.teacher)
            + at.image_weight * F.l1_loss(image, frozen)
            + at.logit_weight * divergence
        )


METHOD = PromptSRC
