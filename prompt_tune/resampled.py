"""The metrics of many resamples at once, as functions of how often each case was drawn.

A bootstrap resample is a row of whole-number weights. Metrics of the confusion matrix, of bins and
of means are then matrix products; AUROC is the Mann-Whitney statistic with weights. Each agrees
with `prompt_tune.metrics` on the repeated cases.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int64

from prompt_tune import metrics

Weights = Float64[np.ndarray, "draws cases"]
Values = Float64[np.ndarray, "draws"]
Measure = Callable[[Weights], Values]


def _divide(
    part: Float64[np.ndarray, "..."], whole: Float64[np.ndarray, "..."]
) -> Float64[np.ndarray, "..."]:
    """`part / whole`, and NaN where the whole is zero."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean_defined(values: Float64[np.ndarray, "draws classes"]) -> Values:
    defined = ~np.isnan(values)
    return _divide(np.where(defined, values, 0.0).sum(-1), defined.sum(-1).astype(np.float64))


def _auroc(scores: Float64[np.ndarray, "cases"], mine: Int64[np.ndarray, "cases"]) -> Measure:
    """Weighted one-versus-rest AUROC: share of pairs ranked right, ties counting half."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    positive = mine[order].astype(np.float64)

    def measure(weights: Weights) -> Values:
        drawn = weights[:, order]
        ours = np.add.reduceat(drawn * positive, starts, axis=1)
        others = np.add.reduceat(drawn * (1 - positive), starts, axis=1)
        below = np.cumsum(others, axis=1) - others
        pairs = (ours * (below + 0.5 * others)).sum(1)
        return _divide(pairs, ours.sum(1) * others.sum(1))

    return measure


class Resampler:
    """Measures of fixed predictions under changing case weights.

    Args:
        probabilities: of each case.
        labels: of each case.
    """

    def __init__(self, probabilities: metrics.Probabilities, labels: metrics.Labels) -> None:
        self.p, self.y = metrics.check(probabilities, labels)
        self.classes = self.p.shape[1]
        self._cells = np.eye(self.classes**2)[self.y * self.classes + metrics.predicted(self.p)]
        columns = [1] if self.classes == 2 else range(self.classes)
        self._areas = [_auroc(self.p[:, k], self.y == k) for k in columns]

    def confusions(self, weights: Weights) -> Float64[np.ndarray, "draws classes classes"]:
        """The confusion matrix of every resample."""
        return (weights @ self._cells).reshape(-1, self.classes, self.classes)

    def sensitivities(self, weights: Weights) -> Float64[np.ndarray, "draws classes"]:
        """Sensitivity per class; NaN where a resample has no case of the class."""
        counts = self.confusions(weights)
        return _divide(counts.diagonal(axis1=1, axis2=2), counts.sum(2))

    def specificities(self, weights: Weights) -> Float64[np.ndarray, "draws classes"]:
        """Specificity per class; NaN where a resample has no case of another class."""
        counts = self.confusions(weights)
        hits, cases, calls = counts.diagonal(axis1=1, axis2=2), counts.sum(2), counts.sum(1)
        others = counts.sum((1, 2))[:, None] - cases
        return _divide(others - (calls - hits), others)

    def accuracy(self, weights: Weights) -> Values:
        """Share of cases predicted right."""
        counts = self.confusions(weights)
        return counts.trace(axis1=1, axis2=2) / counts.sum((1, 2))

    def balanced_accuracy(self, weights: Weights) -> Values:
        """Mean sensitivity over the classes drawn."""
        return _mean_defined(self.sensitivities(weights))

    def macro_f1(self, weights: Weights) -> Values:
        """Mean F1 over the classes drawn."""
        counts = self.confusions(weights)
        hits, cases, calls = counts.diagonal(axis1=1, axis2=2), counts.sum(2), counts.sum(1)
        return _mean_defined(np.where(cases > 0, _divide(2 * hits, cases + calls), np.nan))

    def kappa(self, weights: Weights) -> Values:
        """Cohen's kappa; NaN where chance agreement is certain."""
        counts = self.confusions(weights)
        total = counts.sum((1, 2))
        observed = counts.trace(axis1=1, axis2=2) / total
        chance = (counts.sum(1) * counts.sum(2)).sum(1) / total**2
        return _divide(observed - chance, 1 - chance)

    def macro_auroc(self, weights: Weights) -> Values:
        """Mean AUROC over the classes that define one."""
        return _mean_defined(np.stack([area(weights) for area in self._areas], axis=1))

    def ece(self, weights: Weights) -> Values:
        """Expected calibration error."""
        confidence = self.p.max(1)
        gap = (metrics.predicted(self.p) == self.y) - confidence
        bins = np.eye(metrics.BINS)[metrics.bin_of(confidence)] * gap[:, None]
        return np.abs(weights @ bins).sum(1) / weights.sum(1)

    def brier(self, weights: Weights) -> Values:
        """Brier score, 0 to 2."""
        error = ((self.p - np.eye(self.classes)[self.y]) ** 2).sum(1)
        return weights @ error / weights.sum(1)

    def nll(self, weights: Weights) -> Values:
        """Mean negative log-likelihood."""
        true = self.p[np.arange(len(self.y)), self.y]
        loss = -np.log(np.clip(true, np.finfo(np.float64).eps, 1.0))
        return weights @ loss / weights.sum(1)
