"""What a recipe refuses, and what presets set."""

from pathlib import Path
from typing import Any

import pytest

from cache.errors import RecipeError
from cache.recipe import validate
from prompt_tune.align_run import load_align_recipe
from prompt_tune.recipe import TuneRecipe, load_tune_recipe


def recipe_of(name: str = "coop", **parts: Any) -> TuneRecipe:
    plain = {"backbone": {"folder": "tower"}, "method": {"name": name}, **parts}
    return validate(TuneRecipe, plain, where="test")


def test_the_best_epoch_needs_validation_images() -> None:
    best, none = {"select": "best-val"}, {"shots": 2, "val_shots": 0}
    message = (
        r"samples\.val_shots: train\.select best-val needs validation images; found 0, wanted >= 1 "
        r"or null\. Give some, or set train\.select to last"
    )
    with pytest.raises(RecipeError, match=message):
        recipe_of(train=best, samples=none)
    assert recipe_of(train=best, samples={"shots": 2}).train.select == "best-val"
    assert recipe_of(samples=none).train.select == "last"
    recipe_of("linear-probe", train=best, samples=none)  # has no epochs


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        (["aligned=F"], {"aligned": "F"}),
        (["folder=F", "hub=null"], {"folder": "F"}),
        (["arch=A", "weights=W"], {"arch": "A", "weights": "W"}),
        (["revision=v2"], {"hub": "org/model", "revision": "v2"}),
        (["hub=other"], {"hub": "other", "revision": "v1"}),
    ],
)
def test_one_place_of_a_backbone_replaces_the_others(
    tmp_path: Path, chosen: list[str], found: dict[str, str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("backbone: {hub: org/model, revision: v1}\nmethod: {name: coop}\n")
    recipe = load_tune_recipe(str(file), tuple(f"backbone.{one}" for one in chosen))
    assert recipe.backbone.model_dump(exclude_none=True) == found


@pytest.mark.parametrize(
    ("chosen", "match"),
    [
        (["aligned=F", "hub=other"], "exactly one place; found hub and aligned"),
        (["aligned=F", "revision=v2"], "a revision belongs to a hub model; found with aligned"),
    ],
)
def test_two_places_set_together_are_refused(chosen: list[str], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load_tune_recipe("coop", tuple(f"backbone.{one}" for one in chosen))


def test_towers_of_an_alignment_are_replaced_too() -> None:
    spec = load_align_recipe("clip-minilm", ("image.folder=I", "text.folder=T"))
    assert spec.image.model_dump(exclude_none=True) == {"folder": "I"}
    assert (spec.text.asset, spec.text.folder) == (None, "T")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.epochs=three", "train.epochs: wrong value; found 'three', wanted a whole number"),
        ("train.lr=true", "train.lr: wrong value; found true, wanted a number"),
        ("train.views=0", "train.views: wrong value; found 0, wanted >= 1 or 'live'"),
        ("samples.shots=0", "samples.shots: wrong value; found 0, wanted >= 1"),
        ("train=3", "train: wrong value; found 3, wanted a table"),
        ("classes=[1, 2]", "classes.0: wrong value; found 1, wanted a text"),
        ("method.rank=x", "method.rank: wrong value; found 'x', wanted a whole number"),
        ("method.rankk=1", "unknown key 'method.rankk'. Did you mean 'rank'?"),
    ],
)
def test_a_bad_override_is_named(override: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_tune_recipe("cilmp", ("seed=2", override))
    assert str(caught.value).startswith(f"--set {override}: {text}")


def test_a_bad_value_of_a_file_is_the_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("backbone: {folder: F}\nmethod: {name: coop}\ntrain: {epochs: three}\n")
    with pytest.raises(RecipeError) as caught:
        load_tune_recipe(str(file), ("train.lr=0.1",))
    assert str(caught.value).startswith(f"{file}: train.epochs: wrong value; found 'three'")


def test_presets_mirror_where_their_source_does() -> None:
    never = ("cocoop", "kgcoop", "prograd", "biomedcoop", "biomed-dpt", "biomed-dpt-ensemble")
    assert not any(load_tune_recipe(name).train.flip for name in never)
    mirrored = ("coop", "cilmp", "cilmp-published", "vip", "maple", "promptsrc")
    assert all(load_tune_recipe(name).train.flip for name in mirrored)
