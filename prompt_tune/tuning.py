"""`tune`: from a recipe, a cache and images to a run folder."""

import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from cache.durable import storage_errors, write_atomic
from cache.errors import RunError
from cache.progress import say
from prompt_tune import figures
from prompt_tune.bindings import binding_digest, differing, made_with
from prompt_tune.checkpoint import FORMAT, RUN, STATE, WEIGHTS, read_run, write_json
from prompt_tune.execution import Execution, executing
from prompt_tune.loop import train
from prompt_tune.method import Method
from prompt_tune.published import averaged_backbone
from prompt_tune.recipe import TuneRecipe
from prompt_tune.rehearsal import planned
from prompt_tune.run_folder import CURVES, SAMPLES, absolute, clear
from prompt_tune.seeds import make_deterministic
from prompt_tune.setup import Setup, pick_device, prepare, used_knowledge
from prompt_tune.shelf import Shelf

PACKAGES = ("vademecum", "torch", "open_clip_torch", "transformers", "numpy", "scikit-learn")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: the run folder.
        run: the content of `run.json`.
        setup: what it was trained with, ready to evaluate; None when it was already finished.
    """

    folder: Path
    run: dict[str, Any]
    setup: Setup | None


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parameter_counts(method: Method) -> dict[str, int]:
    """How many numbers and tensors the method trains."""
    trainable = method.trainable()
    return {"scalars": sum(p.numel() for p in trainable.values()), "tensors": len(trainable)}


def selection_rule(recipe: TuneRecipe) -> str:
    """In words, which weights a run keeps. The test split never has a say."""
    spec = recipe.train
    if recipe.method_class().fitted_by != "gradient":
        return "no epochs: fitted at once, hyper-parameters by validation accuracy if any"
    if spec.max_steps is not None:
        return f"smoke run: the weights after {spec.max_steps} steps"
    if spec.select == "best-val":
        return "the epoch with the best validation accuracy, the earliest on a tie"
    averaged = "" if spec.average == "none" else f", {spec.average} averaged over epochs"
    return f"the last epoch{averaged}"


def _execution(setup: Setup, earlier: Mapping[str, Any]) -> Execution:
    """How steps run: as in the unfinished run they continue, or as fits in memory."""
    method, spec = setup.method, setup.recipe.train
    usual = method.backbone.image.execution
    if method.fitted_by != "gradient":
        return usual
    if (known := earlier.get("execution")) is not None:
        return Execution.from_json(known)
    chosen = planned(method, min(spec.batch_size, len(setup.train)), max_gb=spec.max_gb)
    if chosen is None:
        return usual
    say(chosen.describe())
    return chosen.execution


def _fit(setup: Setup, out: Path, digest: str) -> Mapping[str, Any]:
    method, spec = setup.method, setup.recipe.train
    if method.fitted_by == "nothing":
        return {}
    solved = method.fitted_by == "solver"
    cases = setup.cases(setup.train, training=not solved)
    selects = solved or spec.select == "best-val"
    val = setup.cases(setup.val) if setup.val is not None and selects else None
    if solved:
        everything = torch.arange(len(cases))
        val_batch = val.batch(torch.arange(len(val))) if val is not None else None
        batch, began = cases.batch(everything), time.perf_counter()
        found = method.fit(batch, val_batch)
        return {**found, "seconds": time.perf_counter() - began}
    return train(method, cases, val, spec, folder=out, digest=digest)


def tune(
    recipe: TuneRecipe,
    *,
    data: str,
    out: Path,
    knowledge: Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    shelf: Shelf | None = None,
) -> RunResult:
    """Tunes one method and leaves a run folder; an unfinished run of the same recipe goes on.

    The folder holds `weights.safetensors` (trainable tensors only), `run.json` (resolved recipe,
    bindings, seeds, versions, history), `curves.png` and the sample lists. Nothing is written
    before recipe, data, cache and backbone are known to fit; with `overwrite` that is also when
    the earlier run goes, its evaluations and sample lists with it.

    Raises:
        VademecumError: bad recipe, data, cache or backbone; a folder of another run; a missing
            cache, even if the method reads none.
    """
    if out.is_file():
        raise RunError("the run folder is a file", where=out)
    make_deterministic(pick_device(device))
    shelf, knowledge = shelf or Shelf(), used_knowledge([recipe], knowledge)
    if not overwrite and (out / RUN).is_file():
        source = shelf.data(data, recipe.classes)
        _refuse_another(out, differing(read_run(out), recipe, {"dataset": source.dataset}))
    setup = prepare(
        recipe,
        data=data,
        knowledge=knowledge,
        samples=None if overwrite else out / SAMPLES,
        device=device,
        shelf=shelf,
    )
    digest = binding_digest(recipe, setup.bindings)
    earlier: Mapping[str, Any] = {}
    if overwrite:
        clear(out)
    elif (out / RUN).is_file():
        run = read_run(out)
        if not made_with(run, recipe, setup.bindings):
            _refuse_another(out, differing(run, recipe, setup.bindings) or ["its digest"])
        if run.get("status") == "finished":
            return RunResult(out, run, None)
        earlier, digest = run, run["digest"]
    execution = _execution(setup, earlier)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    setup.save_samples(out / SAMPLES)
    run = {
        "format": FORMAT,
        "status": "running",
        "digest": digest,
        "recipe": recipe.model_dump(mode="json"),
        "bindings": setup.bindings,
        "backbone": {"name": setup.backbone.name, "notes": dict(setup.backbone.notes)},
        "parameters": parameter_counts(setup.method),
        "selection": selection_rule(recipe),
        "smoke": recipe.train.max_steps is not None,
        "execution": execution.to_json(),
        "versions": versions(),
        "local": _local(recipe, data, knowledge),
    }
    write_json(out / RUN, run)
    usual, method = setup.method.backbone, setup.method
    method.backbone = executing(usual, execution)
    run["training"] = dict(_fit(setup, out, digest))
    method.backbone = usual
    if recipe.train.average == "published":
        setup = averaged_backbone(setup)
    tensors = {n: p.detach().cpu().contiguous() for n, p in setup.method.trainable().items()}
    weights = safetensors.torch.save(tensors)
    write_atomic(out / WEIGHTS, weights)
    if len(run["training"].get("history", ())) > 1:
        figures.training_curves(run["training"]["history"], out / CURVES)
    run |= {"weights": hashlib.sha256(weights).hexdigest(), "status": "finished"}
    write_json(out / RUN, run)
    (out / STATE).unlink(missing_ok=True)
    return RunResult(out, run, setup)


def _refuse_another(out: Path, keys: Sequence[str]) -> None:
    """Nothing, if the run of a folder differs in no key.

    Raises:
        RunError: it differs; the first keys are named.
    """
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        what = f"the folder holds another run; it differs in {', '.join(keys[:3])}{more}"
        raise RunError(what, where=out, do="Choose another --out, or pass --overwrite.")


def _local(recipe: TuneRecipe, data: str, knowledge: Path | None) -> dict[str, str | None]:
    """Where things lie on this machine, from whatever folder; never part of a digest."""
    backbone = recipe.backbone.path
    return {
        "data": absolute(data),
        "knowledge": None if knowledge is None else str(knowledge.absolute()),
        "backbone": None if backbone is None else str(backbone.absolute()),
    }
