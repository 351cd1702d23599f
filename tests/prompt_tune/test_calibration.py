import numpy as np
import pytest

from prompt_tune.calibration import fit_temperature, scaled_calibration
from prompt_tune.metrics import expected_calibration_error, negative_log_likelihood
from prompt_tune.predictions import Predictions, softmax


def drawn(cases: int, seed: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits `factor` times those that the labels were drawn from."""
    random = np.random.default_rng(seed)
    honest = random.normal(size=(cases, 4)) * 2
    labels = np.array([random.choice(4, p=p) for p in softmax(honest)])
    return factor * honest, labels


@pytest.mark.parametrize("factor", [0.3, 1.0, 5.0])
def test_it_finds_the_factor_by_which_logits_are_too_bold(factor: float) -> None:
    logits, labels = drawn(4000, 0, factor)
    assert fit_temperature(logits, labels) == pytest.approx(factor, rel=0.1)


def test_no_other_temperature_has_a_better_likelihood() -> None:
    logits, labels = drawn(60, 1, 3.0)
    best = fit_temperature(logits, labels)
    at = [negative_log_likelihood(softmax(logits / t), labels) for t in np.geomspace(0.1, 50, 400)]
    assert negative_log_likelihood(softmax(logits / best), labels) <= min(at) + 1e-9


def test_the_test_cases_have_no_say_and_calibration_improves() -> None:
    names = ("a", "b", "c", "d")
    val = drawn(400, 2, 4.0)
    test = drawn(2000, 3, 4.0)
    made = [Predictions(names, tuple(map(str, range(len(y)))), y, x) for x, y in (test, val)]
    found = scaled_calibration(*made)
    assert found["temperature"] == fit_temperature(*val)
    assert found["fitted_on"] == 400
    before = expected_calibration_error(softmax(test[0]), test[1])
    assert found["ece"] < before / 2
