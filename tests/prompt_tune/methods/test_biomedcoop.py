"""BiomedCoOp against its equations on full sequences, and against the published selection."""

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
from prompt_tune.method import ClassTexts
from prompt_tune.methods.biomedcoop import WEIGHTS


@pytest.fixture(scope="module")
def plain(load: Callable[[Path], ModuleType]) -> Any:
    return load(Path(__file__).with_name("plain.py"))


def published_selection(scores: Tensor, cut: float) -> Tensor:
    """Robust z-scores, standardised once more."""
    z = (scores - scores.median()) / (scores - scores.median()).abs().median()
    return ((z - z.mean()) / z.std()).abs() <= cut


def scores_of(embeddings: Tensor, image: Tensor, scale: float) -> Tensor:
    found = []
    for p in range(embeddings.shape[1]):
        unit = F.normalize(embeddings[:, p], dim=-1)
        found.append((scale * image @ unit.T).max(dim=1).values.mean())
    return torch.stack(found)


@pytest.mark.parametrize("cut", [1.0, 1.25, 1.5, 1.75, 2.0])
def test_the_step_by_median_and_mad_selects_nothing_else(
    plain: Any, double_backbone: Backbone, cut: float
) -> None:
    texts = plain.texts(double_backbone, [25] * 4)
    method = plain.build("biomedcoop", plain.problem(double_backbone, texts=texts), cut=cut)
    stacked, sizes = torch.stack(texts.embeddings), set()
    for seed in range(6):
        image = F.normalize(plain.normal(5, double_backbone.embed_dim, seed=seed), dim=-1)
        expected = published_selection(scores_of(stacked, image, double_backbone.logit_scale), cut)
        assert torch.equal(method.selected(image), expected)
        sizes.add(int(expected.sum()))
    assert min(sizes) < 25  # something is cut


def test_loss_and_gradient_are_those_of_the_equations(
    plain: Any, double_backbone: Backbone
) -> None:
    texts = plain.texts(double_backbone, [9] * 4)
    settings = {"sccm": 30.0, "kdsp": 2.0, "cut": 1.25}
    method = plain.build("biomedcoop", plain.problem(double_backbone, texts=texts), **settings)
    cases = plain.batch(double_backbone)
    image, scale = F.normalize(cases.features, dim=-1), double_backbone.logit_scale
    sentences = [f"a photo of a {name}." for name in plain.NAMES]
    text = F.normalize(plain.sentence_features(double_backbone, sentences, method.context), dim=-1)
    logits = scale * image @ text.T
    kept = published_selection(scores_of(torch.stack(texts.embeddings), image, scale), 1.25)
    assert 0 < kept.sum() < 9
    unit = [F.normalize(e, dim=-1) for e in texts.embeddings]
    mean = torch.stack([F.normalize(u.mean(0), dim=0) for u in unit])
    chosen = torch.stack([F.normalize(u[kept].mean(0), dim=0) for u in unit])
    expected = (
        F.cross_entropy(logits, cases.labels)
        + 30 * F.mse_loss(text, mean)
        + 2 * plain.divergence(scale * image @ chosen.T, logits)
    )
    plain.assert_same(method, cases, expected)


def test_without_texts_it_is_coop(plain: Any, double_backbone: Backbone) -> None:
    method = plain.build("biomedcoop", plain.problem(double_backbone))
    cases = plain.batch(double_backbone)
    coop = plain.build("coop", plain.problem(double_backbone))
    torch.testing.assert_close(method.loss(cases), coop.loss(cases), **plain.EXACT)


def test_equal_texts_and_a_single_one_are_all_kept(plain: Any, double_backbone: Backbone) -> None:
    for count in (1, 2, 7):
        embeddings = tuple(
            e.expand(count, -1) for e in plain.texts(double_backbone, [1] * 4).embeddings
        )
        problem = plain.problem(double_backbone, texts=ClassTexts(((),) * 4, embeddings))
        method = plain.build("biomedcoop", problem, cut=1.0)
        assert method.selected(F.normalize(plain.batch(double_backbone).features, dim=-1)).all()
        assert method.loss(plain.batch(double_backbone)).isfinite()


def test_unequally_many_texts_are_refused(plain: Any, double_backbone: Backbone) -> None:
    texts = plain.texts(double_backbone, [3, 4, 4, 2])
    message = r"knowledge\.texts: .* found \[2, 3, 4\] texts per class, wanted equally many"
    with pytest.raises(RecipeError, match=message):
        plain.build("biomedcoop", plain.problem(double_backbone, texts=texts))


def test_weights(plain: Any, double_backbone: Backbone) -> None:
    def weights(**settings: Any) -> tuple[float, float, float]:
        method = plain.build("biomedcoop", plain.problem(double_backbone), **settings)
        return method.sccm, method.kdsp, method.cut

    assert weights() == (1, 1, 1.5)
    assert weights(tuned_for="kneexray") == (5, 20, 1.75)
    assert weights(tuned_for="retina", protocol="base-to-novel", kdsp=0.0) == (5, 0, 2)
    assert [len(table) for table in WEIGHTS.values()] == [11, 10]
