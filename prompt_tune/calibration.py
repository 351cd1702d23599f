"""Temperature scaling: one number, fitted on validation images, that divides every logit."""

from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from prompt_tune import metrics
from prompt_tune.predictions import Predictions, softmax

Logits = Float64[np.ndarray, "cases classes"]
BOUNDS = (-5.0, 5.0)  # of the logarithm of the temperature
MEASURES = ("ece", "brier", "nll")


def fit_temperature(logits: Logits, labels: Int64[np.ndarray, "cases"]) -> float:
    """The temperature T of the least negative log-likelihood of `softmax(logits / T)`.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2. The search is
    over log T in [-5, 5]; the objective has one minimum.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return metrics.negative_log_likelihood(softmax(scaled), labels)

    found = minimize_scalar(loss, bounds=BOUNDS, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def scaled_calibration(test: Predictions, val: Predictions) -> dict[str, Any]:
    """Temperature and calibration measures on `test` after scaling by what `val` gives.

    Accuracy does not change: a common divisor keeps the order of the logits.
    """
    temperature = fit_temperature(val.logits, val.labels)
    found = metrics.evaluate(softmax(test.logits / temperature), test.labels, test.class_names)
    after = {name: getattr(found, name) for name in MEASURES}
    return {"temperature": temperature, "fitted_on": len(val.labels), **after}
