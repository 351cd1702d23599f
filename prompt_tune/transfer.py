"""A finished run on classes or data it was not tuned on: base-to-novel and cross-dataset transfer.

The method is built anew for the other classes, with their names, and with what a knowledge cache
says of them, and gets the weights of the run. That needs weights that belong to no class: a method
with a parameter per class (a linear probe, a context of its own for every class), or with a memory
of its training images, is refused. So is knowledge made in another way than that of the run.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.errors import DataError, RunError
from cache.recipe import digest_of, validate
from prompt_tune.checkpoint import WEIGHTS, load_weights, read_json, read_run
from prompt_tune.data.protocols import base_to_novel, harmonic_mean
from prompt_tune.data.source import DataSource
from prompt_tune.evaluation import (
    Evaluation,
    backbone_place,
    check_weights,
    evaluate_setup,
    load_run,
    metrics_file,
)
from prompt_tune.knowledge import LoadedKnowledge
from prompt_tune.method import ClassTexts, KnowledgeRows, Method, Problem
from prompt_tune.published import averaged_backbone
from prompt_tune.recipe import TuneRecipe
from prompt_tune.run_folder import is_of
from prompt_tune.setup import Setup, built, knowledge_of, pick_device, problem_of
from prompt_tune.shelf import Shelf

NAMED = ("all", "base", "novel")
TUNE_THERE = "Tune it on these classes."


def chosen_classes(source: DataSource, classes: str | Sequence[str]) -> tuple[str, ...]:
    """Class ids in label order: `all`, `base`, `novel` (see `base_to_novel`), or those listed.

    Raises:
        DataError: an unknown class, or fewer than two.
    """
    if classes == "all":
        return source.class_ids
    if classes in ("base", "novel"):
        halves = base_to_novel(source.class_ids)
        return halves.base if classes == "base" else halves.novel
    listed = [c.strip() for c in classes.split(",")] if isinstance(classes, str) else list(classes)
    if len(listed) < 2:
        what = "not a choice of classes"
        wanted = "all, base, novel, or at least two ids with commas between"
        raise DataError(what, where=source.dataset, found=classes, wanted=wanted)
    return tuple(source.ordered(listed))


def evaluation_name(dataset: str, split: str, classes: str | Sequence[str]) -> str:
    """The folder in `eval/` of an evaluation on chosen classes.

    Listed classes are named by their number and the start of a digest of their ids.
    """
    if not isinstance(classes, str):
        classes = f"{len(classes)}-{digest_of(list(classes))[:8]}"
    return f"{dataset}-{split}-{classes}"


def evaluate_on(
    folder: Path,
    *,
    data: str | None = None,
    classes: str | Sequence[str] = "all",
    split: str = "test",
    part: int | None = None,
    knowledge: Path | None = None,
    device: str = "cpu",
    transfer: bool = False,
) -> Evaluation:
    """Evaluates a run on other classes of its data, or on other data.

    Leaves `eval/<dataset>-<split>-<classes>/` as `evaluate` leaves `eval/<split>/`; `metrics.json`
    also says on which classes, on which the run was tuned, and which blocks of knowledge were read.
    The images are bound by their digest. On data of the run's own id, data, samples, cache and
    backbone must be exactly those of the run; elsewhere backbone and weights must, and the rows of
    knowledge must come from a block made in the same way: the same model, question and layers.
    Texts may come from anywhere. Nothing is fitted to the new data, temperature included.

    Args:
        folder: the run folder.
        data: where the images are; the run's where None.
        classes: `all`, `base`, `novel`, or class ids.
        split: of those data.
        part: so many images, stratified.
        knowledge: a cache that holds these classes; the run's where None.
        device: where to compute.
        transfer: whether other data than the run's are meant.

    Raises:
        DataError: an unknown class; the backbone was aligned on a held-out image or novel class.
        RunError: other data without `transfer`; classes that the run was tuned on as novel ones; a
            method whose weights belong to its classes; another backbone, cache or weights.
    """
    run, shelf, where = read_run(folder), Shelf(), pick_device(device)
    if run["status"] != "finished":
        raise RunError("the run is not finished", where=folder, do="Run `vademecum tune` again.")
    recipe = validate(TuneRecipe, run["recipe"], where=folder / "run.json")
    local = run["local"]
    place = data or local["data"]
    path = knowledge or (Path(local["knowledge"]) if local.get("knowledge") else None)
    whole = shelf.data(place)
    ids = chosen_classes(whole, classes)
    here = _same_data(folder, run, whole, transfer=transfer)
    trained = [c["id"] for c in run["bindings"]["classes"]] if here else []
    if here:
        if classes == "novel" and (seen := sorted(set(trained) & set(ids))):
            what = "the run was tuned on a class that would be novel"
            do = f"Tune with --set classes=[{','.join(base_to_novel(whole.class_ids).base)}]."
            raise RunError(what, where=folder, found=", ".join(seen), do=do)
        load_run(folder, data=place, knowledge=path, device=where, shelf=shelf)
    else:
        recipe = recipe.model_copy(
            update={"knowledge": recipe.knowledge.model_copy(update={"expect": None})}
        )
    setup = _setup(
        folder, run, recipe, source=whole.select(ids), knowledge=path, device=where, shelf=shelf
    )
    record = setup.backbone.alignment
    if record is not None and record.dataset == whole.dataset:
        record.check_disjoint((), [c for c in ids if c not in trained])
    listed = classes if isinstance(classes, str) and classes in NAMED else ids
    return evaluate_setup(
        folder,
        setup,
        split=split,
        part=part,
        name=evaluation_name(whole.dataset, split, listed),
        facts={"on": {"of": list(whole.class_ids), **_facts(run, setup)}},
    )


def _same_data(folder: Path, run: dict[str, Any], source: DataSource, *, transfer: bool) -> bool:
    """Whether the data have the id of the run's; other data only if they are meant."""
    own = run["bindings"]["dataset"]
    if source.dataset != own and not transfer:
        what = "the run was tuned on another data set"
        do = "Pass --transfer if that is meant."
        raise RunError(what, where=folder, found=own, wanted=source.dataset, do=do)
    return bool(source.dataset == own)


