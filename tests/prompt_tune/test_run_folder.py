"""Run folders: overwritten whole, never half-written, evaluated once, found from anywhere."""

import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
from PIL import Image

from cache.errors import (
    DataError,
    MissingKnowledgeError,
    ModelError,
    RecipeError,
    RunError,
    StorageError,
)
from cache.recipe import validate
from prompt_tune import many
from prompt_tune.checkpoint import read_run
from prompt_tune.compare import compare_runs
from prompt_tune.evaluation import evaluate
from prompt_tune.many import tune_many
from prompt_tune.recipe import TuneRecipe
from prompt_tune.tuning import tune

COOP = {"name": "coop"}
CILMP = {
    "name": "cilmp", "text_depth": 1, "visual_depth": 0, "prefix": 1, "suffix": 1, "rank": 2,
}  # fmt: skip
OURS = {
    "run.json", "weights.safetensors", "curves.png", "samples/train.json", "samples/val.json",
    "eval/test/metrics.json", "eval/test/predictions.csv", "eval/test/confusion.png",
    "eval/test/reliability.png", "eval/test-9/metrics.json", "eval/test-9/samples.json",
    "eval/test-9/predictions.csv", "eval/test-9/confusion.png", "eval/test-9/reliability.png",
}  # fmt: skip


def recipe_of(problem: SimpleNamespace, **changes: object) -> TuneRecipe:
    base = {
        "backbone": {"folder": str(problem.backbone)},
        "method": COOP,
        "samples": {"shots": 2, "val_shots": 1},
        "train": {"epochs": 2, "batch_size": 3, "lr": 0.01},
    }
    return validate(TuneRecipe, base | changes, where="test")


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_overwrite_removes_what_the_earlier_run_left_and_no_other_file(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    tune(recipe_of(problem), data=problem.data, out=out)
    evaluate(out, resamples=10)
    evaluate(out, part=9, resamples=10)
    assert files(out) == OURS
    first = (out / "samples" / "train.json").read_text()
    for name in ("notes.txt", "eval/mine.txt", "samples/mine.json", "eval/test/mine.png"):
        (out / name).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "metrics.json").write_text("{}")
    (out / "eval" / "linked").symlink_to(tmp_path / "elsewhere")

    other = recipe_of(problem, method={"name": "zero-shot"}, samples={"shots": 2, "seed": 9})
    tune(other, data=problem.data, out=out, overwrite=True)
    mine = {"notes.txt", "eval/mine.txt", "samples/mine.json", "eval/test/mine.png"}
    left = {"run.json", "weights.safetensors", "samples/train.json", "samples/val.json"}
    assert files(out) == mine | left
    assert (tmp_path / "elsewhere" / "metrics.json").exists()
    assert (out / "samples" / "train.json").read_text() != first
    for name in mine:
        assert (out / name).read_text() == "mine"
    with pytest.raises(RunError, match="not evaluated on 'test'"):
        compare_runs([out], split="test")


