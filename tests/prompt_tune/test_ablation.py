"""What an ablation may ask of a method, and what its table says beside the metric."""

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cache.errors import MissingKnowledgeError, RecipeError
from cache.recipe import validate
from cache.store import KnowledgeCache
from prompt_tune.ablation import ablate
from prompt_tune.backbone import BackboneSpec, load_backbone
from prompt_tune.data.source import load_data
from prompt_tune.method import Need
from prompt_tune.method_groups import find_runs
from prompt_tune.recipe import KnowledgeSpec, TuneRecipe
from prompt_tune.texts import load_texts
from prompt_tune.variants import Variant, distinct, variants

CILMP = {"name": "cilmp", "prefix": 2, "suffix": 2, "rank": 2, "visual_depth": 0, "text_depth": 2}
TEXTS = {"name": "zero-shot", "source": "texts"}


def recipe_of(method: Mapping[str, object], folder: str = "tower", **changes: object) -> TuneRecipe:
    data = {
        "backbone": {"folder": folder},
        "method": dict(method),
        "samples": {"shots": 2},
        **changes,
    }
    return validate(TuneRecipe, data, where="test")


def asked(recipe: TuneRecipe, about: str, **sources: Path) -> list[Variant]:
    return [v for v in variants(recipe, sources) if v.about == about]


