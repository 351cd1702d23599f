"""The example of CONTRIBUTING.md is a method, by being saved and by nothing else."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import prompt_tune.methods
from cache.errors import UnknownNameError
from cache.recipe import validate
from prompt_tune.evaluation import evaluate
from prompt_tune.methods import METHODS
from prompt_tune.recipe import TuneRecipe
from prompt_tune.tuning import tune


def test_the_example_is_a_method(
    root: Path,
    tmp_path: Path,
    toy: ModuleType,
    tiny_models: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    text = (root / "CONTRIBUTING.md").read_text()
    name = re.search(r"`prompt_tune/methods/(\w+)\.py` it is known", text)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert name and code
    recipe = {
        "backbone": {"folder": str(tiny_models.tiny_clip(tmp_path / "clip", layers=2))},
        "method": {"name": name[1].replace("_", "-")},
        "train": {"epochs": 3, "batch_size": 6, "lr": 0.5, "warmup_epochs": 0},
    }
    with pytest.raises(UnknownNameError):
        validate(TuneRecipe, recipe, where="test")

    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / f"{name[1]}.py").write_text(code[1])
    monkeypatch.setattr(METHODS, "folder", folder)
    monkeypatch.setattr(prompt_tune.methods, "__path__", [str(folder)])
    run = tune(
        validate(TuneRecipe, recipe, where="test"),
        data=str(toy.images(tmp_path / "images")),
        out=tmp_path / "run",
    )
    del sys.modules[f"prompt_tune.methods.{name[1]}"]
    assert run.run["parameters"] == {"scalars": 3, "tensors": 1}
    history = run.run["training"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert evaluate(tmp_path / "run").result["images"] == 12
