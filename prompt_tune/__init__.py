"""Stage two: prompt tuning of a frozen vision-language backbone against a sealed knowledge cache.

    recipe = load_tune_recipe("cilmp")                       # a preset, or a file
    tune(recipe, data="bloodmnist", knowledge=cache, out=run)  # trains, leaves a run folder
    evaluate(run, split="test")                              # metrics, predictions, figures

Nothing heavy is imported until one of these names is used.
"""

import importlib
from typing import Any

from cache.extras import STAGE_TWO, need
from cache.torchvision_schemas import install

DISTRIBUTION = "vademecum"
_OFFERED = {
    "TuneRecipe": "recipe",
    "align_data": "align_run",
    "compare_runs": "compare",
    "evaluate": "evaluation",
    "load_align_recipe": "align_run",
    "load_backbone": "backbone",
    "load_data": "data",
    "load_run": "evaluation",
    "load_tune_recipe": "recipe",
    "tune": "tuning",
    "tune_many": "many",
}

install()


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    need("tuning", *STAGE_TWO, extra="tune")
    return getattr(importlib.import_module(f"{__name__}.{_OFFERED[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
