"""Which runs are one method, what it is called over data sets, and what its tables say."""

import copy
import csv
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cache.errors import RunError
from cache.recipe import validate
from prompt_tune.evaluation import evaluate
from prompt_tune.method_groups import Group, find_runs, grouped
from prompt_tune.method_table import compare_methods
from prompt_tune.recipe import TuneRecipe
from prompt_tune.tuning import tune

CILMP = {"name": "cilmp", "prefix": 2, "suffix": 2, "rank": 2, "visual_depth": 0, "text_depth": 2}
METHODS = {"cilmp": CILMP, "coop": {"name": "coop", "n_context": 4}, "tip": {"name": "tip-adapter"}}
NUMBERS = ("value", "low", "high", "accuracy", "ece")


@pytest.fixture(scope="module")
def world(
    tiny_models: ModuleType, toy: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """One evaluated run of each of three methods; nine training images in batches of sixteen."""
    root = tmp_path_factory.mktemp("groups")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VADEMECUM_HOME", str(root / "home"))
        folder = tiny_models.tiny_clip(root / "clip", layers=2)
        data = str(toy.images(root / "images"))
        toy.cache(root / "cache.h5")
        runs = {}
        for name, method in METHODS.items():
            fields = {
                "backbone": {"folder": str(folder)},
                "method": method,
                "knowledge": {"scale": "unit"},
                "samples": {"shots": 3, "val_shots": 0},
                "train": {"epochs": 2, "batch_size": 16, "lr": 0.01, "warmup_epochs": 0},
            }
            recipe = validate(TuneRecipe, fields, where="test")
            runs[name] = root / name
            done = tune(recipe, data=data, out=runs[name], knowledge=root / "cache.h5")
            evaluate(runs[name], setup=done.setup, resamples=50)
        yield SimpleNamespace(**runs)


def twin(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a run that says other things of itself; `a__b` is key b of table a."""
    shutil.copytree(source, target)
    run = json.loads((target / "run.json").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        table = run
        for name in path:
            table = table[name]
        table[last] = copy.deepcopy(value)
    (target / "run.json").write_text(json.dumps(run))
    return target


def seed(number: int) -> dict[str, int]:
    return {"recipe__seed": number, "recipe__samples__seed": number}


def on_aligned(name: str) -> dict[str, Any]:
    place = dict.fromkeys(("hub", "revision", "arch", "weights", "folder")) | {
        "aligned": f"/{name}"
    }
    return {"recipe__backbone": place, "backbone__name": name, "bindings__backbone": f"{name}" * 9}


def labels(groups: list[Group]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for group in groups:
        found.setdefault(group.dataset, []).append(group.label)
    return found


# Which runs are seeds of one method.


def test_another_cache_is_another_method(world: SimpleNamespace, tmp_path: Path) -> None:
    bound = json.loads((world.cilmp / "run.json").read_text())["bindings"]["cache"]
    other = bound | {"block_id": "cd" * 32, "block_made": "ef" * 32, "content_id": "ab" * 32}
    runs = [
        twin(world.cilmp, tmp_path / f"{name}{n}", bindings__cache=cache, **seed(n))
        for name, cache in (("a", bound), ("b", other))
        for n in (1, 2)
    ]
    one, two = grouped(runs)
    assert one.seeds == two.seeds == (1, 2)
    made = bound["block_made"][:8]
    assert one.label == f"cilmp, layers (block_made={made})"
    assert two.label == "cilmp, layers (block_made=efefefef)"
    whole = bound | {"content_id": "ab" * 32, "unused_classes": ["more"]}
    same = twin(world.cilmp, tmp_path / "same", bindings__cache=whole, **seed(3))
    older = {k: v for k, v in bound.items() if k != "block_made"}
    old = twin(world.cilmp, tmp_path / "old", bindings__cache=older, **seed(4))
    assert [g.seeds for g in grouped([old, *runs[:2], same])] == [(4, 1, 2, 3)]
    texts = twin(
        world.cilmp, tmp_path / "c", bindings__cache=bound | {"texts": {"more": "12" * 32}}
    )
    assert labels(grouped([runs[0], texts]))["toy-cells"] == [
        "cilmp, layers",
        "cilmp, layers (cache.more=12121212)",
    ]


def test_blocks_made_alike_are_told_apart_by_their_ids(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    bound = json.loads((world.cilmp / "run.json").read_text())["bindings"]["cache"]
    other = twin(world.cilmp, tmp_path / "b", bindings__cache=bound | {"block_id": "cd" * 32})
    assert labels(grouped([world.cilmp, other]))["toy-cells"] == [
        f"cilmp, layers (cache.layers={bound['block_id'][:8]})",
        "cilmp, layers (cache.layers=cdcdcdcd)",
    ]


def test_mirroring_tells_methods_apart_where_views_are_random(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    off = twin(world.coop, tmp_path / "off", recipe__train__flip=False, **seed(2))
    assert [len(g.seeds) for g in grouped([world.coop, off])] == [2]
    random = [
        twin(world.coop, tmp_path / f"{flip}", recipe__train__views=4, recipe__train__flip=flip)
        for flip in (True, False)
    ]
    assert len(grouped(random)) == 2


def test_the_same_seed_twice_is_refused(world: SimpleNamespace, tmp_path: Path) -> None:
    again = twin(world.coop, tmp_path / "again")
    match = rf"toy-cells: two runs of one method have the seed 1; found .*{again}\. Name only one"
    with pytest.raises(RunError, match=match):
        grouped([world.coop, again])
    (tmp_path / "link").symlink_to(world.coop)
    assert find_runs([world.coop, tmp_path / "link", world.coop]) == [world.coop]
    sample = twin(world.coop, tmp_path / "sample", recipe__samples__seed=2)
    assert len(grouped([world.coop, sample])) == 1, "another draw of the images is no repetition"


def test_aligned_backbones_differ_by_seed_others_do_not(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    aligned = [
        twin(world.coop, tmp_path / f"a{n}", **seed(n), **on_aligned(f"vit_patch16_224-{n}"))
        for n in (1, 2, 16)
    ]
    (group,) = grouped(aligned)
    assert group.seeds == (1, 2, 16)
    inside = [
        twin(world.coop, tmp_path / f"i{n}", **seed(n), **on_aligned("vit-16-224")) for n in (1, 16)
    ]
    assert len(grouped(inside)) == 1, "a number inside a name is no seed"
    plain = [
        twin(world.coop, tmp_path / f"p{n}", **seed(n), backbone__name="vit", bindings__backbone=m)
        for n, m in ((1, "aa" * 32), (2, "bb" * 32))
    ]
    assert labels(grouped(plain))["toy-cells"] == [
        "coop (backbone=vit aaaaaaaa)",
        "coop (backbone=vit bbbbbbbb)",
    ]
    elsewhere = twin(
        world.coop, tmp_path / "e", **seed(2), recipe__backbone__folder="/moved", backbone__name="m"
    )
    assert len(grouped([world.coop, elsewhere])) == 1, "where a backbone lies does not count"


# One name over data sets.


def test_a_setting_is_told_on_every_data_set(world: SimpleNamespace, tmp_path: Path) -> None:
    method = {k: v for k, v in CILMP.items() if k != "visual_depth"}
    usual = {"recipe__method": method}
    first = [world.cilmp, twin(world.cilmp, tmp_path / "usual", **usual)]
    second = twin(world.cilmp, tmp_path / "second", bindings__dataset="other")
    depth = "cilmp, layers (method.visual_depth={})"
    full = TuneRecipe.model_validate(
        {"backbone": {"hub": "x"}, "method": method}
    ).method_config(where="test").model_dump()["visual_depth"]  # fmt: skip
    both = [depth.format(0), depth.format(full)]
    assert labels(grouped([*first, second])) == {"toy-cells": both, "other": both[:1]}
    across = twin(world.cilmp, tmp_path / "across", bindings__dataset="other", **usual)
    found = labels(grouped([world.cilmp, across]))
    assert found == {"toy-cells": both[:1], "other": both[1:]}
    assert labels(grouped([world.cilmp, second])) == {
        "toy-cells": ["cilmp, layers"],
        "other": ["cilmp, layers"],
    }


def test_what_a_data_set_brings_tells_nothing_apart(world: SimpleNamespace, tmp_path: Path) -> None:
    bound = json.loads((world.cilmp / "run.json").read_text())["bindings"]["cache"]
    other = twin(
        world.cilmp,
        tmp_path / "other",
        bindings__dataset="other",
        bindings__cache=bound | {"block_id": "cd" * 32, "content_id": "ab" * 32},
        recipe__classes=["a", "b"],
        recipe__knowledge__expect="ab" * 32,
        recipe__train__epochs=7,
        **on_aligned("other-backbone-1"),
    )
    own = twin(world.cilmp, tmp_path / "own", **on_aligned("backbone-1"))
    alike = ["cilmp, layers"]
    assert labels(grouped([own, other])) == {"toy-cells": alike, "other": alike}
    longer = twin(world.cilmp, tmp_path / "l", recipe__train__epochs=9, **on_aligned("backbone-1"))
    assert labels(grouped([own, longer, other])) == {
        "toy-cells": [f"cilmp, layers (train.epochs={n})" for n in (2, 9)],
        "other": ["cilmp, layers (train.epochs=7)"],
    }


@pytest.fixture(scope="module")
def two_sets(world: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three methods on one data set, one with two seeds; two of them on `more_100%`."""
    root = tmp_path_factory.mktemp("two")
    more = {"bindings__dataset": "more_100%", "training__seconds": 7512.3}
    return [
        world.cilmp,
        world.coop,
        world.tip,
        twin(world.coop, root / "seed", **seed(2)),
        twin(world.cilmp, root / "cilmp", **more),
        twin(world.tip, root / "tip", **more),
    ]


def test_ranks_are_among_methods_run_on_every_data_set(
    two_sets: list[Path], tmp_path: Path
) -> None:
    found = compare_methods(two_sets, split="test", out=tmp_path)
    assert [len(t.rows) for t in found.tables] == [3, 2]
    assert found.left_out == ("coop",)
    assert {r["method"] for r in found.mean_ranks} == {"cilmp, layers", "tip-adapter"}
    for k, table in enumerate(found.tables):
        values = {r["method"]: r["value"] for r in table.rows if r["method"] != "coop"}
        for row in found.mean_ranks:
            own = values[row["method"]]
            above, level = (sum(v > own for v in values.values()), list(values.values()).count(own))
            assert row["ranks"][k] == above + (level + 1) / 2
    text = found.text()
    assert "run on all 2 data sets. Left out: coop." in text
    assert (tmp_path / "ranks.png").is_file()
    nobody = compare_methods([two_sets[1], two_sets[4]], split="test", out=tmp_path)
    assert nobody.mean_ranks == ()
    assert not (tmp_path / "ranks.png").exists()
    assert "Left out: cilmp, layers; coop." in nobody.text()
    assert compare_methods(two_sets[:3], split="test").left_out == ()


# Tables.


def test_csv_is_one_table_of_plain_numbers(two_sets: list[Path]) -> None:
    found = compare_methods(two_sets, split="test")
    text = found.text("csv")
    assert "" not in text.split("\n")
    lines = list(csv.reader(io.StringIO(text)))
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 6
    rows = [row for table in found.tables for row in table.rows]
    for line, row in zip(csv.DictReader(io.StringIO(text)), rows, strict=True):
        assert line["split"] == "test"
        assert line["method"] == row["method"]
        assert float(line["value"]) == row["value"]
        assert [float(line[k]) for k in ("value", "low", "high")] == row["interval"]
        assert float(line["accuracy"]) == row["beside"]["accuracy"][0]
        assert int(line["seeds"]) == len(row["seeds"])
        assert (line["std"] == "") == math.isnan(row["deviation"])
        assert all(re.fullmatch(r"-?[\d.e-]+", line[name]) for name in NUMBERS)
    assert [line[0] for line in lines] == ["dataset", *["toy-cells"] * 3, *["more_100%"] * 2]


def test_latex_and_json_are_escaped(two_sets: list[Path]) -> None:
    found = compare_methods(two_sets, split="test")
    latex = found.text("latex")
    assert r"more\_100\%, test" in latex
    assert r"95 \% bootstrap" in latex
    assert not re.search(r"(?<!\\)[%_#]", latex)
    outside = [line for line in latex.split("\n") if not line.endswith(r"\\")]
    assert not any(re.search(r"(?<!\\)&", line) for line in outside)
    assert "more_100%, test" in found.text("markdown")
    json.dumps(found.to_json(), allow_nan=False)


def test_other_seeds_than_the_first_row_are_said(two_sets: list[Path]) -> None:
    first, second = compare_methods(two_sets, split="test").tables
    names = [row["method"] for row in first.rows]
    assert "coop" in names
    if names[0] == "coop":
        assert "The first row has the seeds 1, 2; p compares with means over other s" in first.note
        assert all(f"{name} (1)" in first.note for name in names[1:])
    else:
        assert "The first row has the seeds 1; " in first.note
        assert first.note.endswith("over other seeds in coop (1, 2).")
    assert "over other seeds" not in second.note


# Budgets.


def test_what_was_trained_and_seen(world: SimpleNamespace, tmp_path: Path) -> None:
    def budget(folder: Path) -> dict[str, Any]:
        (group,) = grouped([folder])
        return group.budget()

    run = json.loads((world.coop / "run.json").read_text())
    assert budget(world.coop)["trained"] == run["parameters"]["scalars"] > 0
    assert budget(world.tip)["trained"] == 0
    assert budget(twin(world.coop, tmp_path / "none", training__steps=0))["trained"] == 0
    older = {k: run["training"][k] for k in ("steps", "history")}
    short = twin(world.coop, tmp_path / "short", training=older)
    assert older["steps"] == 2
    assert budget(short)["images_seen"] == 2 * 9, "one short batch an epoch"
    known = twin(world.coop, tmp_path / "known", training=older | {"images_seen": 17})
    assert budget(known)["images_seen"] == 17
    (short / "samples" / "train.json").unlink()
    assert budget(short)["images_seen"] is None, "nobody knows how short the batch was"
    whole = twin(short, tmp_path / "whole", training=older | {"steps": 6})
    assert budget(whole)["images_seen"] == 6 * 16, "only full batches where there are several"
    assert budget(world.tip)["images_seen"] is None


def test_seconds_of_tuning_are_shown_where_known(two_sets: list[Path], tmp_path: Path) -> None:
    older = twin(two_sets[0], tmp_path / "older", training={"steps": 2})
    assert "tuning" not in compare_methods([older], split="test").text()
    second = compare_methods(two_sets[4:5], split="test")
    assert second.tables[0].rows[0]["seconds"] == 7512.3
    assert "tuning\n" in second.text()
    assert "7,512 s" in second.text()
