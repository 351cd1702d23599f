"""The journal variant's teacher, text by text."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from prompt_tune.backbone import Backbone

TEMPLATES = ("a photo of a {}.", "a picture of a {} cell.", "a scan of {}.")


@pytest.fixture(scope="module")
def plain(load: Callable[[Path], ModuleType]) -> Any:
    return load(Path(__file__).with_name("plain.py"))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_captions_and_the_best_texts_teach(plain: Any, double_backbone: Backbone) -> None:
    texts = plain.texts(double_backbone, [7, 2, 5, 6])
    problem = plain.problem(double_backbone, texts=texts, templates=TEMPLATES)
    method = plain.build("biomed-dpt-ensemble", problem, keep=3)
    captions = torch.stack([plain.template_features(double_backbone, t) for t in TEMPLATES])
    middle = unit(captions.mean(0))
    for c in range(4):
        ranked = []
        for e in unit(texts.embeddings[c]):
            others = [float(e @ middle[k]) for k in range(4) if k != c]
            ranked.append((float(e @ middle[c]) - max(others), e))
        ranked.sort(key=lambda pair: -pair[0])
        chosen = [*captions[:, c], *(e for _, e in ranked[:3])]
        assert len(chosen) == 3 + min(3, len(texts.embeddings[c]))
        expected = unit(torch.stack(chosen).mean(0))
        torch.testing.assert_close(method.teacher[c], expected, **plain.EXACT)
    worst_first = unit(torch.stack([*captions[:, 0], *unit(texts.embeddings[0])]).mean(0))
    assert (method.teacher[0] - worst_first).abs().max() > 1e-4  # leaving some out matters


def test_without_texts_or_templates_the_template_teaches(
    plain: Any, double_backbone: Backbone
) -> None:
    method = plain.build("biomed-dpt-ensemble", plain.problem(double_backbone))
    torch.testing.assert_close(
        method.teacher, plain.template_features(double_backbone), **plain.EXACT
    )
    clinical = plain.build("biomed-dpt-ensemble", plain.problem(double_backbone), tuned_for="btmri")
    expected = plain.template_features(double_backbone, "a MR photo of a {} in the brain.")
    torch.testing.assert_close(clinical.teacher, expected, **plain.EXACT)


def test_the_rest_is_the_first_version(plain: Any, double_backbone: Backbone) -> None:
    texts = plain.texts(double_backbone, [4] * 4)
    problem = plain.problem(double_backbone, texts=texts)
    old = plain.build("biomed-dpt", problem, tuned_for="btmri")
    new = plain.build("biomed-dpt-ensemble", problem, tuned_for="btmri")
    cases = plain.batch(double_backbone)
    torch.testing.assert_close(new.logits(cases), old.logits(cases), **plain.EXACT)
    assert new.loss(cases) != old.loss(cases)
    new.teacher = old.teacher
    torch.testing.assert_close(new.loss(cases), old.loss(cases), **plain.EXACT)
