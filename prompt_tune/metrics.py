"""Classification metrics of probabilities against labels: pure functions, no model.

Every function takes probabilities `[cases, classes]` and labels `[cases]`. scikit-learn computes
what it has; calibration is computed here because confidences of exactly 0 and 1 have to land in
the first and the last bin.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import sklearn.metrics
from jaxtyping import Float64, Int64

from cache.errors import DataError
from cache.recipe import RecipePart

Probabilities = Float64[np.ndarray, "cases classes"]
Labels = Int64[np.ndarray, "cases"]
BINS = 15


class Metrics(RecipePart):
    """All metrics of one set of predictions; `None` marks what the cases do not define.

    Attributes:
        cases: number of cases.
        classes: class names in label order.
        accuracy: share of cases whose most probable class is right.
        balanced_accuracy: mean sensitivity over the classes that occur.
        macro_f1: mean F1 over the classes that occur.
        macro_auroc: mean one-versus-rest AUROC over the classes that define one.
        kappa: Cohen's kappa, unweighted.
        ece: expected calibration error, 15 equal-width bins.
        brier: squared error summed over classes, from 0 to 2.
        nll: mean negative log-likelihood in nats.
        sensitivity: share of each class's cases found.
        specificity: share of the other cases not taken for the class.
        auroc: one-versus-rest AUROC of each class.
        confusion: cases by true class (row) and predicted class (column).
    """

    cases: int
    classes: tuple[str, ...]
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    macro_auroc: float | None
    kappa: float | None
    ece: float
    brier: float
    nll: float
    sensitivity: tuple[float | None, ...]
    specificity: tuple[float | None, ...]
    auroc: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `Metrics.model_validate_json` reads its JSON back."""
        return self.model_dump(mode="json")

    def undefined(self) -> tuple[str, ...]:
        """The classes without an AUROC, because none or all of the cases are theirs."""
        return tuple(
            name for name, area in zip(self.classes, self.auroc, strict=True) if area is None
        )


def check(probabilities: Probabilities, labels: Labels) -> tuple[Probabilities, Labels]:
    """Both as float64 and int64, once they are sane.

    Raises:
        DataError: no cases, shapes that do not fit, non-finite or negative probabilities, rows
            that do not sum to one, labels out of range.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if p.ndim != 2 or y.shape != p.shape[:1] or p.shape[1] < 2 or y.dtype.kind not in "iu":
        what = "probabilities and labels do not fit"
        found = f"{list(p.shape)} and {list(y.shape)} {y.dtype}"
        raise DataError(what, found=found, wanted="[cases, classes] and [cases] whole numbers")
    if not len(y):
        what = "there are no cases to evaluate"
        raise DataError(what)
    if not np.isfinite(p).all() or (p < 0).any():
        row = int(np.flatnonzero(~(np.isfinite(p) & (p >= 0)).all(axis=1))[0])
        what = "a probability is negative or not a number"
        raise DataError(what, where=f"case {row}", found=p[row].tolist())
    off = np.abs(p.sum(axis=1) - 1)
    if off.max() > 1e-4:
        row = int(off.argmax())
        what = "the probabilities of a case do not sum to one"
        raise DataError(what, where=f"case {row}", found=f"{p[row].sum():.6g}")
    if y.min() < 0 or y.max() >= p.shape[1]:
        row = int(np.flatnonzero((y < 0) | (y >= p.shape[1]))[0])
        what = "a label is no class"
        raise DataError(what, where=f"case {row}", found=y[row], wanted=f"0 to {p.shape[1] - 1}")
    return p, y.astype(np.int64)


def predicted(probabilities: Probabilities) -> Labels:
    """The most probable class of each case; the first on a tie."""
    return probabilities.argmax(axis=1)


def accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """Share of cases whose most probable class is the label."""
    return float(sklearn.metrics.accuracy_score(labels, predicted(probabilities)))


def balanced_accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """Mean sensitivity over the classes that occur among the labels."""
    with warnings.catch_warnings():  # a predicted class without cases is expected here
        warnings.simplefilter("ignore", UserWarning)
        return float(sklearn.metrics.balanced_accuracy_score(labels, predicted(probabilities)))


def macro_f1(probabilities: Probabilities, labels: Labels) -> float:
    """Mean F1 over the classes that occur among the labels.

    scikit-learn's default also averages over classes that are only predicted; then one stray
    prediction of an absent class costs 1/C whatever the number of cases.
    """
    return float(
        sklearn.metrics.f1_score(
            labels,
            predicted(probabilities),
            labels=np.unique(labels),
            average="macro",
            zero_division=0.0,
        )
    )


def auroc_per_class(probabilities: Probabilities, labels: Labels) -> tuple[float | None, ...]:
    """One-versus-rest AUROC of each class; None where all or none of the cases are the class's.

    Of two classes both areas are that of the second class's probability, so that rounding of
    `1 - p` cannot make them differ.
    """
    classes = probabilities.shape[1]
    areas: list[float | None] = []
    for k in range(classes):
        mine = labels == k
        if mine.all() or not mine.any():
            areas.append(None)
        elif classes == 2:
            areas.append(float(sklearn.metrics.roc_auc_score(labels == 1, probabilities[:, 1])))
        else:
            areas.append(float(sklearn.metrics.roc_auc_score(mine, probabilities[:, k])))
    return tuple(areas)


def macro_auroc(probabilities: Probabilities, labels: Labels) -> float | None:
    """Mean one-versus-rest AUROC over the classes that define one; None where none does."""
    areas = [area for area in auroc_per_class(probabilities, labels) if area is not None]
    return float(np.mean(areas)) if areas else None


def cohen_kappa(probabilities: Probabilities, labels: Labels) -> float | None:
    """Cohen's kappa, unweighted; None where labels and predictions are one and the same class."""
    guesses = predicted(probabilities)
    if len(np.unique(np.concatenate([labels, guesses]))) == 1:
        return None
    return float(sklearn.metrics.cohen_kappa_score(labels, guesses))


