import math

import numpy as np
import pytest

from prompt_tune.paired import difference, holm, p_value, ranks, score
from prompt_tune.predictions import Predictions


def predictions(correct: np.ndarray, groups: np.ndarray | None = None) -> Predictions:
    """Two classes; the right one wins where `correct` is true."""
    labels = np.arange(len(correct)) % 2
    said = np.where(correct, labels, 1 - labels)
    logits = np.eye(2)[said] * 3.0
    return Predictions(("a", "b"), tuple(map(str, labels)), labels, logits, groups)


def test_the_mean_over_seeds_and_its_interval_are_those_of_a_plain_bootstrap() -> None:
    random = np.random.default_rng(0)
    runs = [random.random(200) < p for p in (0.7, 0.8, 0.75)]
    found = score([predictions(r) for r in runs], "accuracy", draws=4000)
    means = [r.mean() for r in runs]
    assert found.value == pytest.approx(np.mean(means))
    assert found.deviation == pytest.approx(np.std(means, ddof=1))
    per_case = np.mean(runs, axis=0)
    plain = [per_case[random.integers(200, size=200)].mean() for _ in range(4000)]
    low, high = np.quantile(plain, [0.025, 0.975])
    assert found.interval.low == pytest.approx(low, abs=0.01)
    assert found.interval.high == pytest.approx(high, abs=0.01)


def test_methods_meet_the_same_cases() -> None:
    """Two methods that differ on 8 % of the cases differ with certainty, whatever the rest."""
    base = np.random.default_rng(1).random(400) < 0.5
    better = base.copy()
    better[np.flatnonzero(~base)[:32]] = True
    a, b = (score([predictions(r)], "accuracy") for r in (better, base))
    gap = difference(a, b)
    assert gap.value == pytest.approx(0.08)
    assert 0.04 < gap.low < gap.high < 0.12
    assert a.interval.low < b.interval.high  # apart from each other they overlap
    assert p_value(a, b) == pytest.approx(2 / 2001)
    assert p_value(a, b) == p_value(b, a)
    assert p_value(a, a) == 1.0


def test_under_no_difference_small_p_values_are_as_rare_as_they_say() -> None:
    random = np.random.default_rng(2)
    small = 0
    for _ in range(200):
        a, b = (score([predictions(random.random(150) < 0.7)], "accuracy", draws=300) for _ in "ab")
        small += p_value(a, b) < 0.1
    assert 8 <= small <= 36  # 20 expected


def test_patients_are_drawn_whole() -> None:
    correct = np.repeat(np.random.default_rng(3).random(20) < 0.7, 10)
    groups = np.repeat(np.arange(20), 10)
    apart, together = (score([predictions(correct, g)], "accuracy") for g in (None, groups))
    width = [s.interval.high - s.interval.low for s in (apart, together)]
    assert width[1] > 2 * width[0]


def test_holm_is_the_step_down_of_the_paper() -> None:
    found = holm([0.01, 0.04, 0.03, 0.005])
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_ranks_share_ties_and_put_the_undefined_last() -> None:
    assert ranks([0.5, 0.9, 0.5, math.nan]) == [2.5, 1.0, 2.5, 4.0]
