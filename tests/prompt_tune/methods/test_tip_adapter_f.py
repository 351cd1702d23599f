"""Tip-Adapter-F against AdamW, cosine and gradients written out in NumPy."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prompt_tune.method import Problem
from prompt_tune.methods.tip_adapter_f import TipAdapterF, TipAdapterFConfig
from prompt_tune.seeds import permutation

NAMES, WIDTH, SEED = ("a", "b", "c"), 8, 4
LABELS = np.array([0, 2, 1, 1, 0, 2, 2])
EPOCHS, SIZE, RATE, DECAY, BETA = 5, 3, 0.05, 0.1, 1.5


@pytest.fixture(scope="module")
def world(load: Any) -> Any:
    return load(Path(__file__).with_name("feature_world.py"))


def build(world: Any, **settings: Any) -> TipAdapterF:
    problem = Problem(
        world.backbone(WIDTH), NAMES, train_labels=torch.from_numpy(LABELS), seed=SEED
    )
    given = {"epochs": EPOCHS, "batch_size": SIZE, "lr": RATE, "weight_decay": DECAY, "beta": BETA}
    return TipAdapterF(TipAdapterFConfig(**(given | settings)), problem).double()


def scores(world: Any, v: np.ndarray, keys: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    memory = np.exp(-beta * (1 - v @ keys.T)) @ np.eye(3)[LABELS]
    return world.SCALE * v @ world.captions(NAMES, WIDTH).T + alpha * memory


def trained(world: Any, features: np.ndarray, alpha: float) -> list[np.ndarray]:
    """The keys after each epoch."""
    keys, first, second, step, kept = features.copy(), 0.0, 0.0, 0, []
    total = EPOCHS * math.ceil(len(features) / SIZE)
    for epoch in range(EPOCHS):
        order = permutation(len(features), SEED, "tip-adapter-f", epoch).numpy()
        for start in range(0, len(order), SIZE):
            own = order[start : start + SIZE]
            v = features[own]
            error = world.softmax(scores(world, v, keys, alpha, BETA)) - np.eye(3)[LABELS[own]]
            affinity = alpha * BETA * np.exp(-BETA * (1 - v @ keys.T))
            slope = (error / len(own) @ np.eye(3)[LABELS].T * affinity).T @ v
            rate = RATE * (1 + math.cos(math.pi * step / total)) / 2
            step += 1
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope**2
            keys = keys * (1 - rate * DECAY)
            root = np.sqrt(second / (1 - 0.999**step)) + 1e-4
            keys = keys - rate * first / (1 - 0.9**step) / root
        kept.append(keys)
    return kept


def test_without_validation_it_is_one_run_to_the_last_epoch(world: Any) -> None:
    method = build(world)
    features, train = world.cases(LABELS, WIDTH, 1)
    found = method.fit(train, None)
    steps = EPOCHS * 3
    assert found == {
        "start_alpha": 1.0, "alpha": 1.0, "beta": BETA, "steps": steps, "images_seen": EPOCHS * 7,
    }  # fmt: skip
    expected = trained(world, features, 1.0)[-1]
    np.testing.assert_allclose(method.keys.detach().numpy(), expected, rtol=0, atol=1e-11)
    assert np.abs(expected - features).max() > 0.01


def test_with_validation_the_best_run_and_epoch_stay(world: Any) -> None:
    alphas = (0.0, 2.0, 2.0, 6.0, 25.0)  # a run that went on from the last would differ
    method = build(world, start_alphas=alphas, grid=7, most=40.0)
    features, train = world.cases(LABELS, WIDTH, 1, noise=0.7)
    labels = np.arange(150) % 3
    v, val = world.cases(labels, WIDTH, 5, noise=0.7)
    best = (-1.0, 0.0, features, -1)
    for alpha in alphas:
        for epoch, keys in enumerate(trained(world, features, alpha)):
            score = world.accuracy(scores(world, v, keys, alpha, BETA), labels)
            if score > best[0]:
                best = (score, alpha, keys, epoch)
    assert best[1] > 2 and best[3] < EPOCHS - 1
    found = method.fit(train, val)
    assert found["start_alpha"] == best[1]
    np.testing.assert_allclose(method.keys.detach().numpy(), best[2], rtol=0, atol=1e-11)
    assert found["steps"] == len(alphas) * EPOCHS * 3
    assert found["images_seen"] == len(alphas) * EPOCHS * 7
    top = world.accuracy(scores(world, v, best[2], found["alpha"], found["beta"]), labels)
    assert top == found["val_accuracy"] >= best[0]
    assert all(p.grad is None for p in method.parameters())