def confusion(probabilities: Probabilities, labels: Labels) -> Int64[np.ndarray, "classes classes"]:
    """Cases by true class (row) and predicted class (column)."""
    every = np.arange(probabilities.shape[1])
    counts = sklearn.metrics.confusion_matrix(labels, predicted(probabilities), labels=every)
    return counts.astype(np.int64)


def sensitivity_and_specificity(
    counts: Int64[np.ndarray, "classes classes"],
) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """Of each class, TP / (TP + FN) and TN / (TN + FP), from a confusion matrix.

    None where the class has no cases, or no cases are of other classes.
    """
    hits, cases, calls, total = counts.diagonal(), counts.sum(1), counts.sum(0), counts.sum()
    others = total - cases
    spared = others - (calls - hits)

    def shares(parts: Labels, wholes: Labels) -> tuple[float | None, ...]:
        pairs = zip(parts.tolist(), wholes.tolist(), strict=True)
        return tuple(part / whole if whole else None for part, whole in pairs)

    return shares(hits, cases), shares(spared, others)


def bin_of(confidence: Float64[np.ndarray, "cases"], bins: int = BINS) -> Labels:
    """The equal-width bin of each confidence.

    Bins are open below and closed above; exactly 0 falls in the first, exactly 1 in the last.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    return np.searchsorted(edges, confidence, side="left")


def reliability(
    probabilities: Probabilities, labels: Labels, bins: int = BINS
) -> Float64[np.ndarray, "3 bins"]:
    """Per bin: cases, summed confidence of the predicted class, cases predicted right."""
    confidence = probabilities.max(axis=1)
    right = (predicted(probabilities) == labels).astype(np.float64)
    at = bin_of(confidence, bins)
    weights = (np.ones_like(right), confidence, right)
    return np.stack([np.bincount(at, weights=w, minlength=bins) for w in weights])


def expected_calibration_error(
    probabilities: Probabilities, labels: Labels, bins: int = BINS
) -> float:
    """`sum_b n_b / n * |accuracy_b - confidence_b|` over equal-width bins of the top confidence.

    Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3.
    """
    _, confidence, right = reliability(probabilities, labels, bins)
    return float(np.abs(right - confidence).sum() / len(labels))


def brier(probabilities: Probabilities, labels: Labels) -> float:
    """`mean_i sum_c (p_ic - [y_i = c])^2`: Brier's own form, from 0 to 2."""
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def negative_log_likelihood(probabilities: Probabilities, labels: Labels) -> float:
    """`-mean_i log p_i,y_i`; probabilities are kept from zero by the float64 epsilon."""
    true = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(true, np.finfo(np.float64).eps, 1.0)).mean())


def evaluate(probabilities: Probabilities, labels: Labels, class_names: Sequence[str]) -> Metrics:
    """Every metric of these predictions.

    Raises:
        DataError: see `check`; or as many names as classes are wanted.
    """
    p, y = check(probabilities, labels)
    if len(class_names) != p.shape[1]:
        what = "as many class names as probabilities per case are wanted"
        raise DataError(what, found=len(class_names), wanted=p.shape[1])
    counts = confusion(p, y)
    sensitivity, specificity = sensitivity_and_specificity(counts)
    return Metrics(
        cases=len(y),
        classes=tuple(class_names),
        accuracy=accuracy(p, y),
        balanced_accuracy=balanced_accuracy(p, y),
        macro_f1=macro_f1(p, y),
        macro_auroc=macro_auroc(p, y),
        kappa=cohen_kappa(p, y),
        ece=expected_calibration_error(p, y),
        brier=brier(p, y),
        nll=negative_log_likelihood(p, y),
        sensitivity=sensitivity,
        specificity=specificity,
        auroc=auroc_per_class(p, y),
        confusion=tuple(map(tuple, counts.tolist())),
    )


def constant_guess(labels: Labels, class_names: Sequence[str]) -> Metrics:
    """What the best answer that never looks at the image would score.

    Every case gets the class frequencies of `labels` themselves, so the predicted class is the
    most frequent one: an upper bound for any constant answer, not a method.

    Raises:
        DataError: no labels, or a label that is no class.
    """
    y = np.asarray(labels)
    classes = len(class_names)
    if not len(y) or y.min() < 0 or y.max() >= classes:
        what = "labels are absent or out of range"
        raise DataError(what, found=sorted(set(y.tolist()))[-3:], wanted=f"0 to {classes - 1}")
    frequencies = np.bincount(y, minlength=classes) / len(y)
    return evaluate(np.tile(frequencies, (len(y), 1)), y, class_names)
