"""Metrics against computations that share no code with them."""

import json
import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DataError
from prompt_tune import metrics
from prompt_tune.metrics import Metrics, constant_guess, evaluate


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties and certainties, labels that may leave classes out."""
    classes = draw(st.integers(2, 5))
    n = draw(st.integers(1, 40))
    weights = draw(
        st.lists(
            st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(any),
            min_size=n,
            max_size=n,
        )
    )
    p = np.array(weights, dtype=np.float64)
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return p / p.sum(1, keepdims=True), np.array(labels)


def names(p: np.ndarray) -> list[str]:
    return [f"class {k}" for k in range(p.shape[1])]


@given(predictions())
@settings(max_examples=60, deadline=None)
def test_against_counting_case_by_case(case: tuple[np.ndarray, np.ndarray]) -> None:
    p, y = case
    found = evaluate(p, y, names(p))
    n, classes = p.shape
    guess = [max(range(classes), key=lambda k: (row[k], -k)) for row in p.tolist()]
    table = [[0] * classes for _ in range(classes)]
    for truth, said in zip(y.tolist(), guess, strict=True):
        table[truth][said] += 1
    assert [list(row) for row in found.confusion] == table
    hits = [table[k][k] for k in range(classes)]
    cases = [sum(table[k]) for k in range(classes)]
    calls = [sum(row[k] for row in table) for k in range(classes)]
    present = [k for k in range(classes) if cases[k]]

    assert found.accuracy == pytest.approx(sum(hits) / n)
    recall = [hits[k] / cases[k] for k in present]
    assert found.balanced_accuracy == pytest.approx(sum(recall) / len(present))
    f1 = [2 * hits[k] / (cases[k] + calls[k]) for k in present]
    assert found.macro_f1 == pytest.approx(sum(f1) / len(present))
    for k in range(classes):
        others = n - cases[k]
        right = sum(t != k and g != k for t, g in zip(y.tolist(), guess, strict=True))
        assert found.sensitivity[k] == (hits[k] / cases[k] if cases[k] else None)
        assert found.specificity[k] == (right / others if others else None)

    chance = sum(a * b for a, b in zip(cases, calls, strict=True)) / n**2
    if chance == 1:
        assert found.kappa is None
    else:
        assert found.kappa == pytest.approx((sum(hits) / n - chance) / (1 - chance))


@given(predictions())
@settings(max_examples=60, deadline=None)
def test_auroc_against_all_pairs(case: tuple[np.ndarray, np.ndarray]) -> None:
    p, y = case
    found = evaluate(p, y, names(p))
    areas = []
    for k in range(p.shape[1]):
        ours, others = p[y == k, k], p[y != k, k]
        if len(ours) and len(others):
            wins = (ours[:, None] > others).mean() + 0.5 * (ours[:, None] == others).mean()
            areas.append(float(wins))
            assert found.auroc[k] == pytest.approx(wins)
        else:
            assert found.auroc[k] is None
            assert names(p)[k] in found.undefined()
    assert found.macro_auroc == (pytest.approx(sum(areas) / len(areas)) if areas else None)


@given(predictions())
@settings(max_examples=60, deadline=None)
def test_calibration_against_counting_case_by_case(case: tuple[np.ndarray, np.ndarray]) -> None:
    p, y = case
    found = evaluate(p, y, names(p))
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, truth in zip(p.tolist(), y.tolist(), strict=True):
        top = max(row)
        edge = next(b for b in range(1, 16) if top <= b / 15 or b == 15)
        bins.setdefault(edge, []).append((top, row.index(top) == truth))
    gaps = [abs(sum(r for _, r in held) - sum(c for c, _ in held)) for held in bins.values()]
    assert found.ece == pytest.approx(sum(gaps) / len(y), abs=1e-12)
    brier = [
        sum((q - (k == truth)) ** 2 for k, q in enumerate(row))
        for row, truth in zip(p.tolist(), y.tolist(), strict=True)
    ]
    assert found.brier == pytest.approx(sum(brier) / len(y), abs=1e-12)
    losses = [
        -math.log(max(row[truth], 2.0**-52))
        for row, truth in zip(p.tolist(), y.tolist(), strict=True)
    ]
    assert found.nll == pytest.approx(sum(losses) / len(y), abs=1e-12)


def test_against_scikit_learn_where_it_has_the_same_metric() -> None:
    random = np.random.default_rng(3)
    p = random.dirichlet(np.ones(4), size=300)
    y = np.array([random.choice(4, p=row) for row in p])
    found = evaluate(p, y, names(p))
    ovr = sklearn.metrics.roc_auc_score(y, p, multi_class="ovr", average="macro")
    assert found.macro_auroc == pytest.approx(ovr)
    assert found.nll == pytest.approx(sklearn.metrics.log_loss(y, p))
    brier = sklearn.metrics.brier_score_loss(y, p, scale_by_half=False)
    assert found.brier == pytest.approx(brier)
    assert found.ece < 0.1, "labels drawn from the probabilities are calibrated"


def test_textbook_calibration() -> None:
    # confidence 0.9, right half of the time; then one certain and wrong, one certain and right
    p, y = np.array([[0.9, 0.1]] * 4), np.array([0, 0, 1, 1])
    assert metrics.expected_calibration_error(p, y) == pytest.approx(0.4)
    p, y = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1])
    assert metrics.expected_calibration_error(p, y) == pytest.approx(0.5)
    count, confidence, right = metrics.reliability(p, y)
    assert count.tolist() == [0] * 14 + [2]
    assert (confidence[-1], right[-1]) == (2.0, 1.0)


def test_bins_are_closed_above_and_the_first_one_holds_zero() -> None:
    edges = np.array([0.0, 1 / 15, np.nextafter(1 / 15, 1), 0.2, 0.6, 14 / 15, 1.0])
    assert metrics.bin_of(edges).tolist() == [0, 0, 1, 2, 8, 13, 14]
    assert metrics.bin_of(np.array([1.0 + 1e-9])).tolist() == [14]


def test_two_classes_have_one_area() -> None:
    p1 = np.array([0.1, 0.4, 0.35, 0.8])
    p = np.stack([1 - p1, p1], axis=1)
    found = evaluate(p, np.array([0, 0, 1, 1]), ["no", "yes"])
    assert found.auroc == (0.75, 0.75)
    assert found.macro_auroc == 0.75
    tiny = np.array([[1.0, 1e-20], [1.0, 3e-20]])  # `1 - p` is the same for both
    assert evaluate(tiny, np.array([0, 1]), ["no", "yes"]).auroc == (1.0, 1.0)


def test_macro_f1_ignores_a_class_that_is_only_predicted() -> None:
    p = np.eye(3)[[0, 0, 1, 2]]
    found = evaluate(p, np.array([0, 0, 1, 1]), list("abc"))
    assert found.macro_f1 == pytest.approx((1 + 2 / 3) / 2)
    assert found.sensitivity == (1.0, 0.5, None)
    assert found.undefined() == ("c",)


def test_one_class_only() -> None:
    found = evaluate(np.array([[1.0, 0.0]] * 3), np.zeros(3, dtype=np.int64), ["a", "b"])
    assert (found.accuracy, found.kappa, found.macro_auroc) == (1.0, None, None)
    assert found.specificity == (None, 1.0)


def test_the_best_constant_answer() -> None:
    found = constant_guess(np.array([0, 1, 1, 1, 2]), list("abc"))
    assert found.accuracy == 0.6
    assert found.balanced_accuracy == pytest.approx(1 / 3)
    assert found.macro_auroc == 0.5
    assert found.kappa == 0.0
    assert found.ece == pytest.approx(0.0)
    assert found.nll == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.2)))
    for labels in ([], [0, 3], [-1]):
        with pytest.raises(DataError, match="labels are absent or out of range"):
            constant_guess(np.array(labels, dtype=np.int64), list("abc"))


def test_json_round_trip_without_nan() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), size=20)
    found = evaluate(p, np.arange(20) % 2, ["a", "b", "c"])
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Metrics.model_validate_json(text) == found
    assert evaluate(p.astype(np.float32), np.arange(20) % 2, list("abc")).cases == 20


@pytest.mark.parametrize(
    ("p", "y", "match"),
    [
        ([[0.5, 0.5]], [0, 1], r"do not fit; found \[1, 2\] and \[2\] int64"),
        ([[1.0]], [0], "do not fit"),
        ([[0.5, 0.5]], [0.0], r"do not fit; found .*float64"),
        (np.zeros((0, 2)), np.zeros(0, dtype=int), "there are no cases to evaluate"),
        ([[0.5, 0.5], [math.nan, 1]], [0, 1], "case 1: a probability is negative or not a number"),
        ([[1.5, -0.5]], [0], "case 0: a probability is negative"),
        ([[0.5, 0.5], [0.5, 0.4]], [0, 1], "case 1: the probabilities .* sum to one; found 0.9"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], "case 1: a label is no class; found 2, wanted 0 to 1"),
        ([[0.5, 0.5]], [-1], "a label is no class; found -1"),
    ],
)
def test_faults(p: object, y: object, match: str) -> None:
    with pytest.raises(DataError, match=match):
        evaluate(np.array(p), np.array(y), ["a", "b"])


def test_wrong_number_of_names() -> None:
    with pytest.raises(DataError, match=r"as many class names .* found 3, wanted 2"):
        evaluate(np.array([[0.5, 0.5]]), np.array([0]), list("abc"))
