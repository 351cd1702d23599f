"""Zero-shot against its equations in NumPy, and which of its sources needs a cache."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cache.errors import MissingKnowledgeError, RecipeError
from cache.recipe import validate
from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.evaluation import evaluate
from prompt_tune.method import Batch, ClassTexts, Problem
from prompt_tune.methods.zero_shot import ZeroShot, ZeroShotConfig
from prompt_tune.recipe import TuneRecipe
from prompt_tune.tuning import tune

NAMES = ("basophil", "red blood cell", "normal")
TEMPLATES = ("a photo of a {}.", "a slide of a {} cell.", "{}")


@pytest.fixture(scope="module")
def problem(tiny_models: ModuleType, tmp_path_factory: Any) -> Problem:
    folder: Path = tiny_models.tiny_biomedclip(tmp_path_factory.mktemp("tower"))
    backbone: Backbone = load_backbone(BackboneSpec(folder=str(folder)))
    strings = tuple(tuple(f"{n} is dark, {i}" for i in range(2 + k)) for k, n in enumerate(NAMES))
    texts = ClassTexts(strings, tuple(backbone.text.encode_texts(own) for own in strings))
    return Problem(backbone, NAMES, "a scan of {}.", TEMPLATES, texts=texts)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("settings", "captions"),
    [
        ({}, ("a scan of {}.",)),
        ({"source": "template"}, ("a scan of {}.",)),
        ({"source": "templates"}, TEMPLATES),
        ({"ensemble": True}, TEMPLATES),
        ({"source": "texts"}, None),
    ],
)
def test_it_is_its_equations(problem: Problem, settings: Any, captions: Any) -> None:
    method = ZeroShot(ZeroShotConfig(**settings), problem)
    features = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    expected = []
    for c, name in enumerate(NAMES):
        texts = [t.replace("{}", name) for t in captions or ()]
        if captions is None:
            assert problem.texts is not None
            texts = list(problem.texts.strings[c])
        raw = [problem.backbone.text.encode_texts([t])[0].double().numpy() for t in texts]
        t = unit(sum(unit(r) for r in raw) / len(raw))
        expected.append(unit(features.double().numpy()) @ t * problem.backbone.logit_scale)
    found = method.logits(Batch(torch.zeros(5).long(), features=features))
    np.testing.assert_allclose(found.numpy(), np.stack(expected, 1), rtol=0, atol=2e-5)


def test_only_texts_need_a_cache_and_without_them_it_is_the_caption(problem: Problem) -> None:
    assert ZeroShot.needed(ZeroShotConfig()) == ZeroShot.needs == frozenset()
    config = ZeroShotConfig(source="texts")
    assert ZeroShot.needed(config) == {"texts"}
    without = ZeroShot(config, replace(problem, texts=None))
    assert torch.equal(without.text, ZeroShot(ZeroShotConfig(), problem).text)


def test_settings_that_contradict_are_refused(problem: Problem) -> None:
    message = r"method\.ensemble and method\.source: texts exclude each other"
    with pytest.raises(RecipeError, match=message):
        ZeroShotConfig(ensemble=True, source="texts")
    with pytest.raises(RecipeError, match="an ensemble needs templates"):
        ZeroShot(ZeroShotConfig(source="templates"), replace(problem, templates=()))


def test_a_run_reads_the_texts_of_a_cache(
    toy: ModuleType, tiny_models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    toy.cache(tmp_path / "toy.h5")
    data = str(toy.images(tmp_path / "images"))
    folder = tiny_models.tiny_clip(tmp_path / "backbone")

    def recipe(source: str) -> TuneRecipe:
        method = {"name": "zero-shot", "source": source}
        fields = {"backbone": {"folder": str(folder)}, "method": method}
        return validate(TuneRecipe, fields, where="test")

    tune(recipe("template"), data=data, out=tmp_path / "plain")
    with pytest.raises(MissingKnowledgeError, match="'zero-shot' needs a knowledge cache"):
        tune(recipe("texts"), data=data, out=tmp_path / "none")
    run = tune(recipe("texts"), data=data, out=tmp_path / "run", knowledge=tmp_path / "toy.h5").run
    assert list(run["bindings"]["cache"]["texts"]) == ["descriptions"]
    assert evaluate(tmp_path / "run", resamples=10).result["images"] == 12
