import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from cache.errors import RecipeError, RunError
from cache.recipe import validate
from cli import app
from prompt_tune.ablation import ablate
from prompt_tune.many import combinations, tune_many
from prompt_tune.method_table import compare_methods, find_runs
from prompt_tune.recipe import TuneRecipe
from prompt_tune.variants import variants

METHODS = {"zero-shot": {}, "linear-probe": {}, "coop": {"n_context": 4}}
CILMP = {"name": "cilmp", "prefix": 2, "suffix": 2, "rank": 2, "visual_depth": 0, "text_depth": 2}


def recipe_of(folder: Path, method: dict[str, object], **changes: object) -> TuneRecipe:
    data = {
        "backbone": {"folder": str(folder)},
        "method": method,
        "samples": {"shots": 3},
        "train": {"epochs": 2, "batch_size": 3, "lr": 0.01, "warmup_epochs": 0},
        **changes,
    }
    return validate(TuneRecipe, data, where="test")


@pytest.fixture(scope="module")
def world(
    tiny_models: ModuleType, toy: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Three methods under two seeds, evaluated."""
    root = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VADEMECUM_HOME", str(root / "home"))
        yield _world(root, tiny_models, toy)


def _world(root: Path, tiny_models: ModuleType, toy: ModuleType) -> SimpleNamespace:
    folder = tiny_models.tiny_clip(root / "clip", layers=2)
    data = str(toy.images(root / "images"))
    toy.cache(root / "cache.h5")
    for name, settings in METHODS.items():
        recipe = recipe_of(folder, {"name": name, **settings})
        out = root / "runs" / name
        tune_many(recipe, combinations((1, 2), {}), data=data, out=out, split="test")
    return SimpleNamespace(root=root, folder=folder, data=data, cache=root / "cache.h5")


def test_seeds_of_one_recipe_are_one_row_of_their_mean(world: SimpleNamespace) -> None:
    found = compare_methods([world.root / "runs"], split="test", out=world.root / "out")
    (table,) = found.tables
    rows = {row["method"]: row for row in table.rows}
    assert set(rows) == set(METHODS)
    for name, row in rows.items():
        assert row["seeds"] == [1, 2]
        known = [
            json.loads((r / "eval/test/metrics.json").read_text())["metrics"]["accuracy"]
            for r in find_runs([world.root / "runs" / name])
        ]
        assert row["value"] == pytest.approx(sum(map(float, known)) / 2)
    values = [row["value"] for row in table.rows]
    assert values == sorted(values, reverse=True)
    assert table.rows[0]["p"] is None
    assert rows["coop"]["images_seen"] == rows["coop"]["steps"] * 3
    assert "constant answer has accuracy 0.333" in table.note
    assert (world.root / "out" / "ranks.png").stat().st_size > 5000
    lines = list(csv.DictReader(io.StringIO((world.root / "out" / "methods.csv").read_text())))
    assert [line["method"] for line in lines] == [row["method"] for row in table.rows]


def test_only_a_lead_that_holds_is_bold(world: SimpleNamespace) -> None:
    probe = [world.root / "runs" / "linear-probe", world.root / "runs" / "zero-shot"]
    clear = compare_methods(probe, split="test")
    assert clear.tables[0].winner == "linear-probe"  # colours are separable, zero-shot is chance
    assert "**linear-probe**" in clear.text("markdown")
    assert r"\textbf{linear-probe}" in clear.text("latex")
    alone = compare_methods(probe[:1], split="test")
    assert alone.tables[0].winner is None
    assert "**" not in alone.text("markdown")
    same = world.root / "runs" / "coop"
    other = recipe_of(world.folder, {"name": "coop", "n_context": 4}, samples={"shots": 4})
    tune_many(other, combinations((1,), {}), data=world.data, out=world.root / "four", split="test")
    two = compare_methods([same, world.root / "four"], split="test")
    names = {row["method"] for row in two.tables[0].rows}
    assert names == {"coop (samples.shots=3)", "coop (samples.shots=4)"}


def test_backbones_named_after_the_seed_are_one(world: SimpleNamespace, tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = tmp_path / f"tower-{seed}"
        shutil.copytree(world.folder, folder)
        recipe = recipe_of(folder, {"name": "zero-shot"})
        out = tmp_path / "runs"
        tune_many(recipe, combinations((seed,), {}), data=world.data, out=out, split="test")
    (row,) = compare_methods([tmp_path / "runs"], split="test").tables[0].rows
    assert row["seeds"] == [1, 2]


def test_what_cannot_be_compared(world: SimpleNamespace, tmp_path: Path) -> None:
    runs = [world.root / "runs"]
    with pytest.raises(RecipeError, match="no metric 'speed'"):
        compare_methods(runs, split="test", metric="speed")
    with pytest.raises(RunError, match="not evaluated on 'val'"):
        compare_methods(runs, split="val")
    with pytest.raises(RunError, match="no run here"):
        compare_methods([tmp_path], split="test")


def test_compare_on_the_command_line(world: SimpleNamespace) -> None:
    runner = CliRunner()
    command = ["compare", str(world.root / "runs"), "--split", "test"]
    plain = runner.invoke(app, [*command, "--style", "latex"])
    assert plain.exit_code == 0
    assert r"\begin{tabular}" in plain.stdout
    found = runner.invoke(app, [*command, "--json"])
    assert len(json.loads(found.stdout)["datasets"][0]["rows"]) == 3
    assert "no such style" in str(runner.invoke(app, [*command, "--style", "rtf"]).exception)


def test_an_ablation_asks_what_the_method_can_be_asked(world: SimpleNamespace) -> None:
    recipe = recipe_of(world.folder, CILMP)
    asked = variants(recipe, {"other": Path("other.h5")})
    assert asked[0].changes == {}
    about = [v.about for v in asked]
    assert set(about[1:]) == {"knowledge", "image condition", "rank", "rows", "source"}
    assert {v.changes.get("method.rank") for v in asked} >= {1, 4, 8, 16}
    assert 2 not in {v.changes.get("method.rank") for v in asked}
    with pytest.raises(RecipeError, match="'coop' reads no knowledge"):
        variants(recipe_of(world.folder, {"name": "coop"}))
    shuffled = recipe_of(world.folder, CILMP, knowledge={"control": "shuffled"})
    with pytest.raises(RecipeError, match=r"knowledge\.control.*found shuffled, wanted cached"):
        variants(shuffled)


def test_an_ablation_runs_every_variant_under_every_seed(world: SimpleNamespace) -> None:
    out = world.root / "ablation"
    where = {"data": world.data, "knowledge": world.cache, "out": out, "seeds": (1, 2)}
    recipe = recipe_of(world.folder, CILMP)
    found = ablate(recipe, **where, only=["knowledge", "image condition"])
    names = [row["variant"] for row in found.rows]
    no_image = [f"{k}no image condition" for k in ("", "shuffled, ", "random, ")]
    assert names == ["cached", "shuffled", "random", "none", *no_image]
    base = found.rows[0]
    assert base["ahead"] is None
    for row in found.rows[1:]:
        assert row["ahead"][0] == pytest.approx(base["value"] - row["value"])
        assert row["ahead"][1] <= row["ahead"][0] <= row["ahead"][2]
    assert len(find_runs([out])) == 14
    assert (out / "ablation.png").is_file()
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*/weights.safetensors")}
    again = ablate(recipe, **where, only=["knowledge", "image condition"])
    assert again.rows == found.rows
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/*/weights.safetensors")}
    with pytest.raises(RecipeError, match="cannot be asked that"):
        ablate(recipe, **where, only=["source"])
