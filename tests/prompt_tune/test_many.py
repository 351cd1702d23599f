"""Seeds and grids in one process: each run is the one it would be alone."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

import cli
from cache.errors import MissingKnowledgeError, RecipeError, RunError
from cache.recipe import validate
from prompt_tune import many, shelf
from prompt_tune.evaluation import evaluate
from prompt_tune.many import combinations, parse_grid, parse_seeds, tune_many
from prompt_tune.recipe import TuneRecipe
from prompt_tune.tuning import tune

CILMP = {
    "name": "cilmp", "text_depth": 2, "visual_depth": 0, "prefix": 1, "suffix": 1, "rank": 2,
}  # fmt: skip


def recipe_of(problem: SimpleNamespace, **changes: object) -> TuneRecipe:
    base = {
        "backbone": {"folder": str(problem.backbone)},
        "method": CILMP,
        "samples": {"shots": 2, "val_shots": 1},
        "train": {"epochs": 2, "batch_size": 3, "lr": 0.01, "views": 2},
    }
    return validate(TuneRecipe, base | changes, where="test")


def files(run: Path) -> dict[str, bytes]:
    names = ("weights.safetensors", "eval/test/metrics.json", "eval/test/predictions.csv")
    return {name: (run / name).read_bytes() for name in names}


def test_runs_in_one_process_are_the_runs_they_would_be_alone(
    problem: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    for name in ("load_data", "load_backbone", "store_of"):
        real = getattr(shelf, name)

        def counted(*args, real=real, name=name, **named):
            loads.append(name)
            return real(*args, **named)

        monkeypatch.setattr(shelf, name, counted)
    with_data = {"data": problem.data, "knowledge": problem.knowledge}
    choices = list(combinations((1, 2), {"method.rank": (1, 2)}))
    result = tune_many(
        recipe_of(problem), choices, out=tmp_path / "many", split="test", **with_data
    )
    assert [row["run"] for row in result.rows] == [
        "method.rank=1,seed=1", "method.rank=1,seed=2",
        "method.rank=2,seed=1", "method.rank=2,seed=2",
    ]  # fmt: skip
    # two views, of which the second is another one under the second seed
    assert sorted(loads) == ["load_backbone", "load_data", *3 * ["store_of"]]
    assert not any(row["was_finished"] for row in result.rows)
    assert "method.rank=2: accuracy 0." in result.describe()
    assert "over 2 runs" in result.describe()

    for choice in choices:
        alone = tmp_path / "alone" / f"{choice['method.rank']}-{choice['seed']}"
        one = recipe_of(
            problem,
            method=CILMP | {"rank": choice["method.rank"]},
            seed=choice["seed"],
            samples={"shots": 2, "val_shots": 1, "seed": choice["seed"]},
        )
        tune(one, out=alone, **with_data)
        evaluate(alone)
        name = f"method.rank={choice['method.rank']},seed={choice['seed']}"
        assert files(alone) == files(tmp_path / "many" / name)


def test_what_is_finished_is_skipped(
    problem: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"data": problem.data, "knowledge": problem.knowledge, "split": "test"}
    tune_many(recipe_of(problem), [{"seed": 1}], out=tmp_path / "runs", **arguments)

    real, trained = many.tune, []

    def watched(recipe: TuneRecipe, **named):
        result = real(recipe, **named)
        trained.append((recipe.seed, result.setup is not None))
        return result

    monkeypatch.setattr(many, "tune", watched)
    monkeypatch.setattr(many, "load_run", None)  # what is evaluated is not loaded again
    again = tune_many(recipe_of(problem), combinations((1, 2), {}), out=tmp_path / "runs",
                      **arguments)  # fmt: skip
    assert trained == [(1, False), (2, True)]
    assert [row["was_finished"] for row in again.rows] == [True, False]
    assert all(row["metrics"] for row in again.rows)
    written = json.loads((tmp_path / "runs" / "runs.json").read_text())
    assert [row["choices"] for row in written["runs"]] == [{"seed": 1}, {"seed": 2}]


def test_a_bad_combination_is_refused_before_the_first_run(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'method.rankk'. Did you mean 'rank'"):
        tune_many(
            recipe_of(problem),
            combinations((), {"method.rankk": (2,)}),
            data=problem.data,
            out=tmp_path / "runs",
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["", "3-1", "1,1", "a", "1-", "-1", "1.5", "0-999999999"])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--seeds: (not a list of seeds|a seed stands twice)"):
        parse_seeds(text)


@pytest.mark.parametrize("axes", [["method.rank"], ["=1"], ["a="], ["a=1", "a=2"]])
def test_bad_axes(axes: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"--grid: an axis of the grid has the form a.b=x,y"):
        parse_grid(axes)


def test_values_of_an_axis_are_yaml() -> None:
    grid = parse_grid(["a.b=1,2.5,full,null,true"])
    assert grid == {"a.b": (1, 2.5, "full", None, True)}
    assert [c["a.b"] for c in combinations((), grid)] == [1, 2.5, "full", None, True]


def test_on_the_command_line(problem: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe_of(problem).model_dump(mode="json")))
    line = [
        "tune", str(file), "--data", problem.data, "--knowledge", str(problem.knowledge),
        "--out", str(tmp_path / "runs"), "--device", "cpu", "--seeds", "1-2",
        "--grid", "train.lr=0.01", "--eval", "test", "--part", "6",
    ]  # fmt: skip
    shown = CliRunner().invoke(cli.app, line)
    assert shown.exit_code == 0, shown.output
    assert f"2 runs in {tmp_path / 'runs'}, 0 were already finished" in shown.stdout
    as_json = CliRunner().invoke(cli.app, [*line, "--json"])
    rows = json.loads(as_json.stdout)
    assert [row["was_finished"] for row in rows] == [True, True]


def test_changed_test_images_are_refused_and_earlier_rows_stay(
    problem: SimpleNamespace, tmp_path: Path, toy: ModuleType
) -> None:
    data = toy.images(tmp_path / "images")
    arguments = {"data": str(data), "knowledge": problem.knowledge, "split": "test"}
    one = recipe_of(problem, train={"epochs": 1, "batch_size": 3, "lr": 0.01})
    tune_many(one, [{"seed": 1}], out=tmp_path / "runs", **arguments)
    tune_many(one, [{"seed": 2}], out=tmp_path / "runs", **arguments)
    written = json.loads((tmp_path / "runs" / "runs.json").read_text())
    assert [row["run"] for row in written["runs"]] == ["seed=1", "seed=2"]

    picture = next((tmp_path / "images" / "test").glob("*/0.png"))
    picture.write_bytes(next((tmp_path / "images" / "train").glob("*/1.png")).read_bytes())
    with pytest.raises(RunError, match="the run was evaluated on other images here"):
        tune_many(one, [{"seed": 1}], out=tmp_path / "runs", **arguments)


@pytest.mark.parametrize(
    ("seeds", "grid", "match"),
    [
        ((), {"method.rank": (1, 1)}, "two combinations would share one run folder"),
        ((1,), {"seed": (2,)}, "seeds stand in the grid too"),
    ],
)
def test_combinations_that_collide(problem, tmp_path, seeds, grid, match) -> None:
    with pytest.raises(RecipeError, match=match):
        tune_many(
            recipe_of(problem), combinations(seeds, grid), data=problem.data, out=tmp_path / "r"
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--seeds", "1", "--overwrite"], "--overwrite: cannot be used with --seeds or --grid"),
        (["--eval", "test"], "--eval: cannot be used without --seeds or --grid"),
        (["--seeds", "1", "--part", "3"], "--part: cannot be used without --eval"),
    ],
)
def test_options_that_would_be_ignored(problem, tmp_path, options, match) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe_of(problem).model_dump(mode="json")))
    line = ["tune", str(file), "--data", problem.data, "--out", str(tmp_path / "r"), *options]
    result = CliRunner().invoke(cli.app, line)
    assert isinstance(result.exception, RecipeError)
    assert match in str(result.exception)


def test_a_backbone_for_each_seed(problem: SimpleNamespace) -> None:
    recipe = recipe_of(problem, backbone={"aligned": "towers/backbone-{seed}"})
    found = [many._chosen(recipe, {"seed": seed}).backbone.aligned for seed in (3, 12)]
    assert [str(f) for f in found] == ["towers/backbone-3", "towers/backbone-12"]
    gridded = many._chosen(recipe_of(problem), {"backbone.aligned": "of-{seed}", "seed": 3})
    assert gridded.backbone.model_dump(exclude_none=True) == {"aligned": "of-3"}
    with pytest.raises(RecipeError, match="exactly one place; found hub and aligned"):
        many._chosen(recipe, {"backbone.aligned": "a", "backbone.hub": "h"})
    unseeded = many._chosen(recipe, {"train.lr": 0.1}).backbone.aligned
    assert str(unseeded) == "towers/backbone-{seed}"


def test_a_cache_that_is_not_read_is_said_once_and_not_stored(
    problem: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = {"data": problem.data, "knowledge": problem.knowledge}
    plain = recipe_of(problem, method={"name": "zero-shot"})
    line = f"method zero-shot reads no knowledge; {problem.knowledge} is not used"
    run = tune(plain, out=tmp_path / "one", **where).run
    assert run["local"]["knowledge"] is None
    assert capsys.readouterr().err.count(line) == 1
    tune_many(plain, combinations((1, 2), {}), out=tmp_path / "two", **where)
    assert capsys.readouterr().err.count(line) == 1
    sources = {"method.source": ("template", "texts")}
    tune_many(plain, combinations((), sources), out=tmp_path / "grid", **where)
    assert "reads no knowledge" not in capsys.readouterr().err
    cilmp = recipe_of(problem, train={"epochs": 1, "batch_size": 3})
    tune_many(cilmp, [{"knowledge.control": "none"}], out=tmp_path / "none", **where)
    assert "reads no knowledge" not in capsys.readouterr().err
    with pytest.raises(MissingKnowledgeError, match=r"absent\.h5: there is no such file"):
        tune(plain, out=tmp_path / "no", data=problem.data, knowledge=tmp_path / "absent.h5")
    assert not (tmp_path / "no").exists()