def _setup(
    folder: Path,
    run: dict[str, Any],
    recipe: TuneRecipe,
    *,
    source: DataSource,
    knowledge: Path | None,
    device: str,
    shelf: Shelf,
) -> Setup:
    """The run's weights in a method for the classes of `source`."""
    backbone = shelf.backbone(backbone_place(recipe.backbone, run["local"].get("backbone")), device)
    if backbone.fingerprint != run["bindings"]["backbone"]:
        raise RunError("the run was made with another backbone", where=folder)
    loaded = knowledge_of(recipe, source, knowledge, shelf, backbone)
    _refuse_other_knowledge(folder, run, loaded)
    problem = problem_of(recipe, source, backbone, loaded, None)
    method = _without_classes(folder, recipe, problem).to(device)
    load_weights(folder / WEIGHTS, method.trainable())
    check_weights(folder, run.get("weights"))
    train = source["train"]  # only its place is filled: nothing is trained or fitted here
    setup = Setup(recipe, source, backbone, loaded, method, train, None, {}, {}, device, shelf)
    return averaged_backbone(setup) if recipe.train.average == "published" else setup


def _refuse_other_knowledge(
    folder: Path, run: dict[str, Any], loaded: LoadedKnowledge | None
) -> None:
    """Nothing, if the rows were made as the run's; an older run does not say how they were."""
    wanted = run["bindings"].get("cache", {}).get("block_made")
    found = loaded.block_made if loaded else None
    if wanted is not None and wanted != found:
        what = "the rows of knowledge were made in another way than those of the run"
        do = "Extract these classes with the run's extraction recipe."
        raise RunError(what, where=folder, found=found, wanted=wanted, do=do)


