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

    The penalty is the one with the best accuracy on the validation split, the smallest strength on
    a tie; without a validation split it is 1 (Radford et al. 2021, appendix A.3).

    Differs: the penalty is searched on a fixed grid and only ever on the validation images of the
    run, which for few-shot runs are as few as the recipe allows.
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
        """Fits every strength and keeps the one that serves the validation images best."""
        from sklearn.linear_model import LogisticRegression

        x, y = self.image_features(train).double().numpy(), train.labels.numpy()
        strengths = self.settings.strengths if val is not None else [1.0]
        best = (-1.0, 0.0)
        for strength in sorted(strengths):
            solver = LogisticRegression(C=strength, max_iter=self.settings.max_iterations)
            solver.fit(x, y)
            self._keep(solver.classes_, solver.coef_, solver.intercept_, commit=False)
            score = 0.0
            if val is not None:
                score = float((self._scores(val).argmax(1) == val.labels).double().mean())
            if score > best[0]:
                best = (score, strength)
                self._keep(solver.classes_, solver.coef_, solver.intercept_, commit=True)
        return {"strength": best[1]} | ({} if val is None else {"val_accuracy": best[0]})

    def _scores(self, batch: Batch) -> Tensor:
        weight, bias = self._candidate
        return self.image_features(batch) @ weight.T + bias

    def _keep(
        self, classes: np.ndarray, weight: np.ndarray, bias: np.ndarray, *, commit: bool
    ) -> None:
        if len(classes) == 2 and len(weight) == 1:
            weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
        full = torch.zeros_like(self.weight), torch.full_like(self.bias, -1e4)
        full[0][classes] = torch.as_tensor(weight, dtype=self.weight.dtype)
        full[1][classes] = torch.as_tensor(bias, dtype=self.bias.dtype)
        self._candidate = full
        if commit:
            with torch.no_grad():
                self.weight.copy_(full[0])
                self.bias.copy_(full[1])


METHOD = LinearProbe
