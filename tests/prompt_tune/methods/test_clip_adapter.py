"""CLIP-Adapter against its equations in NumPy, its gradients by finite differences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prompt_tune.method import Problem
from prompt_tune.methods.clip_adapter import ClipAdapter, ClipAdapterConfig
from prompt_tune.recipe import load_tune_recipe

NAMES, WIDTH = ("a", "b", "c"), 8


@pytest.fixture(scope="module")
def world(load: Any) -> Any:
    return load(Path(__file__).with_name("feature_world.py"))


def loss(
    world: Any,
    v: np.ndarray,
    labels: np.ndarray,
    matrices: list[np.ndarray],
    mix: float,
    again: bool,
) -> tuple[float, np.ndarray]:
    down, up = matrices
    out = np.zeros((len(v), len(NAMES)))
    t = world.captions(NAMES, WIDTH)
    for i, row in enumerate(v):
        adapted = np.maximum(up @ np.maximum(down @ row, 0), 0)
        u = mix * adapted + (1 - mix) * row
        if again:
            u = u / np.sqrt((u * u).sum())
        out[i] = world.SCALE * (t @ u)
    p = world.softmax(out)
    return float(-np.log(p[np.arange(len(v)), labels]).mean()), out


@pytest.mark.parametrize("settings", [{}, {"mix": 0.2}, {"normalise": False, "reduction": 2}])
def test_it_is_its_equations_and_their_gradients(world: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(3)
    config = ClipAdapterConfig(**settings)
    method = ClipAdapter(config, Problem(world.backbone(WIDTH), NAMES)).double()
    assert {n: p.shape for n, p in method.trainable().items()} == {
        "down.weight": (WIDTH // config.reduction, WIDTH),
        "up.weight": (WIDTH, WIDTH // config.reduction),
    }
    labels = np.arange(9) % 3
    v, batch = world.cases(labels, WIDTH, 1)
    matrices = [
        method.down.weight.detach().numpy().copy(),
        method.up.weight.detach().numpy().copy(),
    ]
    value, logits = loss(world, v, labels, matrices, config.mix, config.normalise)
    np.testing.assert_allclose(method.logits(batch).detach().numpy(), logits, rtol=0, atol=1e-11)
    found = method.backward(batch)
    assert abs(float(found) - value) < 1e-12
    for which, parameter in enumerate((method.down.weight, method.up.weight)):
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-3
        for place in np.ndindex(*parameter.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [m.copy() for m in matrices]
                moved[which][place] += step
                sides.append(loss(world, v, labels, moved, config.mix, config.normalise)[0])
            assert abs((sides[0] - sides[1]) / 2e-6 - float(parameter.grad[place])) < 1e-7


def test_the_preset_is_the_published_budget() -> None:
    recipe = load_tune_recipe("clip-adapter")
    spec = recipe.train
    assert (spec.optimizer, spec.momentum, spec.weight_decay) == ("sgd", 0, 0)
    assert (spec.epochs, spec.batch_size, spec.lr) == (20, 32, 0.01)
