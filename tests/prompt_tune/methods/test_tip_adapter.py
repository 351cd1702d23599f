"""Tip-Adapter against its equations in NumPy, its search against one pair after the other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prompt_tune.method import Batch, Problem
from prompt_tune.methods import tip_adapter
from prompt_tune.methods.tip_adapter import TipAdapter, TipAdapterConfig

NAMES, WIDTH = ("a", "b", "c"), 8
LABELS = np.array([0, 2, 1, 1, 0, 2, 2])  # in no order, unequal counts


@pytest.fixture(scope="module")
def world(load: Any) -> Any:
    return load(Path(__file__).with_name("feature_world.py"))


def build(world: Any, **settings: Any) -> TipAdapter:
    problem = Problem(world.backbone(WIDTH), NAMES, train_labels=torch.from_numpy(LABELS))
    method = TipAdapter(TipAdapterConfig(**settings), problem).double()
    with torch.no_grad():  # 5.5 and 1 as a float32 parameter had them
        method.alpha.fill_(method.settings.alpha)
        method.beta.fill_(method.settings.beta)
    return method


def plain(world: Any, v: np.ndarray, keys: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    out = world.SCALE * v @ world.captions(NAMES, WIDTH).T
    for i, row in enumerate(v):
        for key, label in zip(keys, LABELS):
            out[i, label] += alpha * np.exp(-beta * (1 - row @ key))
    return out


def test_it_is_its_equations_without_validation(world: Any) -> None:
    method = build(world)
    keys, train = world.cases(LABELS, WIDTH, 1)
    assert method.fit(train, None) == {"alpha": 1.0, "beta": 5.5}
    v, batch = world.cases(np.arange(6) % 3, WIDTH, 2)
    found = method.logits(batch).detach().numpy()
    np.testing.assert_allclose(found, plain(world, v, keys, 1.0, 5.5), rtol=0, atol=1e-11)
    assert np.abs(found - plain(world, v, keys, 0, 5.5)).max() > 0.1


@pytest.mark.parametrize("block", [1, 400, 10**6])
def test_the_search_is_every_pair_one_after_the_other(
    world: Any, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(tip_adapter, "BLOCK", block)
    method = build(world, grid=15, most=30.0)
    keys, train = world.cases(LABELS, WIDTH, 1)
    labels = np.arange(60) % 3
    v, val = world.cases(labels, WIDTH, 3)
    best = (world.accuracy(plain(world, v, keys, 1.0, 5.5), labels), 1.0, 5.5)
    values = [0.1 + i * (30.0 - 0.1) / 15 for i in range(15)]
    for beta in values:
        for alpha in values:
            score = world.accuracy(plain(world, v, keys, alpha, beta), labels)
            if score > best[0]:
                best = (score, alpha, beta)
    assert best[1:] != (1.0, 5.5)
    found = method.fit(train, val)
    expected = {"alpha": best[1], "beta": best[2], "val_accuracy": best[0]}
    assert found == pytest.approx(expected, abs=1e-12)
    assert (method.alpha.item(), method.beta.item()) == pytest.approx(best[1:], abs=1e-12)


def test_on_a_tie_the_starting_pair_stays(world: Any) -> None:
    method = build(world, grid=9, alpha=20.0)
    _, train = world.cases(LABELS, WIDTH, 1, noise=0.01)
    _, val = world.cases(np.arange(3), WIDTH, 3, noise=0.01)
    found = method.fit(train, val)
    assert found == {"alpha": 20.0, "beta": 5.5, "val_accuracy": 1.0}


def test_the_memory_is_of_its_own_images(world: Any) -> None:
    _, train = world.cases(LABELS, WIDTH, 1)
    other = Batch(train.labels.flip(0), features=train.features)
    with pytest.raises(ValueError, match="not those the memory was made for"):
        build(world).fit(other, None)
    with pytest.raises(ValueError, match="needs their labels"):
        TipAdapter(TipAdapterConfig(), Problem(world.backbone(WIDTH), NAMES))
