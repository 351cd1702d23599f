"""Joining recipes and provenance: in any order, any number of times, with one result.

A *join* is commutative, associative and idempotent, which is what makes merged files equal byte by
byte. Both directions stand here: what a merged recipe was made of, and what parts become.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from cache.recipe import canonical_json, digest_of

MERGED = "merged"
Recipe = Mapping[str, Any]


def recipes_of(recipe: Recipe) -> list[Recipe]:
    """The recipes a merged one was made of; any other recipe is its own only part."""
    parts = recipe.get(MERGED)
    if set(recipe) != {MERGED} or not isinstance(parts, list):
        return [recipe]
    if not all(isinstance(part, dict) for part in parts):
        return [recipe]
    return [inner for part in parts for inner in recipes_of(part)]


def classes_of(recipe: Recipe) -> dict[str, Any] | None:
    """The classes of a recipe by id; None if it has no list of tables with distinct ids."""
    classes = recipe.get("classes")
    if not isinstance(classes, list) or not all(isinstance(one, dict) for one in classes):
        return None
    ids = [one.get("id") for one in classes]
    if not all(isinstance(i, str) for i in ids) or len(set(ids)) != len(ids):
        return None
    return {str(one["id"]): one for one in classes}


def with_classes(recipe: Recipe, classes: Mapping[str, Any]) -> dict[str, Any]:
    """`recipe` with these classes, sorted by id."""
    return {**recipe, "classes": [classes[name] for name in sorted(classes)]}


def _rest(recipe: Recipe) -> str:
    """What two recipes must agree in to become one."""
    if classes_of(recipe) is None:
        return digest_of(recipe)
    return digest_of({**recipe, "classes": None})


def as_one(recipes: Iterable[Recipe]) -> dict[str, Any]:
    """Recipes that are different as one: itself, or a table of all of them."""
    by_digest = {digest_of(recipe): dict(recipe) for recipe in recipes}
    parts = [by_digest[digest] for digest in sorted(by_digest)]
    return parts[0] if len(parts) == 1 else {MERGED: parts}


def join_recipes(
    named: Iterable[tuple[str, Recipe]], prefer: str | None
) -> tuple[dict[str, Any], list[tuple[str, tuple[str, ...]]]]:
    """All recipes as one, and the classes that two files describe differently in one recipe.

    Args:
        named: recipes, with the name of the file each comes from.
        prefer: the file whose description of a class wins.
    """
    groups: dict[str, Recipe] = {}
    versions: dict[str, dict[str, dict[str, tuple[Any, list[str]]]]] = {}
    for file, whole in named:
        for recipe in recipes_of(whole):
            rest = _rest(recipe)
            groups[rest] = recipe
            for name, one in (classes_of(recipe) or {}).items():
                known = versions.setdefault(rest, {}).setdefault(name, {})
                known.setdefault(digest_of(one), (one, []))[1].append(file)
    conflicts = []
    for rest, classes in versions.items():
        chosen = {}
        for name, known in classes.items():
            found = list(known.values())
            winner = next((one for one, files in found if prefer in files), None)
            if len(found) > 1 and winner is None:
                conflicts.append((name, tuple(files[0] for _, files in found)))
            chosen[name] = found[0][0] if winner is None else winner
        groups[rest] = with_classes(groups[rest], chosen)
    return as_one(groups.values()), sorted(conflicts)


def _plain_texts(text: str) -> list[str] | None:
    """The texts in a canonical list of at least two that are sorted and distinct, else None."""
    if not text.startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or len(found) < 2 or not all(type(t) is str for t in found):
        return None
    canonical = found == sorted(set(found)) and canonical_json(found).decode("ascii") == text
    return found if canonical else None


def texts_of(text: str) -> list[str]:
    """The texts that were joined in a value of provenance; any other is its own only one."""
    return _plain_texts(text) or [text]


def join_provenance(tables: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """All tables as one; different texts under one key become a canonical list of them."""
    sets: dict[str, set[str]] = {}
    for table in tables:
        for key, text in table.items():
            sets.setdefault(key, set()).update(texts_of(text))
    return {
        key: next(iter(texts)) if len(texts) == 1 else canonical_json(sorted(texts)).decode("ascii")
        for key, texts in sets.items()
    }
