"""`evaluate`: metrics of a finished run on one split, with intervals, predictions and figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache.errors import RunError
from cache.progress import track
from cache.recipe import validate
from prompt_tune import figures
from prompt_tune.alignment_record import alignment_record
from prompt_tune.cases import Cases
from prompt_tune.checkpoint import WEIGHTS, load_weights, read_run, write_json
from prompt_tune.data.few_shot import SampleList, stratified_part
from prompt_tune.method import Method
from prompt_tune.metrics import evaluate as measure
from prompt_tune.predictions import Predictions, save_predictions
from prompt_tune.published import averaged_backbone
from prompt_tune.recipe import TuneRecipe
from prompt_tune.setup import Setup, binding_digest, prepare, split_of
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
    setup = prepare(
        recipe,
        data=data or local["data"],
        knowledge=knowledge,
        samples=folder / "samples",
        device=device,
        shelf=shelf,
    )
    if binding_digest(recipe, setup.bindings) != run["digest"]:
        differs = [
            key
            for key in sorted(run["bindings"])
            if key != "cache" and run["bindings"][key] != setup.bindings.get(key)
        ] or ["cache"]
        what = f"the run was made with another {differs[0]}"
        raise RunError(what, where=folder, do="Pass the data and cache of the run.")
    load_weights(folder / WEIGHTS, setup.method.trainable())
    if recipe.train.average == "published":
        setup = averaged_backbone(setup)
    return setup


def metrics_file(folder: Path, split: str, part: int | None) -> Path:
    """Where the metrics of a run on a split, or a part of it, lie."""
    return folder / "eval" / (split if part is None else f"{split}-{part}") / "metrics.json"


def predict(method: Method, cases: Cases, size: int) -> torch.Tensor:
    """Logits of every case, `[cases, classes]`, float32 on CPU."""
    method.eval()
    rows = []
    with torch.no_grad(), track("evaluate", len(cases)) as progress:
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
    `reliability.png`; metrics can be recomputed from the predictions without the model.

    Raises:
        DataError: the backbone was aligned on one of these images.
        VademecumError: the run or its data, cache or backbone cannot be used.
    """
    setup = setup or load_run(folder, data=data, knowledge=knowledge, device=device)
    images = split_of(setup.source, split, setup.source.dataset)
    whole = len(images)
    place = metrics_file(folder, split, part).parent
    place.mkdir(parents=True, exist_ok=True)
    if part is not None and part < whole:
        list_file = place / "samples.json"
        if list_file.is_file():
            chosen = SampleList.load(list_file)
        else:
            chosen = stratified_part(images, part, PART_SEED)
            chosen.save(list_file)
        images = chosen.apply(images)
    if split != "train" and (aligned := setup.recipe.backbone.aligned):
        alignment_record(Path(aligned).expanduser()).check_disjoint(images.digests)
    cases = setup.cases(images)
    logits = predict(setup.method, cases, max(setup.recipe.train.batch_size, 16))
    predictions = Predictions.of(logits.numpy(), images)
    save_predictions(predictions, place / "predictions.csv")
    metrics = measure(predictions.probabilities, predictions.labels, predictions.class_names)
    result: dict[str, Any] = {
        "split": split,
        "images": len(images),
        "split_images": whole,
        "data": images.digest,
        "metrics": metrics.to_json(),
        "intervals": with_intervals(
            predictions.probabilities,
            predictions.labels,
            patients=images.patients,
            resamples=resamples,
            seed=PART_SEED,
        ),
    }
    write_json(metrics_file(folder, split, part), result)
    figures.confusion_matrix(
        predictions.probabilities,
        predictions.labels,
        predictions.class_names,
        place / "confusion.png",
    )
    figures.reliability_diagram(
        predictions.probabilities, predictions.labels, place / "reliability.png"
    )
    return Evaluation(place, result)
