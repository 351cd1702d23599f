"""CoOp against its equations on full sequences, in float64."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prompt_tune.backbone import Backbone


@pytest.fixture(scope="module")
def plain(load: Callable[[Path], ModuleType]) -> Any:
    return load(Path(__file__).with_name("plain.py"))


@pytest.mark.parametrize("context", ["a photo of a", None])
@pytest.mark.parametrize("class_specific", [False, True])
def test_loss_and_gradient_are_those_of_the_equations(
    plain: Any, double_backbone: Backbone, context: str | None, class_specific: bool
) -> None:
    problem, settings = plain.problem(double_backbone), {"class_specific": class_specific}
    method = plain.build("coop", problem, context=context, n_context=4, **settings)
    assert method.context.ndim == (3 if class_specific else 2)
    cases = plain.batch(double_backbone)
    sentences = [f"a photo of a {name}." for name in plain.NAMES]
    text = plain.sentence_features(double_backbone, sentences, method.context)
    cosine = F.cosine_similarity(cases.features[:, None], text[None], dim=-1)
    logits = double_backbone.logit_scale * cosine
    torch.testing.assert_close(method.logits(cases), logits, **plain.EXACT)
    plain.assert_same(method, cases, F.cross_entropy(logits, cases.labels))
