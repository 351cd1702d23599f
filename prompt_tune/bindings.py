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


def differing(run: Mapping[str, Any], recipe: TuneRecipe, bindings: Mapping[str, Any]) -> list[str]:
    """The dotted keys of the recipe, and then the bindings, in which a stored run is another.

    Where the backbone lies does not count, nor what the recipe does not use.
    """
    found, wanted = _leaves(run["recipe"]), _leaves(recipe.model_dump(mode="json"))
    keys = [
        key
        for key in (*wanted, *sorted(set(found) - set(wanted)))
        if found.get(key, LATER.get(key)) != wanted.get(key) and not key.startswith("backbone.")
    ]
    if found.get("train.views") == wanted["train.views"] == 1 and "train.flip" in keys:
        keys.remove("train.flip")
    known = _used(run["bindings"])
    return keys + [k for k, value in _used(bindings).items() if known.get(k) != value]


def _leaves(table: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Every value that is no table, by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict)
        found |= _leaves(value, f"{place}{key}.") if inner else {f"{place}{key}": value}
    return found


def _used(bindings: Mapping[str, Any]) -> dict[str, Any]:
    """The bindings, and of the cache only the blocks that were read."""
    if "cache" not in bindings:
        return dict(bindings)
    used = {"block", "block_id", "texts"}
    return {**bindings, "cache": {k: v for k, v in bindings["cache"].items() if k in used}}


def _digest(recipe: Mapping[str, Any], bindings: Mapping[str, Any]) -> str:
    return digest_of({"recipe": recipe, "bindings": {"cache": {}, **_used(bindings)}})


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
