"""What a run is put together from: classes, splits, devices, and where a smoke run goes on."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from cache.errors import DataError, RecipeError, SystemRefusedError
from cache.recipe import digest_of, validate
from prompt_tune import loop
from prompt_tune.bindings import binding_digest
from prompt_tune.checkpoint import TrainState
from prompt_tune.data.source import load_data
from prompt_tune.evaluation import evaluate
from prompt_tune.predictions import load_predictions
from prompt_tune.recipe import TrainSpec, TuneRecipe
from prompt_tune.report import describe_run
from prompt_tune.setup import pick_device, prepare, split_of
from prompt_tune.shelf import Shelf
from prompt_tune.tuning import RunResult, tune

CILMP = {
    "name": "cilmp", "text_depth": 1, "visual_depth": 0, "prefix": 1, "suffix": 1, "rank": 2,
}  # fmt: skip


def recipe_of(problem: SimpleNamespace, **changes: object) -> TuneRecipe:
    base = {
        "backbone": {"folder": str(problem.backbone)},
        "method": {"name": "coop"},
        "samples": {"shots": 2, "val_shots": 1},
        "train": {"epochs": 2, "batch_size": 2, "lr": 0.01},
    }
    return validate(TuneRecipe, base | changes, where="test")


def go(problem: SimpleNamespace, recipe: TuneRecipe, out: Path) -> RunResult:
    return tune(recipe, data=problem.data, knowledge=problem.knowledge, out=out)


def test_classes_select_everywhere_in_the_order_of_the_data(
    problem: SimpleNamespace, tmp_path: Path
) -> None:
    first, _, last = problem.classes
    recipe = recipe_of(problem, method=CILMP, classes=[last, first])
    result = go(problem, recipe, tmp_path / "run")
    setup = result.setup
    assert setup is not None and setup.val is not None and setup.knowledge is not None
    assert [c["id"] for c in result.run["bindings"]["classes"]] == [first, last]
    assert setup.method.class_names == (first, last)
    for split, count in ((setup.train, 4), (setup.val, 2), (setup.source["test"], 8)):
        assert [c.id for c in split.classes] == [first, last]
        assert len(split) == count
        assert all(Path(f).parent.name in {first, last} for f in split.files)
    whole = prepare(
        recipe_of(problem, method=CILMP), data=problem.data, knowledge=problem.knowledge,
        samples=None,
    ).knowledge  # fmt: skip
    assert whole is not None and whole.rows is not None and setup.knowledge.rows is not None
    for mine, theirs in zip(setup.knowledge.rows.values, (0, 2), strict=True):
        assert torch.equal(mine, whole.rows.values[theirs])
    assert evaluate(tmp_path / "run", resamples=10).result["images"] == 8
    saved = load_predictions(tmp_path / "run" / "eval" / "test" / "predictions.csv")
    assert saved.class_names == (first, last)
    same = go(problem, recipe_of(problem, method=CILMP, classes=[first, last]), tmp_path / "same")
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "weights.safetensors")
        for name in ("run", "same")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert same.run["bindings"] == result.run["bindings"]


def test_unused_classes_of_the_cache_are_shown(problem: SimpleNamespace, tmp_path: Path) -> None:
    first, second, last = problem.classes
    run = go(problem, recipe_of(problem, method=CILMP, classes=[first, last]), tmp_path / "r").run
    line = f"not used   {second}: in the cache, not in this run"
    assert line in describe_run(run, tmp_path).splitlines()
    run["bindings"]["cache"]["unused_classes"] = [f"c{k}" for k in range(8)]
    assert "not used   c0, c1, c2, c3, c4 and 3 more: in the" in describe_run(run, tmp_path)
    run["bindings"]["cache"]["unused_classes"] = []
    assert "not used" not in describe_run(run, tmp_path)


@pytest.mark.parametrize("chosen", [["monocyte"], ["monocyte", "monocyte"], []])
def test_too_few_classes_are_refused(problem: SimpleNamespace, chosen: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"classes: not a choice of classes; found .* wanted two"):
        recipe_of(problem, classes=chosen)


def test_an_unknown_class_is_refused_with_the_nearest(problem: SimpleNamespace) -> None:
    recipe = recipe_of(problem, classes=["monocite", "platelet"])
    with pytest.raises(DataError, match=r"no class 'monocite'\. Did you mean 'monocyte'\?"):
        prepare(recipe, data=problem.data, knowledge=None, samples=None)


def test_a_recipe_without_the_later_keys_keeps_its_digest(problem: SimpleNamespace) -> None:
    plain = recipe_of(problem)
    fields = plain.model_dump()
    del fields["classes"], fields["backbone"]
    for key in ("optimizer", "precision", "max_gb", "compile", "flip"):
        del fields["train"][key]
    for key in ("texts", "symptoms", "attributes"):
        del fields["knowledge"][key]
    assert binding_digest(plain, {}) == digest_of({"recipe": fields, "bindings": {"cache": {}}})
    chosen = recipe_of(problem, classes=list(problem.classes))
    assert binding_digest(chosen, {}) != binding_digest(plain, {})


def test_a_shelf_selects_classes_once(problem: SimpleNamespace) -> None:
    shelf, chosen = Shelf(), tuple(problem.classes[:2])
    part = shelf.data(problem.data, chosen)
    assert shelf.data(problem.data, chosen) is part
    assert len(shelf.data(problem.data).classes) == 3


def test_a_split_without_images_is_named(problem: SimpleNamespace) -> None:
    source = load_data(problem.data)
    assert len(split_of(source, "val", "here")) == 6
    found = "; found test, train, val"
    source.splits["val"] = source["val"].subset([])
    with pytest.raises(DataError, match=f"^here: the val split is empty{found}"):
        split_of(source, "val", "here")
    del source.splits["val"]
    with pytest.raises(DataError, match=r"^here: the val split is missing; found test, train"):
        split_of(source, "val", "here")


def test_a_device_that_is_not_here_is_one_line(problem: SimpleNamespace, tmp_path: Path) -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    match = "the device 'cuda:99' cannot be used; found .*Use --device cpu, or auto"
    with pytest.raises(SystemRefusedError, match=match) as caught:
        pick_device("cuda:99")
    assert "\n" not in str(caught.value)
    match = "^--device: no such device; found 'gpu', wanted cpu, cuda, cuda:N or auto$"
    with pytest.raises(RecipeError, match=match):
        pick_device("gpu")
    with pytest.raises(SystemRefusedError, match="'cuda:99' cannot be used"):
        tune(recipe_of(problem), data=problem.data, out=tmp_path / "run", device="cuda:99")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("max_steps", "checkpoint_steps"), [(3, None), (6, None), (2, None), (5, None), (2, 2), (5, 1)]
)
def test_a_smoke_run_goes_on_wherever_it_was_stopped(
    problem: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_steps: int,
    checkpoint_steps: int | None,
) -> None:  # fmt: skip
    """Three steps an epoch; stopped after every state that is ever saved, the last one included."""
    train = {
        "epochs": 4, "batch_size": 2, "lr": 0.01, "max_steps": max_steps,
        "checkpoint_steps": checkpoint_steps,
    }  # fmt: skip
    recipe = recipe_of(problem, train=train)
    whole = go(problem, recipe, tmp_path / "whole").run["training"]
    assert whole["steps"] == max_steps
    assert len(whole["history"]) == -(-max_steps // 3)
    save, saved = loop.save_state, []

    def stop(folder: Path, state: TrainState, *, recipe_digest: str) -> None:
        save(folder, state, recipe_digest=recipe_digest)
        saved.append((state.epoch, state.step))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", stop)
        for _ in range(20):
            try:
                go(problem, recipe, tmp_path / "stopped")
            except KeyboardInterrupt:
                continue
            break
    assert len(saved) == len(set(saved))
    stopped = json.loads((tmp_path / "stopped" / "run.json").read_text())["training"]
    assert stopped["history"] == whole["history"]
    assert (stopped["steps"], stopped["kept"]) == (max_steps, whole["kept"])
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "weights.safetensors")
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_published_averaging_sums_in_the_precision_of_each_tensor(
    problem: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prompt_tune.schedule import epoch_weights

    seen: list[dict[str, torch.Tensor]] = []
    end = loop._end_of_epoch

    def spy(method, *rest, **named):  # type: ignore[no-untyped-def]
        seen.append({n: p.detach().clone() for n, p in method.trainable().items()})
        end(method, *rest, **named)

    monkeypatch.setattr(loop, "_end_of_epoch", spy)
    train = {"epochs": 5, "batch_size": 2, "lr": 0.05, "average": "published"}
    method = CILMP | {"text_depth": 2, "precision": "published"}
    result = go(problem, recipe_of(problem, method=method, train=train), tmp_path / "run")
    tensors = safetensors.torch.load_file(tmp_path / "run" / "weights.safetensors")
    weights = epoch_weights(TrainSpec(epochs=5))
    assert result.setup is not None
    names = sorted(result.setup.method.prompts())
    assert {tensors[n].dtype for n in names} == {torch.float16, torch.float32}
    for name in names:
        mean = torch.zeros_like(tensors[name])
        for weight, epoch in zip(weights, seen, strict=True):
            mean += epoch[name] * weight
        assert torch.equal(tensors[name], mean), name
        if mean.dtype == torch.float16:
            exact = sum(w * e[name].float() for w, e in zip(weights, seen, strict=True))
            assert not torch.equal(mean, torch.as_tensor(exact).half())


def test_training_gives_frozen_features_beside_pixels_where_a_method_reads_them(
    problem: SimpleNamespace,
) -> None:
    recipe = recipe_of(problem, method={"name": "promptsrc"})
    setup = prepare(recipe, data=problem.data, knowledge=None, samples=None)
    batches = [
        setup.cases(setup.train, training=training).batch(torch.arange(2), epoch=1)
        for training in (True, False)
    ]
    assert [batch.features is not None for batch in batches] == [True, False]
    assert all(batch.images is not None for batch in batches)
