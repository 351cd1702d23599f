"""`evaluate`: metrics of a finished run on one split, with intervals, predictions and figures."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache.durable import storage_errors
from cache.errors import RunError
from cache.progress import track
from cache.recipe import validate
from prompt_tune import figures
from prompt_tune.backbone import BackboneSpec
from prompt_tune.bindings import made_with
from prompt_tune.calibration import scaled_calibration
from prompt_tune.cases import Cases
from prompt_tune.checkpoint import RUN, WEIGHTS, load_weights, read_json, read_run, write_json
from prompt_tune.data.few_shot import SampleList, stratified_part
from prompt_tune.data.images import ImageSplit
from prompt_tune.data.source import DataSource
from prompt_tune.method import Method
from prompt_tune.metrics import evaluate as measure
from prompt_tune.predictions import Predictions, save_predictions
from prompt_tune.published import averaged_backbone
from prompt_tune.recipe import TuneRecipe
from prompt_tune.run_folder import (
    CONFUSION,
    EVALUATIONS,
    METRICS,
    PART,
    PREDICTIONS,
    RELIABILITY,
    SAMPLES,
    headline,
)
from prompt_tune.seeds import make_deterministic
from prompt_tune.setup import Setup, prepare, split_of
from prompt_tune.shelf import Shelf
from prompt_tune.statistics import with_intervals

PART_SEED = 1  # of the stratified part and of the bootstrap: the same images for every run


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one run on one split.

    Attributes:
        folder: where predictions, metrics and figures lie.
        result: the content of `metrics.json`.
    """

    folder: Path
    result: dict[str, Any]


def load_run(
    folder: Path,
    *,
    data: str | None = None,
    knowledge: Path | None = None,
    device: str = "cpu",
    shelf: Shelf | None = None,
) -> Setup:
    """A finished run, rebuilt from its folder with its weights.

    Raises:
        RunError: unfinished, damaged, or data, cache or backbone are not those of the run.
    """
    run = read_run(folder)
    if run.get("status") != "finished":
        raise RunError("the run is not finished", where=folder, do="Run `vademecum tune` again.")
    recipe = validate(TuneRecipe, run["recipe"], where=folder / "run.json")
    local = run.get("local", {})
    knowledge = knowledge or (Path(local["knowledge"]) if local.get("knowledge") else None)
    data, shelf = data or local["data"], shelf or Shelf()
    own, found = run["bindings"].get("dataset"), shelf.data(data).dataset
    if found != own:
        what = f"the run is of data set {own} and the data are {found}"
        raise RunError(what, where=folder, do="Pass --transfer if that is meant.")
    setup = prepare(
        recipe,
        data=data,
        knowledge=knowledge,
        samples=folder / SAMPLES,
        device=device,
        shelf=shelf,
        backbone=backbone_place(recipe.backbone, local.get("backbone")),
    )
    if not made_with(run, recipe, setup.bindings):
        differs = [
            key
            for key in sorted(run["bindings"])
            if key != "cache" and run["bindings"][key] != setup.bindings.get(key)
        ] or ["cache"]
        what = f"the run was made with another {differs[0]}"
        raise RunError(what, where=folder, do="Pass the data and cache of the run.")
    load_weights(folder / WEIGHTS, setup.method.trainable())
    check_weights(folder, run.get("weights"))
    if recipe.train.average == "published":
        setup = averaged_backbone(setup)
    return setup


def backbone_place(spec: BackboneSpec, local: object) -> BackboneSpec:
    """The backbone where the recipe says, or else where it was when the run was made."""
    if spec.path is None or spec.path.exists() or not isinstance(local, str):
        return spec
    return spec.found_at(local)


def check_weights(folder: Path, digest: object) -> None:
    """Nothing, if a loaded weights file is the one the run left."""
    found = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if digest is not None and digest != found:
        what = "the weights are not those that the run left"
        wanted = f"{ascii(digest)[1:17]}…"
        raise RunError(what, where=folder / WEIGHTS, found=f"{found[:16]}…", wanted=wanted)


def metrics_file(folder: Path, split: str, part: int | None) -> Path:
    """Where the metrics of a run on a split, or a part of it, lie."""
    return folder / EVALUATIONS / (split if part is None else f"{split}-{part}") / METRICS


def _part_of(
    images: ImageSplit, part: int | None, place: Path
) -> tuple[ImageSplit, SampleList | None]:
    """A split or its stratified part, and the part's list where that is not saved yet."""
    if part is None or part >= len(images):
        return images, None
    file = place / PART
    if file.is_file():
        return SampleList.load(file).apply(images), None
    chosen = stratified_part(images, part, PART_SEED)
    return chosen.apply(images), chosen


def evaluated_images(source: DataSource, folder: Path, split: str, part: int | None) -> ImageSplit:
    """The images an evaluation of a run is about.

    Raises:
        DataError: no such split, or it is empty.
    """
    images = split_of(source, split, source.dataset)
    return _part_of(images, part, metrics_file(folder, split, part).parent)[0]


