"""Whole runs on a toy problem: every method, exact resume, controls, and what refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import safetensors.torch
import torch

from cache.errors import (
    CacheMismatchError,
    DataError,
    MissingKnowledgeError,
    RecipeError,
    RunError,
    UnknownNameError,
    VademecumError,
)
from cache.recipe import digest_of, validate
from cache.store import KnowledgeCache
from prompt_tune.bindings import LATER, made_with
from prompt_tune.checkpoint import STATE, WEIGHTS
from prompt_tune.evaluation import evaluate
from prompt_tune.features import store_of
from prompt_tune.recipe import TuneRecipe, load_tune_recipe
from prompt_tune.tuning import tune

CILMP = {
    "name": "cilmp", "text_depth": "full", "visual_depth": 0, "prefix": 2, "suffix": 2, "rank": 2,
}  # fmt: skip


def _recipe(problem: SimpleNamespace, **changes: object) -> TuneRecipe:
    base = {
        "backbone": {"folder": str(problem.backbone)},
        "method": CILMP,
        "samples": {"shots": 4, "val_shots": 1},
        "train": {"epochs": 6, "batch_size": 4, "lr": 0.01, "average": "prompts"},
    }
    return validate(TuneRecipe, base | changes, where="test")


def _tune(problem: SimpleNamespace, out: Path, recipe: TuneRecipe, **more: object) -> dict:
    more = {"knowledge": problem.knowledge} | more
    return tune(recipe, data=problem.data, out=out, **more).run  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "zero-shot"},
        {"name": "zero-shot", "ensemble": True},
        {"name": "linear-probe"},
        {"name": "coop"},
        CILMP,
        CILMP | {"condition": "none"},
    ],
    ids=lambda m: "-".join(str(v) for v in m.values())[:40],
)
def test_every_method_runs_and_evaluates(
    problem: SimpleNamespace, tmp_path: Path, method: dict
) -> None:
    run = _tune(problem, tmp_path / "run", _recipe(problem, method=method))
    assert run["status"] == "finished"
    assert ("cache" in run["bindings"]) == (method["name"] == "cilmp")
    result = evaluate(tmp_path / "run").result
    assert result["images"] == 12
    folder = tmp_path / "run" / "eval" / "test"
    assert {p.name for p in folder.iterdir()} >= {
        "predictions.csv", "metrics.json", "confusion.png", "reliability.png",
    }  # fmt: skip
    tensors = safetensors.torch.load_file(tmp_path / "run" / WEIGHTS)
    assert sum(t.numel() for t in tensors.values()) == run["parameters"]["scalars"]


@pytest.mark.parametrize(
    ("method", "select", "read"),
    [
        ("zero-shot", "last", 0),
        ("coop", "last", 4 * 3),
        ("coop", "best-val", 4 * 3 + 1 * 3),
        ("tip-adapter", "last", 4 * 3 + 1 * 3),
    ],
)
def test_only_images_that_a_method_reads_are_encoded(
    problem: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    select: str,
    read: int,
) -> None:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    train = {"epochs": 1, "batch_size": 4, "select": select}
    recipe = _recipe(problem, method={"name": method}, train=train)
    result = tune(recipe, data=problem.data, out=tmp_path / "run")
    assert result.setup is not None
    splits = [split for split in (result.setup.train, result.setup.val) if split is not None]
    store = store_of(result.setup.backbone, 0, 0)
    assert sum(digest in store for split in splits for digest in split.digests) == read


def test_training_lowers_the_loss_and_the_linear_probe_separates(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    history = _tune(problem, tmp_path / "a", _recipe(problem))["training"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    _tune(problem, tmp_path / "b", _recipe(problem, method={"name": "linear-probe"}))
    assert evaluate(tmp_path / "b").result["metrics"]["accuracy"] > 0.9


@pytest.mark.parametrize("rows", ["layers", "texts", "attributes", "tokens"])
def test_every_kind_of_rows(problem: SimpleNamespace, tmp_path: Path, rows: str) -> None:
    recipe = _recipe(
        problem, knowledge={"rows": rows}, train={"epochs": 1, "batch_size": 4, "lr": 0.01}
    )
    run = _tune(problem, tmp_path / "run", recipe)
    assert run["bindings"]["cache"]["content_id"] == problem.content


def test_controls_change_the_rows_and_nothing_else(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    train = {"epochs": 1, "batch_size": 4, "lr": 0.01}
    losses, counts = {}, {}
    for control in ("cached", "shuffled", "random", "none"):
        recipe = _recipe(problem, knowledge={"control": control}, train=train)
        run = _tune(problem, tmp_path / control, recipe)
        losses[control] = run["training"]["history"][0]["loss"]
        counts[control] = run["parameters"]["scalars"]
    assert len(set(losses.values())) == 4
    assert counts["cached"] == counts["shuffled"] == counts["random"] > counts["none"]


def test_unit_rows_have_a_root_mean_square_of_one(problem: SimpleNamespace) -> None:
    from prompt_tune.data.source import load_data
    from prompt_tune.knowledge import load_knowledge
    from prompt_tune.recipe import KnowledgeSpec

    source = load_data(problem.data)
    raw, unit = (
        load_knowledge(
            KnowledgeCache.open(problem.knowledge),
            KnowledgeSpec(scale=scale),
            dataset=source.dataset,
            classes=source.classes,
            seed=1,
        ).rows
        for scale in ("raw", "unit")
    )
    assert raw is not None and unit is not None
    for before, after in zip(raw.values, unit.values, strict=True):
        assert torch.allclose(after.square().mean(1), torch.ones(len(after)), atol=1e-5)
        assert torch.allclose(torch.nn.functional.cosine_similarity(before, after), torch.ones(1))


def test_controls_shuffle_and_draw_what_they_say(problem: SimpleNamespace) -> None:
    from prompt_tune.data.source import load_data
    from prompt_tune.knowledge import load_knowledge
    from prompt_tune.recipe import KnowledgeSpec

    source = load_data(problem.data)
    rows = {
        control: load_knowledge(
            KnowledgeCache.open(problem.knowledge),
            KnowledgeSpec(control=control),
            dataset=source.dataset,
            classes=source.classes,
            seed=5,
        ).rows
        for control in ("cached", "shuffled", "random", "none")
    }
    cached, shuffled, random = (rows[c].values for c in ("cached", "shuffled", "random"))
    assert rows["none"] is None
    assert not any(torch.equal(a, b) for a, b in zip(cached, shuffled, strict=True))
    assert all(any(torch.equal(a, b) for b in shuffled) for a in cached)
    flat, drawn = torch.cat(cached), torch.cat(random)
    assert not torch.allclose(flat, drawn)
    assert float((flat.mean(1) - drawn.mean(1)).abs().max()) < 1.5  # 20 draws a row
    assert float(drawn.std() / flat.std()) == pytest.approx(1, abs=0.15)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


CHILD = """
import json, sys
import prompt_tune.loop as loop
from pathlib import Path
from cache.recipe import validate
from prompt_tune.features import store_of
from prompt_tune.recipe import TuneRecipe
from prompt_tune.tuning import tune
spec = json.loads(sys.argv[1])
saved = loop.save_state
def save(folder, state, *, recipe_digest):
    saved(folder, state, recipe_digest=recipe_digest)
    print(state.epoch, state.step, flush=True)
    if [state.epoch, state.step] == spec["wait_at"]:
        sys.stdin.read()
