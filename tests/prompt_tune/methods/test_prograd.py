"""ProGrad against its equations on full sequences."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cache.errors import RecipeError
from prompt_tune.backbone import Backbone
from prompt_tune.method import Batch
from prompt_tune.methods.prograd import TEMPERATURES


@pytest.fixture(scope="module")
def plain(load: Callable[[Path], ModuleType]) -> Any:
    return load(Path(__file__).with_name("plain.py"))


def both(plain: Any, method: Any, cases: Batch, heat: float) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy, its gradient, and that of the divergence as the published code has it."""
    double_backbone = method.backbone
    sentences = [f"a photo of a {name}." for name in plain.NAMES]
    text = plain.sentence_features(double_backbone, sentences, method.context)
    image, scale = F.normalize(cases.features, dim=-1), double_backbone.logit_scale
    logits = scale * image @ F.normalize(text, dim=-1).T
    taught = scale * image @ plain.template_features(double_backbone).T
    entropy = F.cross_entropy(logits, cases.labels)
    soft = -(taught / heat).softmax(1) * (logits / heat).log_softmax(1) * heat**2
    (g,) = torch.autograd.grad(entropy, method.context, retain_graph=True)
    (h,) = torch.autograd.grad(soft.sum(1).mean(), method.context)
    return entropy.detach(), g, h


def labelled(cases: Batch, method: Any, label: str) -> Batch:
    """Labels that the teacher wants more of than the method, or less."""
    with torch.no_grad():
        taught = method.cosine_logits(F.normalize(cases.features, dim=-1), method.teacher[None])
        ahead = taught.softmax(1) - method.logits(cases).softmax(1)
    return Batch((ahead if label == "agreed" else -ahead).argmax(1), features=cases.features)


@pytest.mark.parametrize("label", ["agreed", "opposed"])
def test_the_step_is_that_of_the_equations(
    plain: Any, double_backbone: Backbone, label: str
) -> None:
    settings = {"temperature": 2.0, "strength": 0.75}
    method = plain.build("prograd", plain.problem(double_backbone), **settings)
    cases = labelled(plain.batch(double_backbone), method, label)
    entropy, g, h = both(plain, method, cases, 2.0)
    unit = h / h.norm()
    along = torch.dot(g.flatten(), unit.flatten())
    assert (along < 0) == (label == "opposed")
    expected = g - 0.75 * along * unit if along < 0 else g
    found = method.backward(cases)
    torch.testing.assert_close(found, entropy, **plain.EXACT)
    torch.testing.assert_close(method.context.grad, expected, rtol=1e-7, atol=1e-9)
    method.backward(cases)  # gradients add up
    torch.testing.assert_close(method.context.grad, 2 * expected, rtol=1e-7, atol=1e-9)


def test_with_all_of_it_removed_nothing_opposes_the_teacher(
    plain: Any, double_backbone: Backbone
) -> None:
    method = plain.build("prograd", plain.problem(double_backbone))
    cases = labelled(plain.batch(double_backbone), method, "opposed")
    _, g, h = both(plain, method, cases, 1.0)
    assert F.cosine_similarity(g.flatten(), h.flatten(), dim=0) < -0.01
    method.backward(cases)
    left = F.cosine_similarity(method.context.grad.flatten(), h.flatten(), dim=0)
    assert abs(float(left)) < 1e-6


def test_at_the_teacher_the_step_is_finite(plain: Any, double_backbone: Backbone) -> None:
    method = plain.build("prograd", plain.problem(double_backbone))
    ids = double_backbone.text.tokenize(["a photo of a"])[0][1:-1]
    with torch.no_grad():
        method.context.copy_(double_backbone.text.embed(ids))
    method.backward(plain.batch(double_backbone))
    assert method.context.grad.isfinite().all()
    assert method.context.grad.abs().max() > 0


def test_temperatures(plain: Any, double_backbone: Backbone) -> None:
    problem = plain.problem(double_backbone)
    assert plain.build("prograd", problem).temperature == 1
    assert plain.build("prograd", problem, tuned_for="busi").temperature == 0.25
    assert plain.build("prograd", problem, tuned_for="busi", temperature=3.0).temperature == 3
    changed = {k: v for k, v in TEMPERATURES["few-shot"].items() if v != 1}
    assert changed == {"btmri": 2, "busi": 0.25, "dermamnist": 4}
    novel = {"tuned_for": "btmri", "protocol": "base-to-novel"}
    assert plain.build("prograd", problem, **novel).temperature == 2
    with pytest.raises(RecipeError, match="no base-to-novel values are published for 'busi'"):
        plain.build("prograd", problem, **novel | {"tuned_for": "busi"})
