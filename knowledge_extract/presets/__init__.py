"""Recipes that come with the package, found by name."""

from importlib.resources import as_file, files
from pathlib import Path

from cache.errors import UnknownNameError
from cache.registry import suggest

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """The names `preset_path` knows."""
    here = files("knowledge_extract.presets")
    return sorted(p.name.removesuffix(".yaml") for p in here.iterdir() if p.name.endswith(".yaml"))


def preset_path(name: str) -> Path:
    """The file of the preset called `name`.

    Raises:
        UnknownNameError: no such preset.
    """
    known = preset_names()
    if name not in known:
        what = f"unknown preset {name!r}"
        raise UnknownNameError(what, do=suggest(name, known))
    with as_file(files("knowledge_extract.presets") / f"{name}.yaml") as path:
        return path
