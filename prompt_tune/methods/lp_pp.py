"""LP++: a linear probe whose classifier blends class prototypes with class captions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.captions import Captions, caption_features
from prompt_tune.method import Batch, Method, MethodConfig, Problem

MOST_SHOTS = 16  # of the published runs
ALPHA_START = 250.0


class LpPpConfig(MethodConfig):
    """Settings of LP++."""

    name: str = "lp-pp"
    captions: Captions = "template"
    iterations: Annotated[int, Field(ge=1)] = 300
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    alpha_every: Annotated[int, Field(ge=1)] = 10
    """Iterations of the prototypes per update of the blending."""
    accumulate: bool = False
    """Update the blending by the sum of all its gradients so far, as the published code does."""


@dataclass(frozen=True)
class _Classifier:
    weight: Float[Tensor, "classes embed"]
    bias: Float[Tensor, "classes"]
    alpha: Float[Tensor, "classes"]

    def scores(
        self, f: Float[Tensor, "cases embed"], text: Float[Tensor, "classes embed"]
    ) -> Float[Tensor, "cases classes"]:
        return f @ self.weight.T + self.bias + self.alpha * (f @ text.T)


class LpPp(Method):
    """Linear probe with learned text blending (Huang et al., "LP++", CVPR 2024).

    With f_i the normalised image feature and t_k the normalised feature of the caption,

        logit[i, k] = <f_i, w_k + alpha_k t_k> + b_k,   loss = mean cross-entropy,

    alpha learned per class. Every iteration is one step over all N training images, by the
    majorise-minimise bounds of the two blocks, which are the data's:

        w, b:   4 N / lambda_max(F^T F), with momentum 0.9,
        alpha:  N / (4 max_k sum_i <f_i, t_k>^2), each 10th iteration,

    300 iterations; the one with the best validation accuracy stays, the latest on a tie, the last
    without validation images. Start: w_k is the sum of class k's features and every alpha is 250
    times the mean over classes of the mean <f_i, t_k> of class k's own images.

    Step sizes, start, momentum and intervals are those of the published code; that they are the
    paper's formulas (its Prop. 2, eq. 13 and 21) is unconfirmed.

    Differs: alpha follows the gradient of the present point. The published code never clears it, so
    that each update adds up all gradients since the start; `accumulate: true` does that.
    Differs: w_k starts at the class's mean times the mean number of images per class, at most 16;
    for the published runs, of equal shots up to 16, that is the sum. Classes without an image start
    at zero.
    Differs: biases start at zero, not at random. The fit is in float64.
    Differs: features come from the test transform; the medical port takes one random crop of each
    image (scale 0.5 to 1, mirrored half of the time) for all iterations.
    """

    Config = LpPpConfig
    fitted_by = "solver"
    text: Tensor

    def __init__(self, config: LpPpConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.settings = config
        classes, width = len(problem.class_names), problem.backbone.embed_dim
        self.register_buffer("text", caption_features(problem, config.captions), persistent=False)
        self.weight = nn.Parameter(torch.zeros(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.alpha = nn.Parameter(torch.zeros(classes))

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """The linear map; the backbone's scale plays no part."""
        own = _Classifier(self.weight, self.bias, self.alpha)
        return own.scores(self.image_features(batch), self.text)

    @torch.no_grad()
    def fit(self, train: Batch, val: Batch | None) -> Mapping[str, float]:
        """Descends and keeps the iteration that serves the validation images best."""
        f, text = self.image_features(train).double(), self.text.double()
        held_out = None if val is None else self.image_features(val).double()
        best, kept = -1, 0
        found = self._descend(f, text, train.labels)
        for iteration, at in enumerate(found, 1):
            hits = 0
            if val is not None and held_out is not None:
                hits = int((at.scores(held_out, text).argmax(1) == val.labels).sum())
            if hits >= best:
                best, kept = hits, iteration
                self.weight.copy_(at.weight)
                self.bias.copy_(at.bias)
                self.alpha.copy_(at.alpha)
        steps = float(self.settings.iterations)
        counted = {"steps": steps, "images_seen": steps * len(f), "kept_iteration": float(kept)}
        return counted | ({} if val is None else {"val_accuracy": best / len(val.labels)})

    def _descend(
        self,
        f: Float[Tensor, "cases embed"],
        text: Float[Tensor, "classes embed"],
        labels: Int[Tensor, "cases"],
    ) -> Iterator[_Classifier]:
        """The classifier after each iteration."""
        own = F.one_hot(labels, len(text)).to(f)
        similarity, count = f @ text.T, len(f)
        at = _start(f, own, similarity)
        rate = 4 * count / torch.linalg.eigvalsh(f.T @ f)[-1]
        rate_alpha = count / (4 * similarity.square().sum(0).max())
        momentum = self.settings.momentum
        speed, speed_bias = torch.zeros_like(at.weight), torch.zeros_like(at.bias)
        summed = torch.zeros_like(at.alpha)
        for iteration in range(1, self.settings.iterations + 1):
            error = (at.scores(f, text).softmax(1) - own) / count
            speed = momentum * speed + error.T @ f
            speed_bias = momentum * speed_bias + error.sum(0)
            slope = (error * similarity).sum(0)
            summed = summed + slope if self.settings.accumulate else slope
            turn = iteration % self.settings.alpha_every == 0
            alpha = at.alpha - rate_alpha * summed if turn else at.alpha
            at = _Classifier(at.weight - rate * speed, at.bias - rate * speed_bias, alpha)
            yield at


def _start(
    f: Float[Tensor, "cases embed"],
    own: Float[Tensor, "cases classes"],
    similarity: Float[Tensor, "cases classes"],
) -> _Classifier:
    counts = own.sum(0)
    means = own.T @ f / counts.clamp_min(1)[:, None]
    shots = min(len(f) / own.shape[1], MOST_SHOTS)
    agreement = (own * similarity).sum(0)[counts > 0] / counts[counts > 0]
    alpha = ALPHA_START * agreement.mean()
    return _Classifier(shots * means, torch.zeros_like(counts), alpha.expand(len(counts)))


METHOD = LpPp
