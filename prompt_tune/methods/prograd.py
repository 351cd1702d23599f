"""ProGrad: CoOp that takes no step against the zero-shot teacher."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from prompt_tune.distillation import (
    Dataset,
    Protocol,
    Tuned,
    divergence,
    published,
    template_features,
)
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.coop import CoOp, CoopConfig

EVERY: dict[Dataset, float] = {
    "btmri": 2.0,
    "busi": 0.25,
    "chmnist": 1.0,
    "covid-19": 1.0,
    "ctkidney": 1.0,
    "dermamnist": 4.0,
    "kneexray": 1.0,
    "kvasir": 1.0,
    "lungcolon": 1.0,
    "octmnist": 1.0,
    "retina": 1.0,
}
TEMPERATURES: dict[Protocol, dict[Dataset, float]] = {
    "few-shot": EVERY,
    "base-to-novel": {name: value for name, value in EVERY.items() if name != "busi"},
}
"""`temperature` in the BiomedCoOp benchmark (Koleilat et al., CVPR 2025), which does not run BUSI,
of three classes, from base to novel."""


class ProgradConfig(CoopConfig, Tuned):
    """Settings of ProGrad."""

    name: str = "prograd"
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Of both softmaxes in the divergence; null is the published one of `tuned_for`, or 1."""
    strength: Annotated[float, Field(ge=0)] = 1.0
    """How much of the opposing component is removed; lambda."""


class ProGrad(CoOp):
    """Prompt-aligned gradient (Zhu et al., ICCV 2023).

    CoOp's prompts. With g the gradient of the mean cross-entropy in the context and h that of
    KL(softmax(z / T) || softmax(logits / T)), z the logits of the data's template for the same
    image features, a step takes

        g                                if <g, h> >= 0,
        g - lambda <g, h> h / |h|^2      otherwise.

    Only the direction of h counts, so its scale is left out. T = 1 and lambda = 1; the BiomedCoOp
    benchmark tuned T per data set (`tuned_for`). The context that starts as the template starts
    with h zero up to rounding: then only what g has of that one direction can be removed.

    Differs: the teacher is a frozen zero-shot classifier for every backbone. The published port to
    BiomedCLIP has none: its teacher's logits are the student's own, so h vanishes and it is CoOp.
    Differs: where h is exactly zero g is taken as it is; the published code divides by zero.
    Differs: the preset trains on the test transform (`train.views: 1`); the benchmark draws a new
    random crop of every image each time, never mirrored (`views: live`, `flip: false`).
    """

    Config = ProgradConfig
    teacher: Tensor

    def __init__(self, config: ProgradConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        given = config.temperature
        self.temperature = published(config, TEMPERATURES, 1.0) if given is None else given
        self.strength = config.strength
        known = template_features(problem, [problem.template])
        self.register_buffer("teacher", known, persistent=False)

    def backward(self, batch: Batch) -> Float[Tensor, ""]:
        """The cross-entropy; its gradient is freed of what opposes the teacher's."""
        image = self.image_features(batch)
        logits = self.cosine_logits(image, self.text_features())
        with torch.no_grad():
            taught = self.cosine_logits(image, self.teacher[None])
        loss = F.cross_entropy(logits, batch.labels)
        kept = divergence(taught / self.temperature, logits / self.temperature)
        (h,) = torch.autograd.grad(kept, self.context, retain_graph=True)
        (g,) = torch.autograd.grad(loss, self.context)
        along = (g * h).sum()
        if along < 0:
            g = g - self.strength * along / h.square().sum() * h
        self.context.grad = g if self.context.grad is None else self.context.grad + g
        return loss.detach()


METHOD = ProGrad
