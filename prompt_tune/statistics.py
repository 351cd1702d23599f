"""Bootstrap confidence intervals of metrics and of paired differences between two methods.

Cases are drawn with replacement; where patients are known, whole patients are, because images of
one patient are not independent. Draws are not stratified: the class mix of a test set is itself
random. Intervals are percentile intervals. They assume nothing about a metric's distribution and
respect its range; BCa corrects more but needs a jackknife that breaks down where a metric has no
spread, which happens on small, nearly solved test sets. For the same reason an interval of zero
width means "no error was seen", not "no error is possible".
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from cache.errors import DataError
from prompt_tune import metrics
from prompt_tune.data.images import numbered
from prompt_tune.resampled import Resampler

DRAWS = 2000
CELLS = 4_000_000  # weights held at a time; 32 MB

MEASURES: dict[str, Callable[[Resampler], Callable[..., Float64[np.ndarray, "draws"]]]] = {
    "accuracy": lambda r: r.accuracy,
    "balanced_accuracy": lambda r: r.balanced_accuracy,
    "macro_f1": lambda r: r.macro_f1,
    "macro_auroc": lambda r: r.macro_auroc,
    "kappa": lambda r: r.kappa,
    "ece": lambda r: r.ece,
    "brier": lambda r: r.brier,
    "nll": lambda r: r.nll,
}

LABELS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "macro_auroc": "macro AUROC",
    "kappa": "kappa",
    "ece": "ECE",
    "brier": "Brier",
    "nll": "NLL",
}
"""What a reader calls each measure."""

Groups = Int64[np.ndarray, "cases"]


class Interval(NamedTuple):
    """A value on all cases and the percentile interval around it; NaN where undefined."""

    value: float
    low: float
    high: float

    def to_json(self) -> list[float | None]:
        """[value, low, high], None for NaN."""
        return [None if math.isnan(x) else x for x in self]


class Intervals(NamedTuple):
    """Intervals of every metric, and of sensitivity and specificity per class in label order."""

    metrics: dict[str, Interval]
    sensitivity: tuple[Interval, ...]
    specificity: tuple[Interval, ...]

    def to_json(self) -> dict[str, object]:
        """Plain data for a report file."""
        return {
            "metrics": {name: interval.to_json() for name, interval in self.metrics.items()},
            "sensitivity": [interval.to_json() for interval in self.sensitivity],
            "specificity": [interval.to_json() for interval in self.specificity],
        }


def draw_weights(
    cases: int, draws: int, seed: int, groups: Groups | None = None
) -> Iterator[Float64[np.ndarray, "draws cases"]]:
    """How often each case is drawn, in blocks of draws; the same for the same arguments.

    With groups, as many groups as there are are drawn, and a case counts as often as its group.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    group = np.arange(cases) if groups is None else np.unique(groups, return_inverse=True)[1]
    units = int(group.max()) + 1
    block = max(1, CELLS // cases)
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        picks = random.integers(units, size=(rows, units))
        flat = (picks + units * np.arange(rows)[:, None]).ravel()
        counts = np.bincount(flat, minlength=rows * units).reshape(rows, units)
        yield counts[:, group].astype(np.float64)


def confidence_intervals(
    probabilities: metrics.Probabilities,
    labels: metrics.Labels,
    *,
    groups: Groups | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 1,
) -> Intervals:
    """Percentile bootstrap intervals of every metric.

    A metric that a resample does not define (AUROC of a class that was not drawn) is averaged over
    the classes it is defined for; a resample that defines none is left out.

    Args:
        probabilities: of each case.
        labels: of each case.
        groups: patient number of each case, `ImageSplit.groups`.
        draws: number of resamples.
        level: coverage.
        seed: of the draws.

    Raises:
        DataError: see `prompt_tune.metrics.check`; unusable groups, draws or level.
    """
    resampler = Resampler(probabilities, labels)
    cases = len(resampler.y)
    _check(cases, groups, draws, level)
    functions = {name: take(resampler) for name, take in MEASURES.items()}
    functions |= {
        "sensitivity": resampler.sensitivities,
        "specificity": resampler.specificities,
    }
    drawn: dict[str, list[Float64[np.ndarray, ...]]] = {name: [] for name in functions}
    for weights in draw_weights(cases, draws, seed, groups):
        for name, function in functions.items():
            drawn[name].append(function(weights))
    whole = {name: function(np.ones((1, cases))) for name, function in functions.items()}
    every = {
        name: _intervals(whole[name], np.concatenate(drawn[name]), level) for name in functions
    }
    overall = {name: every[name][0] for name in MEASURES}
    return Intervals(overall, every["sensitivity"], every["specificity"])


def with_intervals(
    probabilities: metrics.Probabilities,
    labels: metrics.Labels,
    *,
    patients: Sequence[str | None] | None = None,
    resamples: int = DRAWS,
    seed: int = 1,
) -> dict[str, Any]:
    """`confidence_intervals` as plain data, drawn by patient where any case names one.

    Raises:
        DataError: see `confidence_intervals`.
    """
    groups = numbered(patients) if patients is not None else None
    found = confidence_intervals(probabilities, labels, groups=groups, draws=resamples, seed=seed)
    return {
        "level": 0.95,
        "resamples": resamples,
        "seed": seed,
        "drawn": "cases" if groups is None else "patients",
        **found.to_json(),
    }


def paired_difference(
    first: metrics.Probabilities,
    second: metrics.Probabilities,
    labels: metrics.Labels,
    *,
    measure: str = "accuracy",
    groups: Groups | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 1,
) -> Interval:
    """`measure` of the first predictions minus that of the second, on the same resamples.

    Much narrower than two separate intervals suggest, because both methods meet the same hard
    cases.

    Raises:
        DataError: unknown measure, predictions of other cases, or see `confidence_intervals`.
    """
    if measure not in MEASURES:
        what = f"no measure {measure!r}"
        raise DataError(what, wanted=", ".join(MEASURES))
    one, two = Resampler(first, labels), Resampler(second, labels)
    cases = len(one.y)
    _check(cases, groups, draws, level)
    a, b = MEASURES[measure](one), MEASURES[measure](two)
    blocks = [a(weights) - b(weights) for weights in draw_weights(cases, draws, seed, groups)]
    every = np.ones((1, cases))
    return _intervals(a(every) - b(every), np.concatenate(blocks), level)[0]


def mean_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over runs; the deviation of one run is NaN.

    Raises:
        DataError: no values.
    """
    if not values:
        what = "there are no runs to average"
        raise DataError(what)
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def as_floats(found: metrics.Metrics) -> Mapping[str, float]:
    """The metrics that have intervals, by name; NaN where undefined."""
    values = {name: getattr(found, name) for name in MEASURES}
    return {name: math.nan if value is None else value for name, value in values.items()}


def _intervals(
    value: Float64[np.ndarray, "1 *rest"], drawn: Float64[np.ndarray, "draws *rest"], level: float
) -> tuple[Interval, ...]:
    """One interval per column; undefined draws are left out."""
    columns = drawn.reshape(len(drawn), -1).T
    tails = [(1 - level) / 2, (1 + level) / 2]
    made = []
    for point, column in zip(value.ravel().tolist(), columns, strict=True):
        defined = column[~np.isnan(column)]
        low, high = np.quantile(defined, tails) if len(defined) else (math.nan, math.nan)
        made.append(Interval(point, float(low), float(high)))
    return tuple(made)


def _check(cases: int, groups: Groups | None, draws: int, level: float) -> None:
    if groups is not None and np.shape(groups) != (cases,):
        what = "one patient number per case is wanted"
        raise DataError(what, found=list(np.shape(groups)), wanted=[cases])
    if draws < 1 or not 0 < level < 1:
        what = "a bootstrap needs at least one draw and a level between 0 and 1"
        raise DataError(what, found=f"{draws} draws at level {level}")
