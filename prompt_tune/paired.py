"""Paired comparison of methods that were run under several seeds and met the same test cases.

The score of a method on a data set is the mean of a metric over its seeds. A bootstrap draw takes
test cases (whole patients where they are known) with replacement, the same ones for every method
and seed, so the difference of two methods is free of the cases that both find hard. It says how
much another test set of this size would change the difference, not how other seeds would: that is
what the standard deviation over seeds beside it shows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from prompt_tune.predictions import Predictions
from prompt_tune.resampled import Resampler
from prompt_tune.statistics import DRAWS, MEASURES, Interval, draw_weights, mean_over_seeds

SEED = 1


@dataclass(frozen=True, eq=False)
class Score:
    """A method on one data set.

    Attributes:
        value: mean over seeds.
        deviation: sample standard deviation over seeds; NaN for one seed.
        interval: percentile bootstrap over cases of the mean over seeds.
        draws: the mean over seeds on every resample.
    """

    value: float
    deviation: float
    interval: Interval
    draws: Float64[np.ndarray, "draws"]


def score(
    runs: Sequence[Predictions], measure: str, *, draws: int = DRAWS, level: float = 0.95
) -> Score:
    """The score of one method from the predictions of its runs, all on the same cases."""
    every, on_all = [], []
    for run in runs:
        resampler = Resampler(run.probabilities, run.labels)
        function = MEASURES[measure](resampler)
        on_all.append(float(function(np.ones((1, len(run.labels))))[0]))
        blocks = draw_weights(len(run.labels), draws, SEED, run.groups)
        every.append(np.concatenate([function(weights) for weights in blocks]))
    mean, deviation = mean_over_seeds(on_all)
    drawn = np.mean(every, axis=0)
    defined = drawn[~np.isnan(drawn)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(defined, tails) if len(defined) else (math.nan, math.nan)
    return Score(mean, deviation, Interval(mean, float(low), float(high)), drawn)


def difference(first: Score, second: Score, *, level: float = 0.95) -> Interval:
    """First minus second with its percentile interval on the common resamples."""
    drawn = first.draws - second.draws
    defined = drawn[~np.isnan(drawn)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(defined, tails) if len(defined) else (math.nan, math.nan)
    return Interval(first.value - second.value, float(low), float(high))


def p_value(first: Score, second: Score) -> float:
    """Two-sided bootstrap p-value of "no difference".

    Twice the smaller share of resamples on either side of zero, ties counted on both, with one
    added above and below (Davison and Hinkley 1997, section 4.2.5), so that it is never 0.
    """
    drawn = first.draws - second.draws
    drawn = drawn[~np.isnan(drawn)]
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(drawn) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values in the order given (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order.tolist()):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = running
    return adjusted


def ranks(values: Sequence[float]) -> list[float]:
    """Rank 1 for the largest value; ties share the mean of their ranks, NaN comes last."""
    from scipy.stats import rankdata

    worst = [-math.inf if math.isnan(v) else v for v in values]
    found: list[float] = rankdata([-v for v in worst]).tolist()
    return found
