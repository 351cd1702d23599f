"""What a run is bound to: its recipe, data, backbone and knowledge, as one digest."""

import functools
from collections.abc import Mapping
from typing import Any

from cache.recipe import digest_of
from prompt_tune.recipe import TuneRecipe

LATER = {
    "classes": None,
    "train.optimizer": "sgd",
    "train.precision": "fp32",
    "train.max_gb": None,
    "train.compile": False,
    "train.flip": True,
    "knowledge.texts": "descriptions",
    "knowledge.symptoms": "symptoms",
    "knowledge.attributes": "attributes",
}
"""Keys that recipes got after runs were made with them, and the value that changes nothing."""


def binding_digest(recipe: TuneRecipe, bindings: Mapping[str, Any]) -> str:
    """What a saved state must have been made with: the recipe and everything it was bound to.

    The backbone counts by its fingerprint, not by where it lies; the cache by the blocks that were
    used, not by the whole file. A recipe without one of the `LATER` keys counts as it would if
    that key did not exist.
    """
    return _digest({k: v for k, v in _counted(recipe).items() if k != "backbone"}, bindings)


def made_with(run: Mapping[str, Any], recipe: TuneRecipe, bindings: Mapping[str, Any]) -> bool:
    """Whether a stored run was made with this recipe and bound to the same.

    In digests of earlier runs the backbone's place, as the recipe spelt it, counted too.
    """
    place = run["recipe"]["backbone"]
    found = (
        binding_digest(recipe, bindings),
        _digest(_counted(recipe) | {"backbone": place}, bindings),
    )
    return run["digest"] in found


def _digest(recipe: Mapping[str, Any], bindings: Mapping[str, Any]) -> str:
    used = {"block", "block_id", "texts"}
    cache_part = {k: v for k, v in bindings.get("cache", {}).items() if k in used}
    return digest_of({"recipe": recipe, "bindings": {**bindings, "cache": cache_part}})


def _counted(recipe: TuneRecipe) -> dict[str, Any]:
    plain = recipe.model_dump()
    for key, default in LATER.items():
        *path, last = key.split(".")
        table = functools.reduce(dict[str, Any].__getitem__, path, plain)
        if table[last] == default:
            del table[last]
    if recipe.train.views == 1:
        plain["train"].pop("flip", None)  # a switch of views that are not taken
    return plain
