"""What a recipe refuses, and what presets set."""

from typing import Any

import pytest

from cache.errors import RecipeError
from cache.recipe import validate
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


def test_presets_mirror_where_their_source_does() -> None:
    never = ("cocoop", "kgcoop", "prograd", "biomedcoop", "biomed-dpt", "biomed-dpt-ensemble")
    assert not any(load_tune_recipe(name).train.flip for name in never)
    mirrored = ("coop", "cilmp", "cilmp-published", "vip", "maple", "promptsrc")
    assert all(load_tune_recipe(name).train.flip for name in mirrored)
