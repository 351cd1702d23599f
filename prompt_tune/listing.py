"""What comes with the package, by name, each with one line. Nothing heavy is imported for it."""

import ast
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from cache.errors import UnknownNameError
from cache.recipe import read_yaml
from cache.registry import suggest
from prompt_tune.methods import METHODS

HERE = Path(__file__).parent
PRESETS = {"recipes": HERE / "presets", "alignment": HERE / "presets" / "align"}
DATA = HERE / "data" / "presets"
Row = Mapping[str, Any]


def listing(
    kind: str | None = None, *, others: Mapping[str, Path] | None = None
) -> dict[str, list[Row]]:
    """What there is of one kind, or of all: rows with `name` and `about`, data sets with more.

    Args:
        kind: `methods`, `recipes`, `alignment`, `data` or one of `others`.
        others: folders of recipes by kind.

    Raises:
        UnknownNameError: no such kind.
    """
    folders = {**PRESETS, **(others or {})}
    known = ["methods", "data", *folders]
    if kind is not None and kind not in known:
        what = f"unknown kind {kind!r}"
        raise UnknownNameError(what, do=suggest(kind, known))
    found: dict[str, list[Row]] = {}
    if kind in {None, "methods"}:
        found["methods"] = [_method(name) for name in METHODS]
    for name, folder in folders.items():
        if kind in {None, name}:
            found[name] = [_recipe(path) for path in _files(folder)]
    if kind in {None, "data"}:
        found["data"] = [_data(path) for path in _files(DATA)]
    return found


def describe(found: Mapping[str, list[Row]]) -> str:
    """The listing as lines for a terminal."""
    lines = []
    for kind, rows in found.items():
        width = max(len(row["name"]) for row in rows)
        lines += ["", kind, *(f"  {row['name']:<{width}}  {row['about']}" for row in rows)]
    return "\n".join(lines[1:])


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"), key=lambda path: path.stem)


def _method(name: str) -> Row:
    path = METHODS.folder / f"{name.replace('-', '_')}.py"
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return {"name": name, "about": told.partition("\n")[0]}


def _recipe(path: Path) -> Row:
    """A recipe begins with a comment: its command alone in a line, or what it is in a sentence."""
    lines = path.read_text(encoding="utf-8").splitlines()
    told = [line.strip("# ") for line in takewhile(lambda line: line.startswith("#"), lines)]
    is_command = told[0].startswith("vademecum ")
    about = told[0] if is_command else " ".join(told).partition(". ")[0].rstrip(".") + "."
    return {"name": path.stem, "about": about}


def _data(path: Path) -> Row:
    facts = read_yaml(path)
    told = {"classes": len(facts["classes"]), "modality": facts["modality"]}
    return {"name": path.stem, "about": "{classes} classes, {modality}".format(**told), **told}