@pytest.fixture(scope="module")
def world(
    tiny_models: ModuleType, toy: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Images, a tiny backbone and two caches of the same classes."""
    root = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VADEMECUM_HOME", str(root / "home"))
        yield SimpleNamespace(
            root=root,
            folder=str(tiny_models.tiny_clip(root / "clip", layers=2)),
            data=str(toy.images(root / "images", test=5)),
            content=toy.cache(root / "one.h5"),
            other=toy.cache(root / "two.h5", classes=(*toy.CLASSES, "basophil")),
        )


@pytest.mark.parametrize("name", ["attribute-context", "attribute-prompts"])
def test_the_rank_of_a_value_is_not_swept(name: str) -> None:
    assert {v.about for v in variants(recipe_of({"name": name, "rank": 1}))[1:]} == {"knowledge"}
    ranks = [v.changes["method.rank"] for v in asked(recipe_of(CILMP), "rank")]
    assert ranks == [1, 4, 8, 16]


def test_what_a_method_reads_is_asked_of_its_settings() -> None:
    names = [v.name for v in asked(recipe_of(TEXTS), "knowledge")]
    assert names == ["shuffled", "random", "none"]
    with pytest.raises(RecipeError, match="'zero-shot' reads no knowledge"):
        variants(recipe_of({"name": "zero-shot"}))


def test_without_the_image_knowledge_is_shuffled_and_random_too() -> None:
    found = {v.name: v.changes for v in asked(recipe_of(CILMP), "image condition")}
    none = {"method.condition": "none"}
    assert found == {
        "no image condition": none,
        "shuffled, no image condition": none | {"knowledge.control": "shuffled"},
        "random, no image condition": none | {"knowledge.control": "random"},
    }


@pytest.mark.parametrize("name", ["biomedcoop", "vip"])
def test_fewer_texts(name: str) -> None:
    every = [v.name for v in asked(recipe_of({"name": name}), "texts")]
    assert every == ["1 text", "4 texts", "16 texts"]
    fewer = asked(recipe_of({"name": name}, knowledge={"keep": 4}), "texts")
    assert [v.changes for v in fewer] == [{"knowledge.keep": 1}]
    assert not asked(recipe_of(CILMP), "texts")


@pytest.mark.parametrize("control", ["cached", "shuffled", "random"])
def test_keep_leaves_the_first_texts(world: SimpleNamespace, control: Any, toy: ModuleType) -> None:
    backbone = load_backbone(BackboneSpec(folder=world.folder))
    needs: frozenset[Need] = frozenset({"texts", "symptoms"})
    kept, whole = (
        load_texts(
            KnowledgeCache.open(world.root / "one.h5"),
            KnowledgeSpec(keep=keep, control=control),
            needs,
            class_ids=toy.CLASSES,
            backbone=backbone,
            seed=1,
        )
        for keep in (3, None)
    )
    assert kept.texts is not None and whole.texts is not None
    assert [len(e) for e in kept.texts.embeddings] == [3, 3, 3]
    assert [len(e) for e in whole.texts.embeddings] == [5, 5, 5]
    assert kept.texts.strings == tuple(own[:3] for own in whole.texts.strings)
    counts = [len(own) for own in whole.symptoms or ()]
    assert [len(own) for own in kept.symptoms or ()] == [min(3, n) for n in counts]
    if control != "random":
        assert kept.symptoms == tuple(own[:3] for own in whole.symptoms or ())


def test_another_source_is_another_cache_whatever_the_recipe_expects(
    world: SimpleNamespace,
) -> None:
    recipe = recipe_of(TEXTS, world.folder, knowledge={"expect": world.content})
    assert world.other != world.content
    assert not asked(recipe_of(TEXTS), "source", other=Path("x"))[0].changes
    found = ablate(
        recipe,
        data=world.data,
        knowledge=world.root / "one.h5",
        out=world.root / "sources",
        seeds=(1,),
        only=["source"],
        sources={"other": world.root / "two.h5"},
    )
    assert [row["variant"] for row in found.rows] == ["cached", "source other"]


@pytest.mark.parametrize(
    ("method", "knowledge", "about", "left"),
    [  # of 5 descriptions, 2 to 4 symptoms, 9 layers, 8 values
        ({"name": "biomedcoop"}, {}, "texts", ["1 text", "4 texts"]),
        ({"name": "biomedcoop"}, {"keep": 40}, "texts", ["1 text", "4 texts"]),
        ({"name": "vip"}, {}, "texts", ["1 text"]),
        (CILMP, {}, "rows", ["4 rows", "8 rows"]),
        (CILMP, {"rows": "attributes"}, "rows", ["4 rows"]),
    ],
)
def test_a_variant_that_keeps_all_is_the_recipe_itself(
    world: SimpleNamespace,
    method: dict[str, object],
    knowledge: dict[str, object],
    about: str,
    left: list[str],
) -> None:
    recipe = recipe_of(method, knowledge=knowledge)
    every = [v for v in variants(recipe) if v.about in (about, "knowledge")]
    source = load_data(world.data)
    found = distinct(every, recipe, KnowledgeCache.open(world.root / "one.h5"), source)
    assert [v.name for v in found if v.about == about] == left
    assert [v.name for v in found if v.about == "knowledge"] == ["shuffled", "random", "none"]


def test_an_ablation_of_nothing_but_the_recipe_is_refused(world: SimpleNamespace) -> None:
    recipe = recipe_of({"name": "biomedcoop"}, world.folder, knowledge={"keep": 1})
    where = {"data": world.data, "knowledge": world.root / "one.h5", "out": world.root / "no"}
    with pytest.raises(RecipeError, match="this method cannot be asked that"):
        ablate(recipe, **where, only=["texts"])
    rows = recipe_of(CILMP | {"prefix": 5, "suffix": 5}, world.folder)
    match = "every variant would keep all that the recipe keeps of this cache; found at most 9"
    with pytest.raises(RecipeError, match=match):
        ablate(rows, **where, only=["rows"])
    assert not (world.root / "no").exists()


def test_a_variant_that_is_refused_is_said_and_the_others_stand(
    world: SimpleNamespace, toy: ModuleType
) -> None:
    toy.cache(world.root / "lacks.h5", classes=toy.CLASSES[:2])
    where = {"data": world.data, "knowledge": world.root / "one.h5", "seeds": (1,)}
    sources = {"lacks": world.root / "lacks.h5", "other": world.root / "two.h5"}
    recipe, out = recipe_of(TEXTS, world.folder), world.root / "refused"
    found = ablate(recipe, **where, out=out, only=["source"], sources=sources)
    assert [row["variant"] for row in found.rows] == ["cached", "source other"]
    assert isinstance(found.refused["source lacks"], MissingKnowledgeError)
    for text in (found.text(), (out / "ablation.md").read_text()):
        assert f"Not run: source lacks. {found.refused['source lacks']}" in text
    assert list(json.loads((out / "ablation.json").read_text())["refused"]) == ["source lacks"]
    del sources["other"]
    with pytest.raises(MissingKnowledgeError):
        ablate(recipe, **where, out=world.root / "none", only=["source"], sources=sources)
    assert not (world.root / "none" / "ablation.json").exists()


def test_a_row_says_more_than_its_metric_and_the_note_what_a_guess_scores(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    out = world.root / "table"
    where = {"data": world.data, "knowledge": world.root / "one.h5", "out": out, "seeds": (1, 2)}
    train, knowledge = {"epochs": 1, "batch_size": 3, "lr": 0.1, "warmup_epochs": 0}, {"keep": 2}
    recipe = recipe_of({"name": "biomedcoop"}, world.folder, train=train, knowledge=knowledge)
    with pytest.raises(RecipeError, match="no metric 'speed'; wanted accuracy"):
        ablate(recipe, **where, metric="speed")
    assert not out.exists()
    found = ablate(recipe, **where, only=["texts"], metric="ece")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("variant")]
    assert said == [f"variant {name}, seed {n}" for name in ("cached", "1 text") for n in (1, 2)]
    for row, folder in zip(found.rows, ("cached", "1-text"), strict=True):
        known = [json.loads((r / "eval/test/metrics.json").read_text())["metrics"]
                 for r in find_runs([out / folder])]  # fmt: skip
        for name, value in row["beside"].items():
            assert value == pytest.approx(statistics.fmean(one[name] for one in known))
        assert set(row["beside"]) == {"balanced_accuracy", "macro_f1"}
    barely = replace(found, rows=({**found.rows[1], "ahead": [-0.0001, -0.0004, 0.1]},))
    assert "+0.000 [+0.000, +0.100]" in barely.text("csv")
    head = replace(found, metric="macro_f1").text("csv").splitlines()[0]
    assert head.startswith("variant,about,macro F1,balanced accuracy,cached is ahead")
    base, one = found.rows[:2]
    assert one["ahead"][0] == pytest.approx(one["value"] - base["value"])  # a low error is ahead
    guess = "the best constant answer has accuracy 0.333, balanced accuracy 0.333, macro F1 0.167."
    assert found.note.startswith("15 images, 2 seeds; ")
    assert found.note.endswith(guess)
    head = found.text("csv").splitlines()[0]
    assert head.startswith("variant,about,ECE,balanced accuracy,macro F1,cached is ahead")
