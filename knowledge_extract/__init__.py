"""Stage one: a language model read once per dataset into a sealed knowledge cache.

    recipe = load_extract_recipe("bloodmnist-demo")  # a preset, or a file
    plan(recipe, out, settings)                      # what it will cost; loads no weights
    extract(recipe, out, settings)                   # does it
    extract_many([(recipe, out), ...], settings)     # several, with one load of a shared model

Nothing heavy is imported until one of these names is used.
"""

import importlib
from typing import Any

from cache.extras import STAGE_ONE, need
from cache.torchvision_schemas import install

DISTRIBUTION = "vademecum"
_OFFERED = {
    "AuditReport": "auditing",
    "ExtractRecipe": "recipe",
    "ExtractResult": "extraction",
    "Plan": "planning",
    "RunSettings": "settings",
    "audit": "auditing",
    "compare_blocks": "compare",
    "extract": "extraction",
    "extract_many": "extraction",
    "load_extract_recipe": "recipe",
    "plan": "planning",
    "preset_path": "presets",
}

install()


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    if _OFFERED[name] in {"auditing", "extraction", "planning"}:
        need("reading a language model", *STAGE_ONE, extra="extract")
    return getattr(importlib.import_module(f"{__name__}.{_OFFERED[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
