"""The linear probe against its objective: the optimum by another solver, in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prompt_tune.method import Batch, Problem
from prompt_tune.methods.linear_probe import LinearProbe, LinearProbeConfig

WIDTH = 7


def probe(classes: int, *strengths: float) -> LinearProbe:
    backbone: Any = SimpleNamespace(embed_dim=WIDTH)
    config = LinearProbeConfig(strengths=strengths or (1.0,))
    return LinearProbe(config, Problem(backbone, tuple("abcd"[:classes])))


def batch(count: int, classes: int, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    features = torch.randn(count, WIDTH, generator=random) + 1.5 * F.one_hot(labels, WIDTH)
    return Batch(labels, features=features)


def objective(weight: Tensor, bias: Tensor, cases: Batch, strength: float) -> Tensor:
    """`|W|^2 / 2 + strength sum CE`; of two classes in the difference w of their rows."""
    assert cases.features is not None
    logits = F.normalize(cases.features.double(), dim=-1) @ weight.T + bias
    penalty = weight.square().sum() / 2
    if len(weight) == 2:
        penalty = (weight[1] - weight[0]).square().sum() / 2
    return penalty + strength * F.cross_entropy(logits, cases.labels, reduction="sum")


def solved(cases: Batch, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """The optimum by torch's L-BFGS with a line search, from zero, in float64."""
    shape: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    weight, bias = torch.zeros(classes, WIDTH, **shape), torch.zeros(classes, **shape)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(weight, bias, cases, strength)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_it_is_the_optimum_of_its_objective(classes: int, strength: float) -> None:
    cases, val = batch(40, classes), batch(12, classes, seed=2)
    method = probe(classes, strength)
    method.fit(cases, val)
    weight, bias = solved(cases, classes, strength)
    test = batch(30, classes, seed=3)
    assert test.features is not None
    v = F.normalize(test.features.double(), dim=-1)
    found = method.logits(test).double().softmax(1)
    torch.testing.assert_close(found, (v @ weight.T + bias).softmax(1), rtol=0, atol=4e-3)
    own = objective(method.weight.detach().double(), method.bias.detach().double(), cases, strength)
    assert 0 <= float(own / objective(weight, bias, cases, strength)) - 1 + 1e-9 < 1e-5

    def slope(w: Tensor, b: Tensor) -> float:
        at = [w.double().clone().requires_grad_(), b.double().clone().requires_grad_()]
        value = objective(at[0], at[1], cases, strength)
        return max(float(g.abs().max()) for g in torch.autograd.grad(value, at))

    nothing = slope(torch.zeros(classes, WIDTH), torch.zeros(classes))
    assert slope(method.weight.detach(), method.bias.detach()) < 2e-3 * nothing


def test_the_strength_is_the_best_on_validation_images_the_smallest_on_a_tie() -> None:
    from sklearn.linear_model import LogisticRegression

    strengths = (1e-3, 1.0, 30.0, 1e4)
    chosen = set()
    for seed in range(6):
        cases, val = batch(9, 3, seed=seed), batch(45, 3, seed=100 + seed)
        method = probe(3, *strengths)
        found = method.fit(cases, val)
        assert cases.features is not None and val.features is not None
        x, y = (F.normalize(f, dim=-1).double().numpy() for f in (cases.features, val.features))
        scores = [
            LogisticRegression(C=strength, max_iter=1000).fit(x, cases.labels).score(y, val.labels)
            for strength in strengths
        ]
        assert found["val_accuracy"] == pytest.approx(max(scores))
        assert found["strength"] == strengths[scores.index(max(scores))]
        chosen.add(found["strength"])
    assert len(chosen) > 1
