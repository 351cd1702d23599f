"""Both stages in sequence on tiny models with the structure of the real ones."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import cli
from cache.recipe import validate
from prompt_tune import loop
from prompt_tune.evaluation import evaluate
from prompt_tune.recipe import TuneRecipe
from prompt_tune.tuning import tune


@pytest.fixture(scope="module")
def extracted(
    root: Path,
    load: Callable[[Path], ModuleType],
    tmp_path_factory: pytest.TempPathFactory,
    toy: ModuleType,
    tiny_models: ModuleType,
) -> Iterator[SimpleNamespace]:
    """Knowledge really extracted from a random language model, and a BiomedCLIP-like backbone."""
    builders = load(root / "tests" / "knowledge_extract" / "conftest.py")
    folder = tmp_path_factory.mktemp("whole")
    builders.save_model(folder / "language-model", "gpt2")
    classes = [
        {
            "id": name, "name": name, "modality": "blood smear",
            "descriptions": [f"the {name} is seen", f"a {name} again"],
            "attributes": {"colour": ["red"], "size": ["small", "large"]},
        }
        for name in toy.CLASSES
    ]  # fmt: skip
    states = {"kind": "states"}
    recipe = {
        "dataset": toy.DATASET,
        "model": {"folder": str(folder / "language-model")},
        "templates": {"question": "What is {name}?"},
        "store_dtype": "float32",
        "classes": classes,
        "blocks": {
            "answers": {"kind": "answers", "max_new_tokens": 4},
            "layers": states | {"of": "answers", "pooling": "end_token", "layers": "all"},
            "description_states": states | {"of": "descriptions", "pooling": "mean", "layers": [4]},
            "attribute_states": states
            | {"of": "attributes", "pooling": "last_token", "layers": [-1]},
            "tokens": states | {"of": "descriptions", "pooling": "all_tokens", "layers": [2]},
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    out = folder / "toy.h5"
    patch = pytest.MonkeyPatch()
    patch.setenv("VADEMECUM_HOME", str(folder / "home"))
    result = CliRunner().invoke(
        cli.app, ["extract", str(folder / "recipe.yaml"), "--out", str(out), "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    yield SimpleNamespace(
        folder=folder,
        knowledge=out,
        data=str(toy.images(folder / "images")),
        backbone=tiny_models.tiny_biomedclip(folder / "backbone"),
    )
    patch.undo()


def _recipe(extracted: SimpleNamespace, **changes: object) -> TuneRecipe:
    base = {
        "backbone": {"folder": str(extracted.backbone)},
        "method": {
            "name": "cilmp", "text_depth": 3, "visual_depth": 2, "visual_prompts": 2,
            "prefix": 1, "suffix": 1, "rank": 2,
        },
        "samples": {"shots": 2},
        "train": {"epochs": 2, "batch_size": 3, "lr": 0.01, "average": "prompts", "views": "live"},
    }  # fmt: skip
    return validate(TuneRecipe, base | changes, where="test")


@pytest.mark.slow
def test_extract_tune_resume_eval_with_deep_prompts(
    extracted: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(extracted)
    more = {"data": extracted.data, "knowledge": extracted.knowledge}
    tune(recipe, out=tmp_path / "whole", **more)

    save = loop.save_state

    def interrupted(folder: Path, state: loop.TrainState, *, recipe_digest: str) -> None:
        save(folder, state, recipe_digest=recipe_digest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(recipe, out=tmp_path / "stopped", **more)
    tune(recipe, out=tmp_path / "stopped", **more)
    first, second = (
        safetensors.torch.load_file(tmp_path / name / "weights.safetensors")
        for name in ("whole", "stopped")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(name.startswith("visual_prompt") for name in first)
    assert evaluate(tmp_path / "stopped").result["images"] == 12


@pytest.mark.parametrize("rows", ["layers", "texts", "attributes", "tokens"])
def test_every_kind_of_rows_on_extracted_states(
    extracted: SimpleNamespace, tmp_path: Path, rows: str
) -> None:
    method = {
        "name": "cilmp", "text_depth": 2, "visual_depth": 0, "prefix": 1, "suffix": 1, "rank": 2,
    }  # fmt: skip
    recipe = _recipe(
        extracted,
        method=method,
        knowledge={"rows": rows},
        train={"epochs": 1, "batch_size": 3, "lr": 0.01},
    )
    run = tune(recipe, data=extracted.data, knowledge=extracted.knowledge, out=tmp_path / "run").run
    assert run["bindings"]["cache"]["block"] == {
        "layers": "layers", "texts": "description_states", "attributes": "attribute_states",
        "tokens": "tokens",
    }[rows]  # fmt: skip


def test_json_on_the_command_line_is_json(extracted: SimpleNamespace) -> None:
    for arguments in (
        ["cache", "inspect", str(extracted.knowledge), "--json"],
        ["cache", "verify", str(extracted.knowledge), "--json"],
        ["assets", "list", "--json"],
    ):
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)


def test_published_precision_and_averaging_run_and_evaluate(
    extracted: SimpleNamespace, tmp_path: Path
) -> None:
    """The published preset at toy size: fp16 parameters, and a backbone that was averaged too."""
    method = {
        "name": "cilmp", "text_depth": 2, "visual_depth": 1, "visual_prompts": 2, "prefix": 1,
        "suffix": 1, "rank": 2, "precision": "published",
    }  # fmt: skip
    train = {"epochs": 2, "batch_size": 3, "lr": 0.01, "average": "published", "views": "live"}
    recipe = _recipe(extracted, method=method, train=train)
    more = {"data": extracted.data, "knowledge": extracted.knowledge}
    result = tune(recipe, out=tmp_path / "run", **more)
    assert result.setup is not None
    tensors = safetensors.torch.load_file(tmp_path / "run" / "weights.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16, torch.float32}
    again = evaluate(tmp_path / "run").result["metrics"]
    assert evaluate(tmp_path / "run", setup=result.setup).result["metrics"] == again