loop.save_state = save
tune(validate(TuneRecipe, spec["recipe"], where="child"), data=spec["data"], out=Path(spec["out"]),
     knowledge=Path(spec["knowledge"]))
"""


def _killed_at(problem: SimpleNamespace, recipe: TuneRecipe, out: Path, wait_at: list[int]) -> None:
    """Runs `tune` in a process that is killed right after saving the state `wait_at`."""
    spec = {
        "recipe": recipe.model_dump(mode="json"), "data": problem.data, "out": str(out),
        "knowledge": str(problem.knowledge), "wait_at": wait_at,
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(spec)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            if [int(x) for x in line.split()] == wait_at:
                child.send_signal(signal.SIGKILL)
                break
        assert child.wait() == -signal.SIGKILL
    assert (out / STATE).is_file()
    assert not (out / WEIGHTS).exists()


@pytest.mark.slow
@pytest.mark.parametrize("average", ["prompts", "trainables"])
def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    problem: SimpleNamespace, tmp_path: Path, average: str
) -> None:
    """Killed after epoch 3, and once in the middle of epoch 5; dropout and averaging included."""
    train = {
        "epochs": 6, "batch_size": 4, "lr": 0.01, "average": average, "views": 3,
        "checkpoint_steps": 2,
    }  # fmt: skip
    recipe = _recipe(problem, train=train)
    whole = _tune(problem, tmp_path / "whole", recipe)
    out = tmp_path / "killed"
    _killed_at(problem, recipe, out, [4, 0])
    _killed_at(problem, recipe, out, [5, 2])
    resumed = _tune(problem, out, recipe)
    assert resumed["training"]["history"] == whole["training"]["history"]
    first, second = _weights(tmp_path / "whole"), _weights(out)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_averaging_is_the_gaussian_mean_of_the_epochs(
    problem: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prompt_tune.loop as loop
    from prompt_tune.schedule import epoch_weights

    seen: list[dict[str, torch.Tensor]] = []
    end = loop._end_of_epoch

    def spy(method, *rest, **named):  # type: ignore[no-untyped-def]
        seen.append({n: p.detach().double().clone() for n, p in method.trainable().items()})
        end(method, *rest, **named)

    monkeypatch.setattr(loop, "_end_of_epoch", spy)
    recipe = _recipe(problem)
    result = tune(recipe, data=problem.data, out=tmp_path / "r", knowledge=problem.knowledge)
    weights = epoch_weights(recipe.train)
    assert result.setup is not None
    prompts = result.setup.method.prompts()
    assert prompts and prompts < set(seen[0])
    for name, value in _weights(tmp_path / "r").items():
        mean = sum(w * s[name] for w, s in zip(weights, seen, strict=True))
        expected = mean if name in prompts else seen[-1][name]
        assert torch.allclose(value.double(), torch.as_tensor(expected), atol=1e-6), name
    assert any(not torch.allclose(seen[-1][n], seen[0][n]) for n in prompts)


def test_a_finished_run_is_not_run_again(problem: SimpleNamespace, tmp_path: Path) -> None:
    recipe = _recipe(problem, method={"name": "coop"})
    _tune(problem, tmp_path / "r", recipe)
    stamp = (tmp_path / "r" / WEIGHTS).stat().st_mtime_ns
    time.sleep(0.01)
    _tune(problem, tmp_path / "r", recipe)
    assert (tmp_path / "r" / WEIGHTS).stat().st_mtime_ns == stamp


def test_what_makes_it_another_run_is_named(
    problem: SimpleNamespace, tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cilmp = {"method": CILMP | {"text_depth": 2}, "train": {"epochs": 1, "batch_size": 4}}
    _tune(problem, tmp_path / "r", _recipe(problem, **cilmp))
    toy.cache(tmp_path / "one.h5", classes=(*toy.CLASSES, "basophil"))
    same = {"knowledge": tmp_path / "one.h5"}  # other rows under the same names
    monkeypatch.setattr(toy, "DATASET", "others")
    other = {"data": str(toy.images(tmp_path / "images"))}
    toy.cache(tmp_path / "two.h5")
    train = cilmp["train"] | {"lr": 0.5, "warmup_epochs": 0, "flip": False}
    many = {"train": train, "samples": {"shots": 2}, "seed": 2, "method": CILMP | {"rank": 3}}
    for changes, where, keys in (
        ({"seed": 2}, {}, "seed"),
        ({"samples": {"shots": 2, "val_shots": 1}}, {}, "samples.shots"),
        (many, {}, "method.text_depth, method.rank, samples.shots and 4 more"),
        ({}, same, "cache"),
        ({}, other | {"knowledge": tmp_path / "two.h5"}, "dataset"),
    ):
        named = {"data": problem.data, "knowledge": problem.knowledge} | where
        with pytest.raises(RunError) as caught:
            tune(_recipe(problem, **{**cilmp, **changes}), out=tmp_path / "r", **named)
        assert str(caught.value) == (
            f"{tmp_path / 'r'}: the folder holds another run; it differs in {keys}. "
            "Choose another --out, or pass --overwrite."
        )
    with pytest.raises(RunError, match=r"is of data set toy-cells and the data are others\. Pass"):
        evaluate(tmp_path / "r", data=other["data"])


def test_where_the_backbone_lies_is_no_part_of_a_run(
    problem: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = _recipe(problem, method={"name": "coop"})
    run = _tune(problem, tmp_path / "r", here)
    monkeypatch.chdir(problem.backbone.parent)
    there = _recipe(problem, method={"name": "coop"}, backbone={"folder": problem.backbone.name})
    assert there.backbone != here.backbone
    assert _tune(problem, tmp_path / "r", there) == run
    assert not made_with(run, _recipe(problem, method={"name": "coop"}, seed=2), run["bindings"])


def test_a_run_whose_digest_holds_the_place_of_its_backbone_is_known(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    recipe = _recipe(problem, method={"name": "coop"})
    run = _tune(problem, tmp_path / "r", recipe)
    older = recipe.model_dump()
    for key in LATER:
        *tables, last = key.split(".")
        del (older[tables[0]] if tables else older)[last]
    bindings = {**run["bindings"], "cache": {}}
    stored = run | {"digest": digest_of({"recipe": older, "bindings": bindings})}
    assert stored["digest"] != run["digest"]
    assert made_with(stored, recipe, bindings)
    assert not made_with(stored, recipe, bindings | {"backbone": "another"})


def test_best_validation_epoch_is_kept(problem: SimpleNamespace, tmp_path: Path) -> None:
    train = {"epochs": 4, "batch_size": 4, "lr": 0.05, "select": "best-val"}
    run = _tune(problem, tmp_path / "r", _recipe(problem, method={"name": "coop"}, train=train))
    scores = [e["val_accuracy"] for e in run["training"]["history"]]
    best = scores.index(max(scores)) + 1
    assert run["training"]["kept"] == f"epoch {best}"
    assert "best validation accuracy" in run["selection"]


def test_a_smoke_run_says_so(problem: SimpleNamespace, tmp_path: Path) -> None:
    method = CILMP | {"visual_depth": "full", "visual_prompts": 2}
    train = {"epochs": 3, "batch_size": 4, "lr": 0.01, "max_steps": 2, "views": "live"}
    run = _tune(problem, tmp_path / "r", _recipe(problem, method=method, train=train))
    assert run["smoke"] is True
    assert run["training"]["steps"] == 2
    assert run["training"]["images_seen"] == 2 * 4
    assert len(run["training"]["history"]) == 1


def _fails(kind: type[VademecumError], text: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_line(problem: SimpleNamespace, tmp_path: Path, toy: ModuleType) -> None:
    def go(recipe: TuneRecipe, **more: object) -> None:
        _tune(problem, tmp_path / "bad", recipe, **more)

    fine = _recipe(problem)
    _fails(
        MissingKnowledgeError, "'cilmp' needs a knowledge cache. Pass --knowledge FILE",
        lambda: go(fine, knowledge=None),
    )  # fmt: skip
    toy.cache(tmp_path / "few.h5", classes=toy.CLASSES[:2])
    _fails(MissingKnowledgeError, "platelet", lambda: go(fine, knowledge=tmp_path / "few.h5"))
    toy.cache(tmp_path / "other.h5", modality="chest X-ray")
    _fails(
        CacheMismatchError, "chest X-ray.*blood smear|blood smear.*chest X-ray",
        lambda: go(fine, knowledge=tmp_path / "other.h5"),
    )  # fmt: skip
    expect = _recipe(problem, knowledge={"expect": "0" * 64})
    _fails(CacheMismatchError, "0000", lambda: go(expect))
    block = _recipe(problem, knowledge={"block": "layer"})
    _fails(MissingKnowledgeError, "no block 'layer'.*Did you mean 'layers'", lambda: go(block))
    layer = _recipe(problem, knowledge={"rows": "texts", "layer": 7})
    _fails(
        MissingKnowledgeError, r"does not hold layer 7; found layers \[4, 9\]", lambda: go(layer)
    )
    item = _recipe(problem, knowledge={"rows": "tokens", "item": 3})
    _fails(
        MissingKnowledgeError, "has no item 3 in block 'tokens'; found 1 items", lambda: go(item)
    )
    _fails(
        UnknownNameError, "unknown tuning method 'copp'. Did you mean 'coop'",
        lambda: _recipe(problem, method={"name": "copp"}),
    )  # fmt: skip
    _fails(
        RecipeError, "unknown key 'method.rnak'. Did you mean 'rank'",
        lambda: _recipe(problem, method=CILMP | {"rnak": 3}),
    )  # fmt: skip
    _fails(
        RecipeError, "select best-val and train.average exclude each other",
        lambda: _recipe(problem, train={"select": "best-val", "average": "prompts"}),
    )  # fmt: skip
    _fails(RecipeError, "no such recipe file or preset.*cilmp", lambda: load_tune_recipe("cilm"))
    shots = _recipe(problem, samples={"shots": 50})
    _fails(
        DataError, "too few images for 50 shots",
        lambda: _tune(problem, tmp_path / "shots", shots),
    )  # fmt: skip
    assert not (tmp_path / "bad").exists() and not (tmp_path / "shots").exists()
    _tune(problem, tmp_path / "bad", _recipe(problem, method={"name": "zero-shot"}))
    (tmp_path / "bad" / "run.json").unlink()
    _fails(DataError, "drawn with another number of shots; found 4, wanted 50", lambda: go(shots))
    _fails(RunError, "not a run folder", lambda: evaluate(tmp_path / "nothing"))
    (tmp_path / "file").write_text("x")
    _fails(RunError, "the run folder is a file", lambda: _tune(problem, tmp_path / "file", fine))


def test_a_run_is_bound_to_its_cache_block(
    problem: SimpleNamespace, tmp_path: Path, toy: ModuleType
) -> None:
    recipe = _recipe(problem, train={"epochs": 1, "batch_size": 4})
    _tune(problem, tmp_path / "r", recipe)
    toy.LAYERS, before = toy.LAYERS + 1, toy.LAYERS
    try:
        toy.cache(tmp_path / "another.h5")
    finally:
        toy.LAYERS = before
    _fails(
        RunError, "made with another cache",
        lambda: evaluate(tmp_path / "r", knowledge=tmp_path / "another.h5"),
    )  # fmt: skip


def test_metrics_can_be_recomputed_from_predictions(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    from prompt_tune.metrics import evaluate as measure
    from prompt_tune.predictions import load_predictions

    _tune(problem, tmp_path / "r", _recipe(problem, method={"name": "zero-shot"}))
    found = evaluate(tmp_path / "r", part=9)
    assert (found.result["images"], found.result["split_images"]) == (9, 12)
    saved = load_predictions(found.folder / "predictions.csv")
    again = measure(saved.probabilities, saved.labels, saved.class_names).to_json()
    assert again == found.result["metrics"]


def test_run_json_is_strict_json_without_validation_images(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    recipe = _recipe(problem, method={"name": "linear-probe"}, samples={"shots": 4, "val_shots": 0})
    run = _tune(problem, tmp_path / "r", recipe)
    assert run["training"]["strength"] == 1.0
    assert set(run["training"]) == {"strength", "seconds"}
    assert "NaN" not in (tmp_path / "r" / "run.json").read_text()
