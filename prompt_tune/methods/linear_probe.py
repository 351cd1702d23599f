"""Logistic regression on frozen image features."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from prompt_tune.method import Batch, Method, MethodConfig, Problem


class LinearProbeConfig(MethodConfig):
    """Settings of the linear probe."""

    name: str = "linear-probe"
    strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)  # inverse L2 penalties tried
    max_iterations: int = 1000


class LinearProbe(Method):
    """`logit = W v + b` on normalised image features, fitted by L-BFGS with an L2 penalty.

    The objective is `|W|^2 / 2 + strength sum_i CE_i`, the biases free; of two classes it is that
    of their one difference, and a class without training images never wins. The strength, an
    inverse penalty, is the one with the best accuracy on the validation split, the smallest on a
    tie; without a validation split it is 1 (Radford et al. 2021, appendix A.3).

    Differs: the penalty is searched on a fixed grid and only ever on the validation images of the
    run, which for few-shot runs are as few as the recipe allows. The medical port goes on from a
    coarse grid by 8 steps of bisection.
    Differs: features come from the test transform; the port takes one random crop of each image
    (scale 0.5 to 1, mirrored half of the time).
    """

    Config = LinearProbeConfig
    fitted_by = "solver"

    def __init__(self, config: LinearProbeConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.settings = config
        classes, width = len(problem.class_names), problem.backbone.embed_dim
        self.weight = nn.Parameter(torch.zeros(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """The linear map."""
        return self.image_features(batch) @ self.weight.T + self.bias

    def fit(self, train: Batch, val: Batch | None) -> Mapping[str, float]:
        """Fits every strength and keeps the one that serves the validation images best.

        The solver runs on the CPU, wherever the backbone is.
        """
        from sklearn.linear_model import LogisticRegression

        x, y = self.image_features(train).cpu().double().numpy(), train.labels.cpu().numpy()
        held_out = None if val is None else (self.image_features(val).cpu(), val.labels.cpu())
        strengths = self.settings.strengths if val is not None else [1.0]
        best = (-1.0, 0.0)
        for strength in sorted(strengths):
            solver = LogisticRegression(C=strength, max_iter=self.settings.max_iterations)
            solver.fit(x, y)
            weight, bias = self._spread(solver.classes_, solver.coef_, solver.intercept_)
            score = 0.0
            if held_out is not None:
                guessed = (held_out[0] @ weight.T + bias).argmax(1)
                score = float((guessed == held_out[1]).double().mean())
            if score > best[0]:
                best = (score, strength)
                with torch.no_grad():
                    self.weight.copy_(weight)
                    self.bias.copy_(bias)
        return {"strength": best[1]} | ({} if val is None else {"val_accuracy": best[0]})

    def _spread(
        self, classes: np.ndarray, weight: np.ndarray, bias: np.ndarray
    ) -> tuple[Float[Tensor, "classes embed"], Float[Tensor, "classes"]]:
        """A solution over all classes, on the CPU; those without a training image never win."""
        if len(classes) == 2 and len(weight) == 1:
            weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
        full = torch.zeros(self.weight.shape), torch.full(self.bias.shape, -1e4)
        full[0][classes] = torch.as_tensor(weight, dtype=torch.float32)
        full[1][classes] = torch.as_tensor(bias, dtype=torch.float32)
        return full


METHOD = LinearProbe
