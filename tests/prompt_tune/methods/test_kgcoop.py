"""KgCoOp against its equations on full sequences."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cache.errors import RecipeError
from prompt_tune.backbone import Backbone
from prompt_tune.methods.kgcoop import WEIGHTS

TEMPLATE = "a picture of a {} cell."


@pytest.fixture(scope="module")
def plain(load: Callable[[Path], ModuleType]) -> Any:
    return load(Path(__file__).with_name("plain.py"))


def test_loss_and_gradient_are_those_of_the_equations(
    plain: Any, double_backbone: Backbone
) -> None:
    method = plain.build("kgcoop", plain.problem(double_backbone, template=TEMPLATE), weight=2.5)
    cases = plain.batch(double_backbone)
    sentences = [f"a photo of a {name}." for name in plain.NAMES]
    text = plain.sentence_features(double_backbone, sentences, method.context)
    cosine = F.cosine_similarity(cases.features[:, None], text[None], dim=-1)
    close = F.cosine_similarity(text, plain.template_features(double_backbone, TEMPLATE), dim=-1)
    entropy = F.cross_entropy(double_backbone.logit_scale * cosine, cases.labels)
    plain.assert_same(method, cases, entropy + 2.5 * (1 - close.mean()))


def test_the_distance_is_zero_at_the_template(plain: Any, double_backbone: Backbone) -> None:
    method = plain.build("kgcoop", plain.problem(double_backbone), weight=100.0)
    ids = double_backbone.text.tokenize(["a photo of a"])[0][1:-1]
    with torch.no_grad():
        method.context.copy_(double_backbone.text.embed(ids))
        cases = plain.batch(double_backbone)
        entropy = F.cross_entropy(method.logits(cases), cases.labels)
        torch.testing.assert_close(method.loss(cases), entropy, **plain.EXACT)


def test_weights_are_the_recipes_the_published_or_eight(
    plain: Any, double_backbone: Backbone
) -> None:
    def weight(**settings: Any) -> float:
        return plain.build("kgcoop", plain.problem(double_backbone), **settings).weight

    assert weight() == 8
    assert weight(tuned_for="busi") == 10
    assert weight(tuned_for="btmri", protocol="base-to-novel") == 8
    assert weight(tuned_for="btmri", weight=0.0) == 0
    assert len(WEIGHTS["few-shot"]) == 11
    assert set(WEIGHTS["few-shot"]) - set(WEIGHTS["base-to-novel"]) == {"busi"}
    message = (
        r"method\.tuned_for: no base-to-novel values are published for 'busi'; wanted one of "
        r"btmri, .*\. Set it to null"
    )
    with pytest.raises(RecipeError, match=message):
        weight(tuned_for="busi", protocol="base-to-novel")