def _refuse_other_images(place: Path, images: ImageSplit) -> None:
    """Nothing, if the evaluation in `place` was of these images, or there is none.

    Raises:
        RunError: it was of others.
    """
    try:
        known = read_json(place / METRICS).get("data")
    except FileNotFoundError:
        return
    if known != images.digest:
        what = "the run was evaluated on other images here"
        found, wanted = f"{images.digest[:16]}…", f"{ascii(known)[1:17]}…"
        do = "Remove this folder to evaluate on these."
        raise RunError(what, where=place, found=found, wanted=wanted, do=do)


def predict(method: Method, cases: Cases, size: int) -> torch.Tensor:
    """Logits of every case, `[cases, classes]`, float32 on CPU."""
    rows = []
    with method.predicting(), track("evaluate", len(cases)) as progress:
        for batch in cases.in_order(size):
            rows.append(method.logits(batch).float().cpu())
            progress.advance(len(batch.labels))
    return torch.cat(rows)


def evaluate(
    folder: Path,
    *,
    split: str = "test",
    part: int | None = None,
    setup: Setup | None = None,
    data: str | None = None,
    knowledge: Path | None = None,
    device: str = "cpu",
    resamples: int = 2000,
) -> Evaluation:
    """Evaluates a run on a split, or on a fixed stratified part of it.

    Leaves `eval/<split>/` with `predictions.csv`, `metrics.json`, `confusion.png` and
    `reliability.png`; metrics can be recomputed from the predictions without the model. The
    headline numbers go to `run.json`.

    That folder belongs to the images it was made with: as long as it is there, changed images are
    refused, so that a run has one result on a split. Whoever means the change removes the folder.

    Raises:
        DataError: the backbone was aligned on an image of the split, in the part or not.
        RunError: the folder holds an evaluation on other images.
        VademecumError: the run or its data, cache or backbone cannot be used.
    """
    setup = setup or load_run(folder, data=data, knowledge=knowledge, device=device)
    return evaluate_setup(folder, setup, split=split, part=part, resamples=resamples)


def evaluate_setup(
    folder: Path,
    setup: Setup,
    *,
    split: str,
    part: int | None = None,
    resamples: int = 2000,
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluates what a setup holds, as `evaluate` does.

    Args:
        folder: the run folder.
        setup: a run with its weights.
        split: of the setup's data.
        part: so many images, stratified.
        resamples: of the bootstrap.
        name: of the folder in `eval/`; the split where None.
        facts: what `metrics.json` also says.

    Raises:
        DataError: the backbone was aligned on an image of the split, in the part or not.
        RunError: the folder holds an evaluation on other images.
    """
    run = read_run(folder)
    make_deterministic(setup.device)
    whole = split_of(setup.source, split, setup.source.dataset)
    if split != "train" and setup.backbone.alignment is not None:
        setup.backbone.alignment.check_disjoint(whole.digests)
    place = metrics_file(folder, name or split, part).parent
    images, drawn = _part_of(whole, part, place)
    _refuse_other_images(place, images)
    cases = setup.cases(images)
    logits = predict(setup.method, cases, max(setup.recipe.train.batch_size, 16))
    predictions = Predictions.of(logits.numpy(), images)
    metrics = measure(predictions.probabilities, predictions.labels, predictions.class_names)
    result: dict[str, Any] = {
        **(facts or {}),
        "run": run["digest"],
        "weights": run.get("weights"),
        "split": split,
        "images": len(images),
        "split_images": len(whole),
        "data": images.digest,
        "metrics": metrics.to_json(),
        "intervals": with_intervals(
            predictions.probabilities,
            predictions.labels,
            patients=images.patients,
            resamples=resamples,
            seed=PART_SEED,
        ),
        "scaled": _scaled(setup, predictions) if split == "test" else None,
    }
    with storage_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    if drawn is not None:
        drawn.save(place / PART)
    save_predictions(predictions, place / PREDICTIONS)
    write_json(place / METRICS, result)
    _note(folder, place, result)
    figures.confusion_matrix(
        predictions.probabilities, predictions.labels, predictions.class_names, place / CONFUSION
    )
    figures.reliability_diagram(predictions.probabilities, predictions.labels, place / RELIABILITY)
    return Evaluation(place, result)


def _scaled(setup: Setup, test: Predictions) -> dict[str, Any] | None:
    """Calibration after temperature scaling on the run's validation images, if it has any."""
    if setup.val is None or len(setup.val) == 0:
        return None
    logits = predict(setup.method, setup.cases(setup.val), max(setup.recipe.train.batch_size, 16))
    return scaled_calibration(test, Predictions.of(logits.numpy(), setup.val))


def _note(folder: Path, place: Path, result: dict[str, Any]) -> None:
    """Writes the headline of an evaluation into `run.json`, beside those of other splits."""
    run = read_run(folder)  # again: another split may have been evaluated meanwhile
    known = run.get("metrics")
    entry = headline(result, (place / METRICS).relative_to(folder).as_posix())
    run["metrics"] = (known if isinstance(known, dict) else {}) | {place.name: entry}
    write_json(folder / RUN, run)
