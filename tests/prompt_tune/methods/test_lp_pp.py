"""LP++ against its descent written out in NumPy, case by case."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prompt_tune.method import Problem
from prompt_tune.methods.lp_pp import LpPp, LpPpConfig

NAMES, WIDTH = ("a", "b", "c"), 8
EQUAL = np.array([0, 2, 1, 1, 0, 2])
UNEQUAL = np.array([0, 0, 0, 0, 2, 2])  # and no image of b


@pytest.fixture(scope="module")
def world(load: Any) -> Any:
    return load(Path(__file__).with_name("feature_world.py"))


def plain(
    world: Any, f: np.ndarray, labels: np.ndarray, iterations: int, every: int, summed: bool
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    t, n = world.captions(NAMES, WIDTH), len(f)
    weight, bias, agreement = np.zeros((3, WIDTH)), np.zeros(3), []
    for k in range(3):
        if own := [i for i in range(n) if labels[i] == k]:
            weight[k] = min(n / 3, 16) * f[own].mean(0)
            agreement.append(np.mean([f[i] @ t[k] for i in own]))
    alpha = 250 * np.mean(agreement) * np.ones(3)
    rate = 4 * n / np.linalg.norm(f, 2) ** 2  # the largest singular value, squared
    rate_alpha = n / (4 * max(sum((f[i] @ t[k]) ** 2 for i in range(n)) for k in range(3)))
    moving, moving_bias, total = 0.0, 0.0, np.zeros(3)
    found = []
    for step in range(1, iterations + 1):
        slope, slope_bias, slope_alpha = np.zeros((3, WIDTH)), np.zeros(3), np.zeros(3)
        for i in range(n):
            scores = [f[i] @ (weight[k] + alpha[k] * t[k]) + bias[k] for k in range(3)]
            error = (world.softmax(np.array(scores)) - np.eye(3)[labels[i]]) / n
            slope += np.outer(error, f[i])
            slope_bias += error
            slope_alpha += error * (t @ f[i])
        moving, moving_bias = 0.9 * moving + slope, 0.9 * moving_bias + slope_bias
        weight, bias = weight - rate * moving, bias - rate * moving_bias
        total = total + slope_alpha
        if step % every == 0:
            alpha = alpha - rate_alpha * (total if summed else slope_alpha)
        found.append((weight, bias, alpha))
    return found


def build(world: Any, **settings: Any) -> LpPp:
    return LpPp(LpPpConfig(**settings), Problem(world.backbone(WIDTH), NAMES)).double()


def tensors(method: LpPp) -> list[np.ndarray]:
    return [p.detach().numpy() for p in (method.weight, method.bias, method.alpha)]


@pytest.mark.parametrize("labels", [EQUAL, UNEQUAL, np.repeat(np.arange(3), 20)])
@pytest.mark.parametrize("summed", [False, True])
def test_it_is_its_descent(world: Any, labels: np.ndarray, summed: bool) -> None:
    method = build(world, iterations=12, alpha_every=3, accumulate=summed)
    f, train = world.cases(labels, WIDTH, 1)
    assert method.fit(train, None) == {
        "steps": 12, "images_seen": 12 * len(labels), "kept_iteration": 12,
    }  # fmt: skip
    expected = plain(world, f, labels, 12, 3, summed)[-1]
    for mine, theirs in zip(tensors(method), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    v, batch = world.cases(EQUAL, WIDTH, 2)
    weight, bias, alpha = expected
    true = v @ (weight + alpha[:, None] * world.captions(NAMES, WIDTH)).T + bias
    np.testing.assert_allclose(method.logits(batch).detach().numpy(), true, rtol=0, atol=1e-8)


def test_the_iteration_with_the_best_validation_accuracy_stays_the_latest_on_a_tie(
    world: Any,
) -> None:
    f, train = world.cases(EQUAL, WIDTH, 1, noise=1.5)
    labels = np.arange(90) % 3
    v, val = world.cases(labels, WIDTH, 3, noise=1.5)
    method = build(world, iterations=40)
    found = method.fit(train, val)
    every = plain(world, f, EQUAL, 40, 10, False)
    t = world.captions(NAMES, WIDTH)
    scores = [world.accuracy(v @ (w + a[:, None] * t).T + b, labels) for w, b, a in every]
    best = max(k for k, s in enumerate(scores) if s == max(scores))
    assert scores.count(max(scores)) > 1 and best < 39
    assert (found["kept_iteration"], found["val_accuracy"]) == (best + 1, max(scores))
    for mine, theirs in zip(tensors(method), every[best], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_the_published_budget_learns(world: Any) -> None:
    method = build(world)
    _, train = world.cases(np.arange(48) % 3, WIDTH, 1)
    found = method.fit(train, None)
    assert (found["steps"], found["images_seen"]) == (300, 300 * 48)
    with torch.no_grad():
        assert method.loss(train) < 0.3
    _, test = world.cases(np.arange(60) % 3, WIDTH, 2)
    assert (method.logits(test).argmax(1) == test.labels).double().mean() > 0.75
