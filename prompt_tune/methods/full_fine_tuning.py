"""Full fine-tuning: every weight of the image tower, and a linear head."""

import copy
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prompt_tune.method import Batch, Method, MethodConfig, Problem


class FullFineTuningConfig(MethodConfig):
    """Settings of full fine-tuning."""

    name: str = "full-fine-tuning"
    head: Literal["text", "zeros"] = "text"
    """Where the head's weights start: the text features of the template, or 0."""


class FullFineTuning(Method):
    """A copy of the image tower, trained whole: the ceiling of what prompts could reach.

    With v_b the normalised feature of the copy, and a head of one vector w_c and one number a_c per
    class,

        logit[b, c] = exp(s) <v_b, w_c> + a_c,   loss = mean cross-entropy.

    w_c starts as the normalised text feature of class c in the template, so that training starts
    at zero-shot (as in Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022), or
    as 0; a starts as 0 and s stays what it is. The copy runs by open_clip's own forward, without
    `checkpoint_image`, and stays in evaluation mode: nothing is dropped. The weights of a run are
    the whole tower.

    Differs: exp(s) multiplies the product instead of being part of w at the start. The function is
    the same; an optimiser of the weights' own scale, such as AdamW, moves the head exp(s) times as
    fast. Their head has no a_c.
    """

    Config = FullFineTuningConfig
    reads_images = True

    def __init__(self, config: FullFineTuningConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        backbone = problem.backbone
        tower = copy.deepcopy(backbone.image.module).eval()
        self.tower = tower.requires_grad_(requires_grad=True)
        captions = [problem.template.format(name) for name in problem.class_names]
        text = F.normalize(backbone.text.encode_texts(captions), dim=-1)
        self.weight = nn.Parameter(text if config.head == "text" else torch.zeros_like(text))
        self.bias = nn.Parameter(torch.zeros_like(text[:, 0]))

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's signature
        """Sets the mode of the method; the tower stays in evaluation mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def image_features(self, batch: Batch) -> Float[Tensor, "batch embed"]:
        """L2-normalised image features of the trained tower."""
        frozen = self.backbone.image
        with frozen.execution.autocast(frozen.device):
            features = self.tower(batch.pixels.to(frozen.dtype))
        return F.normalize(features.to(frozen.dtype), dim=-1)

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """The linear head on scaled features."""
        scaled = self.backbone.logit_scale * self.image_features(batch)
        return F.linear(scaled, self.weight, self.bias)


METHOD = FullFineTuning
