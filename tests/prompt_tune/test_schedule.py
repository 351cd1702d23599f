"""Learning rates and epoch weights against the figures of the published configuration."""

import pytest
import torch

from prompt_tune.recipe import TrainSpec, load_tune_recipe
from prompt_tune.schedule import averaged_constant, epoch_weights, learning_rate


def _published() -> TrainSpec:
    return load_tune_recipe("cilmp-published").train


def test_learning_rate_of_the_published_schedule() -> None:
    spec = _published()
    expected = {1: 1e-5, 2: 2.5e-3, 3: 2.49938e-3, 50: 1.328e-3, 100: 2.47e-6}
    for epoch, value in expected.items():
        assert learning_rate(spec, epoch) == pytest.approx(value, rel=2e-3)


def test_epoch_weights_of_the_published_average() -> None:
    weights = epoch_weights(_published())
    assert sum(weights) == pytest.approx(1)
    expected = {1: 1.13e-4, 50: 6.55e-3, 100: 2.63e-2}
    for epoch, value in expected.items():
        assert weights[epoch - 1] == pytest.approx(value, rel=5e-3)
    mean = sum(e * w for e, w in enumerate(weights, start=1))
    assert mean == pytest.approx(76.5, abs=0.05)
    assert sum(weights[-10:]) == pytest.approx(0.259, abs=5e-4)


def test_the_weights_follow_the_number_of_epochs() -> None:
    short, long = (epoch_weights(TrainSpec(epochs=n)) for n in (10, 100))
    assert short[-1] == max(short)
    assert short[0] / short[-1] == pytest.approx(long[9] / long[-1], rel=1e-6)


def test_averaging_a_frozen_fp16_tensor_is_not_the_identity() -> None:
    weights = epoch_weights(_published())
    value = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).half().float()
    moved = (averaged_constant(value, weights) - value).norm() / value.norm()
    assert 4e-4 < float(moved) < 1.2e-3