def test_a_run_that_cannot_start_overwrites_nothing(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    tune(recipe_of(problem), data=problem.data, out=tmp_path / "run")
    before = files(tmp_path / "run")
    bad = recipe_of(problem, samples={"shots": 50})
    with pytest.raises(DataError, match="too few images for 50 shots"):
        tune(bad, data=problem.data, out=tmp_path / "run", overwrite=True)
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"backbone": {"folder": "/nowhere"}}, ModelError),
        ({"method": CILMP, "knowledge": {"block": "none"}}, MissingKnowledgeError),
        ({"method": CILMP | {"context": "one two three four five six seven"}}, RecipeError),
    ],
    ids=["backbone", "knowledge", "method"],
)
def test_nothing_is_written_before_everything_is_loaded(
    problem: SimpleNamespace, tmp_path: Path, changes: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        tune(
            recipe_of(problem, **changes),
            data=problem.data,
            knowledge=problem.knowledge,
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_a_stale_evaluation_is_not_compared(problem: SimpleNamespace, tmp_path: Path) -> None:
    out, metrics = tmp_path / "run", tmp_path / "run" / "eval" / "test" / "metrics.json"
    tune(recipe_of(problem), data=problem.data, out=out)
    result = evaluate(out, resamples=10).result
    assert result["run"] == read_run(out)["digest"]
    assert compare_runs([out], split="test").rows
    old = metrics.read_bytes()
    tune(recipe_of(problem, seed=2), data=problem.data, out=out, overwrite=True)
    for key in ("run", "weights"):  # an earlier recipe; the same recipe with other weights
        run = read_run(out)
        fields = json.loads(old) | {"run": run["digest"], "weights": run["weights"]}
        fields[key] = result[key]
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_text(json.dumps(fields))
        match = r"eval/test/metrics\.json is of an earlier run or of other weights\. Run `vademecum"
        with pytest.raises(RunError, match=match):
            compare_runs([out], split="test")
    metrics.unlink()
    evaluate(out, resamples=10)
    assert compare_runs([out], split="test").rows


def test_a_report_of_two_data_sets_names_the_command_for_them(
    problem: SimpleNamespace, tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = recipe_of(problem, method={"name": "zero-shot"})
    places = {"one": problem.data, "part": problem.data}
    monkeypatch.setattr(toy, "DATASET", "others")
    places["two"] = str(toy.images(tmp_path / "images", test=3))
    for name, data in places.items():
        tune(zero, data=data, out=tmp_path / name)
        evaluate(tmp_path / name, part=6 if name == "part" else None, resamples=10)
    (tmp_path / "part" / "eval" / "test-6").rename(tmp_path / "part" / "eval" / "test")
    advice = r"on different images; found .*/one and .*"
    with pytest.raises(RunError, match=rf"{advice}/two\. Use `vademecum compare` for several data"):
        compare_runs([tmp_path / "one", tmp_path / "two"], split="test")
    with pytest.raises(RunError, match=rf"{advice}/part$"):
        compare_runs([tmp_path / "one", tmp_path / "part"], split="test")


def test_many_runs_evaluate_again_what_is_stale(
    problem: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go() -> None:
        tune_many(recipe_of(problem), [{"seed": 1}], data=problem.data, out=tmp_path, split="test")

    go()
    metrics = tmp_path / "seed=1" / "eval" / "test" / "metrics.json"
    fresh = metrics.read_bytes()
    metrics.write_text(json.dumps(json.loads(fresh) | {"weights": "0" * 64}))
    go()
    assert metrics.read_bytes() == fresh
    monkeypatch.setattr(many, "evaluate", None)
    go()


def test_changed_weights_are_not_evaluated(problem: SimpleNamespace, tmp_path: Path) -> None:
    tune(recipe_of(problem), data=problem.data, out=tmp_path / "run")
    weights = tmp_path / "run" / "weights.safetensors"
    changed = {n: t + 1 for n, t in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(changed, weights)
    with pytest.raises(RunError, match="the weights are not those that the run left; found"):
        evaluate(tmp_path / "run")


def test_run_json_has_the_headline_of_every_evaluation(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    tune(recipe_of(problem), data=problem.data, out=out)
    digest = read_run(out)["digest"]
    results = {
        name: evaluate(out, split=split, part=part, resamples=10).result
        for name, split, part in (("test", "test", None), ("test-9", "test", 9), ("val", "val", 6))
    }
    results["val-6"] = results.pop("val")
    strict = json.loads((out / "run.json").read_text(), parse_constant=lambda text: math.nan / 0)
    assert strict["digest"] == digest
    assert set(strict["metrics"]) == set(results)
    for name, result in results.items():
        entry = strict["metrics"][name]
        assert entry["file"] == f"eval/{name}/metrics.json"
        assert json.loads((out / entry["file"]).read_text())["data"] == entry["data"]
        for key in ("accuracy", "balanced_accuracy", "macro_f1"):
            assert entry[key] == result["metrics"][key]
    again = tune(recipe_of(problem), data=problem.data, out=out)
    assert again.run["metrics"] == strict["metrics"]


def test_changed_test_images_are_refused_until_the_evaluation_is_removed(
    problem: SimpleNamespace, tmp_path: Path, toy: ModuleType
) -> None:
    data = toy.images(tmp_path / "images")
    tune(recipe_of(problem), data=str(data), out=tmp_path / "run")
    evaluate(tmp_path / "run", resamples=10)
    evaluate(tmp_path / "run", resamples=10)
    place = tmp_path / "run" / "eval" / "test"
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    image = tmp_path / "images" / "test" / toy.CLASSES[0] / "0.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image)
    with pytest.raises(
        RunError, match=r"eval/test: the run was evaluated on other images here.*Remove this folder"
    ):
        evaluate(tmp_path / "run", resamples=10)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    found = evaluate(tmp_path / "run", resamples=10).result
    assert read_run(tmp_path / "run")["metrics"]["test"]["data"] == found["data"]


def test_a_run_is_evaluated_from_any_folder(
    problem: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(problem.folder)
    recipe = recipe_of(problem, method=CILMP, backbone={"folder": "backbone"})
    out = tmp_path / "run"
    tune(recipe, data="images.yaml", knowledge=Path("toy.h5"), out=out)
    run = read_run(out)
    assert run["recipe"]["backbone"]["folder"] == "backbone"
    assert run["local"] == {
        "data": str(problem.folder / "images.yaml"),
        "knowledge": str(problem.folder / "toy.h5"),
        "backbone": str(problem.folder / "backbone"),
    }
    monkeypatch.chdir(tmp_path)
    assert evaluate(Path("run"), resamples=10).result["images"] == 12
    run["local"]["backbone"] = None
    (out / "run.json").write_text(json.dumps(run))
    with pytest.raises(ModelError, match="backbone"):
        evaluate(Path("run"), resamples=10)


def test_presets_and_hub_ids_stay_as_they_are(tmp_path: Path, monkeypatch: Any) -> None:
    from prompt_tune.run_folder import absolute

    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    assert absolute("bloodmnist") == "bloodmnist"
    assert absolute("hub:some/data@main") == "hub:some/data@main"
    assert absolute("images") == str(tmp_path / "images")


def test_a_file_in_the_path_is_one_line(problem: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    match = r"file/run.*: a part of the path is not a folder\. Check the path"
    for overwrite in (False, True):
        with pytest.raises(StorageError, match=match):
            tune(
                recipe_of(problem, method={"name": "zero-shot"}),
                data=problem.data,
                out=tmp_path / "file" / "run",
                overwrite=overwrite,
            )
    tune(recipe_of(problem, method={"name": "zero-shot"}), data=problem.data, out=tmp_path / "run")
    evaluate(tmp_path / "run", resamples=10)
    with pytest.raises(StorageError, match=match):
        compare_runs([tmp_path / "run"], split="test", out=tmp_path / "file" / "run")
