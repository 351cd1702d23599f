"""Bootstrap intervals: vectorised metrics, coverage, patients, paired differences."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DataError
from prompt_tune import metrics
from prompt_tune.metrics import evaluate
from prompt_tune.resampled import Resampler
from prompt_tune.statistics import (
    MEASURES,
    as_floats,
    confidence_intervals,
    draw_weights,
    mean_over_seeds,
    paired_difference,
    with_intervals,
)


def cases(n: int, classes: int, seed: int, skill: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=n)
    logits = np.round(random.normal(size=(n, classes)), 1)  # rounded: ties happen
    logits[np.arange(n), labels] += skill
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True), labels


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_weights_mean_repeated_cases(seed: int, classes: int, n: int) -> None:
    p, y = cases(n, classes, seed)
    times = np.random.default_rng(seed + 1).integers(0, 4, size=n)
    times[0] += 1
    repeated = evaluate(np.repeat(p, times, axis=0), np.repeat(y, times), [""] * classes)
    resampler, weights = Resampler(p, y), np.array([times, np.ones(n)], dtype=np.float64)
    for name, value in as_floats(repeated).items():
        got = float(MEASURES[name](resampler)(weights)[0])
        assert got == pytest.approx(value, abs=1e-9, nan_ok=True), name
    for got, wanted in (
        (resampler.sensitivities(weights)[0], repeated.sensitivity),
        (resampler.specificities(weights)[0], repeated.specificity),
    ):
        expected = [math.nan if v is None else v for v in wanted]
        assert got.tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("classes", [2, 8])
def test_values_are_those_of_evaluate_and_lie_inside(classes: int) -> None:
    p, y = cases(150, classes, 0)
    found = confidence_intervals(p, y, draws=500)
    exact = evaluate(p, y, [""] * classes)
    for name, value in as_floats(exact).items():
        interval = found.metrics[name]
        assert interval.value == pytest.approx(value)
        assert interval.low < interval.high
        if name not in ("ece",):  # resampling biases ECE upwards
            assert interval.low <= value <= interval.high
    assert [i.value for i in found.sensitivity] == pytest.approx(exact.sensitivity)


def test_accuracy_interval_is_the_binomial_one() -> None:
    p = np.eye(2)[np.r_[np.zeros(80, int), np.ones(20, int)]]
    found = confidence_intervals(p, np.zeros(100, dtype=int), draws=20_000).metrics["accuracy"]
    low, high = scipy.stats.binom(100, 0.8).ppf([0.025, 0.975]) / 100
    assert found.low == pytest.approx(low, abs=0.011)
    assert found.high == pytest.approx(high, abs=0.011)


def test_against_scipy() -> None:
    p, y = cases(60, 3, 1)
    right = (p.argmax(1) == y).astype(float)
    wanted = scipy.stats.bootstrap(
        (right,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = confidence_intervals(p, y, draws=9999).metrics["accuracy"]
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.018)


def test_coverage_of_the_true_accuracy() -> None:
    held = 0
    for seed in range(150):
        p, y = cases(100, 3, seed, skill=1.0)
        interval = confidence_intervals(p, y, draws=300, seed=seed).metrics["accuracy"]
        held += interval.low <= TRUE_ACCURACY <= interval.high
    assert 0.88 <= held / 150 <= 0.99


P, Y = cases(200_000, 3, 999, skill=1.0)
TRUE_ACCURACY = float((P.argmax(1) == Y).mean())


def test_seeded_and_independent_of_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    p, y = cases(40, 3, 2)
    first = confidence_intervals(p, y, draws=100)
    assert confidence_intervals(p, y, draws=100) == first
    assert confidence_intervals(p, y, draws=100, seed=2) != first
    monkeypatch.setattr("prompt_tune.statistics.CELLS", 40 * 7)
    for name, interval in confidence_intervals(p, y, draws=100).metrics.items():
        assert interval == pytest.approx(first.metrics[name], abs=1e-12)


def test_patients_are_drawn_whole() -> None:
    groups = np.array([7, 3, 7, 3, 5, 7])
    for weights in draw_weights(6, 50, 1, groups):
        for row in weights.tolist():
            assert row[0] == row[2] == row[5]
            assert row[1] == row[3]
            assert row[0] + row[1] + row[4] == 3


def test_patients_widen_the_interval() -> None:
    p, y = cases(50, 2, 4)
    repeated, labels = np.repeat(p, 4, axis=0), np.repeat(y, 4)
    patients = [f"p{k // 4}" for k in range(200)]
    one = with_intervals(p, y, resamples=1000)
    wide = with_intervals(repeated, labels, patients=patients, resamples=1000)
    narrow = with_intervals(repeated, labels, patients=[None] * 200, resamples=1000)
    assert (one["drawn"], wide["drawn"], narrow["drawn"]) == ("cases", "patients", "cases")
    # four copies of a case are no more evidence than one
    assert wide["metrics"]["accuracy"] == pytest.approx(one["metrics"]["accuracy"])
    width = {
        k: v["metrics"]["accuracy"][2] - v["metrics"]["accuracy"][1]
        for k, v in (("wide", wide), ("narrow", narrow))
    }
    assert width["narrow"] < 0.7 * width["wide"]
    json.dumps(wide, allow_nan=False)


def test_undefined_values_become_null() -> None:
    p, y = np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 0])
    found = with_intervals(p, y, resamples=50)
    assert found["metrics"]["macro_auroc"] == [None, None, None]
    assert found["sensitivity"] == [[1.0, 1.0, 1.0], [None, None, None]]


def test_a_rare_class_does_not_spoil_the_interval() -> None:
    p, y = cases(30, 3, 5)
    y = np.where(np.arange(30) == 0, 2, np.minimum(y, 1))
    found = confidence_intervals(p, y, draws=400)
    for name, interval in found.metrics.items():
        assert all(map(math.isfinite, interval)), name
    assert all(map(math.isfinite, found.sensitivity[2]))


def test_paired_differences() -> None:
    p, y = cases(200, 3, 6)
    better = 0.9 * p + 0.1 * np.eye(3)[y]
    for measure in MEASURES:
        same = paired_difference(p, p, y, measure=measure, draws=100)
        assert same == (0.0, 0.0, 0.0), measure
    found = paired_difference(better, p, y, measure="nll")
    exact = metrics.negative_log_likelihood(better, y) - metrics.negative_log_likelihood(p, y)
    assert found.value == pytest.approx(exact)
    assert found.high < 0, "every resample agrees"
    alone = [confidence_intervals(q, y).metrics["nll"] for q in (better, p)]
    assert found.high - found.low < 0.5 * (alone[0].high - alone[0].low)
    back = paired_difference(p, better, y, measure="nll")
    assert back == pytest.approx((-found.value, -found.high, -found.low))


def test_mean_over_seeds() -> None:
    assert mean_over_seeds([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_over_seeds([1.0])[1])
    with pytest.raises(DataError, match="no runs to average"):
        mean_over_seeds([])


def test_faults() -> None:
    p, y = cases(10, 2, 0)
    with pytest.raises(DataError, match=r"one patient number per case is wanted; found \[9\]"):
        confidence_intervals(p, y, groups=np.zeros(9, dtype=np.int64))
    for draws, level in ((0, 0.95), (10, 1.0), (10, 0.0)):
        with pytest.raises(DataError, match=f"found {draws} draws at level {level}"):
            confidence_intervals(p, y, draws=draws, level=level)
    with pytest.raises(DataError, match="no measure 'f1'; wanted accuracy, "):
        paired_difference(p, p, y, measure="f1")
    with pytest.raises(DataError, match="do not fit"):
        paired_difference(p, p[:9], y)