def _without_classes(folder: Path, recipe: TuneRecipe, problem: Problem) -> Method:
    """The method for `problem`, whose weights must not depend on how many classes there are.

    Shapes with these classes are compared with shapes with one class more.
    """
    name = recipe.method["name"]
    try:
        other = built(recipe, _one_class_more(problem)).trainable()
        method = built(recipe, problem)
    except ValueError as error:
        what = f"the method {name!r} keeps something of its training images ({error})"
        raise RunError(what, where=folder, do=TUNE_THERE) from error
    for key, parameter in method.trainable().items():
        if key not in other or other[key].shape != parameter.shape:
            what = f"the method {name!r} has weights for each of its classes ({key})"
            raise RunError(what, where=folder, do=TUNE_THERE)
    return method


def _one_class_more(problem: Problem) -> Problem:
    """The problem with the class of the shortest name twice."""
    names = problem.class_names
    k = min(range(len(names)), key=lambda i: len(names[i]))
    rows, texts = problem.rows, problem.texts
    symptoms, attributes = problem.symptoms, problem.attributes
    return dataclasses.replace(
        problem,
        class_names=(*names, names[k]),
        rows=rows and KnowledgeRows((*rows.values, rows.values[k])),
        texts=texts
        and ClassTexts(
            (*texts.strings, texts.strings[k]), (*texts.embeddings, texts.embeddings[k])
        ),
        symptoms=symptoms and (*symptoms, symptoms[k]),
        attributes=attributes and (*attributes, attributes[k]),
    )


def _facts(run: dict[str, Any], setup: Setup) -> dict[str, Any]:
    bound, loaded = run["bindings"], setup.knowledge
    return {
        "dataset": setup.source.dataset,
        "classes": [{"id": c.id, "name": c.name} for c in setup.source.classes],
        "tuned_on": {"dataset": bound["dataset"], "classes": [c["id"] for c in bound["classes"]]},
        "cache": None
        if loaded is None
        else {
            "content_id": loaded.content_id,
            "block_id": loaded.block_id,
            "block_made": loaded.block_made,
            "texts": loaded.texts.blocks,
        },
    }


@dataclasses.dataclass(frozen=True)
class BaseToNovel:
    """Accuracies of one checkpoint on both halves, and their harmonic mean.

    `images` are the digests of the images of either half.
    """

    base: float
    novel: float
    harmonic: float
    images: tuple[str, str]


def base_to_novel_of(folder: Path, *, split: str = "test", part: int | None = None) -> BaseToNovel:
    """What one run says of base-to-novel, from its evaluations on both halves.

    The base half is the run's own `eval/<split>` where it was tuned on just those classes. `part`
    is what both evaluations were made with.

    Raises:
        RunError: the run was not evaluated on one half, or not with the weights it has now.
    """
    run = read_run(folder)
    dataset = run["bindings"]["dataset"]
    novel = _result(folder, run, evaluation_name(dataset, split, "novel"), part, "novel")
    base = base_to_novel(novel["on"]["of"]).base
    own = sorted(base) == sorted(c["id"] for c in run["bindings"]["classes"])
    name = split if own else evaluation_name(dataset, split, "base")
    half = _result(folder, run, name, part, None if own else "base")
    ours, other = (float(one["metrics"]["accuracy"]) for one in (half, novel))
    images = str(half["data"]), str(novel["data"])
    return BaseToNovel(ours, other, harmonic_mean(ours, other), images)


def _result(
    folder: Path, run: dict[str, Any], name: str, part: int | None, classes: str | None
) -> dict[str, Any]:
    place = metrics_file(folder, name, part)
    try:
        result = read_json(place)
    except FileNotFoundError:
        result = {}
    if not is_of(result, run):
        what = f"the run was not evaluated on {place.parent.name!r} with the weights it has now"
        with_them = "" if classes is None else f" with --classes {classes}"
        raise RunError(what, where=folder, do=f"Run `vademecum eval`{with_them} first.")
    return result
