"""Puts a run together: data, sample lists, backbone, knowledge and method."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache.devices import check_device
from cache.durable import storage_errors
from cache.errors import DataError, MissingKnowledgeError, SystemRefusedError
from cache.progress import say
from prompt_tune.alignment_record import AlignmentRecord
from prompt_tune.backbone import Backbone, BackboneSpec
from prompt_tune.cases import Cases
from prompt_tune.data.few_shot import SampleList, few_shot
from prompt_tune.data.source import DataSource, ImageSplit
from prompt_tune.execution import Execution, executing
from prompt_tune.knowledge import LoadedKnowledge, load_knowledge
from prompt_tune.method import Method, Problem
from prompt_tune.recipe import SampleSpec, TuneRecipe
from prompt_tune.seeds import derive_seed
from prompt_tune.shelf import Shelf

VAL_SHOTS = 4  # at most so many validation images per class in few-shot runs, as in CoOp


@dataclass(frozen=True)
class Setup:
    """A run that is ready to train or to evaluate.

    Attributes:
        bindings: what the result depends on besides the recipe: content and block id of the cache,
            backbone fingerprint, data digests, class list, sample list digests.
        shelf: what it shares with other runs of this process.
    """

    recipe: TuneRecipe
    source: DataSource
    backbone: Backbone
    knowledge: LoadedKnowledge | None
    method: Method
    train: ImageSplit
    val: ImageSplit | None
    samples: dict[str, SampleList]
    bindings: dict[str, Any]
    device: str
    shelf: Shelf

    def save_samples(self, folder: Path) -> None:
        """Writes the sample lists that are not in `folder` yet.

        Raises:
            StorageError: the folder cannot be made or written.
        """
        for name, chosen in self.samples.items():
            if not (file := folder / f"{name}.json").is_file():
                with storage_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                chosen.save(file)

    def cases(self, split: ImageSplit, *, training: bool = False) -> Cases:
        """A split as this run's method reads it."""
        return Cases(
            split,
            executing(self.method.backbone, Execution()),  # features are kept in full precision
            pixels=self.method.reads_images,
            frozen=training and self.method.reads_features,
            views=self.recipe.train.views if training else 1,
            flip=self.recipe.train.flip,
            seed=self.recipe.seed,
            device=self.device,
            open_store=self.shelf.features,
        )


def pick_device(device: str) -> str:
    """`device`, or the best one of this machine for `auto`.

    Raises:
        RecipeError: no name of a device.
        SystemRefusedError: a device this machine does not have.
    """
    check_device(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        what = f"the device {device!r} cannot be used"
        do = "Use --device cpu, or auto."
        raise SystemRefusedError(what, found=str(error).splitlines()[0], do=do) from error
    return device


def split_of(source: DataSource, name: str, data: str) -> ImageSplit:
    """A split that has images.

    Raises:
        DataError: there is no such split, or it is empty.
    """
    split = source.splits.get(name)
    if split is None or len(split) == 0:
        what = f"the {name} split is {'missing' if split is None else 'empty'}"
        raise DataError(what, where=data, found=", ".join(sorted(source.splits)))
    return split


def _chosen(
    split: ImageSplit, shots: int | None, seed: int, folder: Path | None
) -> SampleList | None:
    """The saved sample list of a split, or a new one that is not saved; None is all of it."""
    file = None if folder is None else folder / f"{split.name}.json"
    if file is not None and file.is_file():
        stored = SampleList.load(file, split)
        if stored.size != shots:
            what = "the saved sample list was drawn with another number of shots"
            do = "Use another run folder."
            raise DataError(what, where=file, found=stored.size, wanted=shots, do=do)
        return stored
    if shots is None:
        return None
    return few_shot(split, shots, seed, allow_fewer=split.name != "train")


def _validation_shots(spec: SampleSpec) -> int | None:
    if spec.val_shots is not None:
        return spec.val_shots
    return None if spec.shots is None else min(spec.shots, VAL_SHOTS)


def _sampled(
    spec: SampleSpec, source: DataSource, data: str, folder: Path | None
) -> tuple[dict[str, ImageSplit], dict[str, SampleList]]:
    """The training and validation images a run may see, and the lists that name them."""
    shots = {"train": spec.shots, "val": _validation_shots(spec)}
    splits = {"train": split_of(source, "train", data)}
    if "val" in source.splits and len(source.splits["val"]) and shots["val"] != 0:
        splits["val"] = source.splits["val"]
    lists: dict[str, SampleList] = {}
    for name, split in splits.items():
        chosen = _chosen(split, shots[name], spec.seed, folder)
        if chosen is not None:
            lists[name], splits[name] = chosen, chosen.apply(split)
    return splits, lists


def _refuse_leaks(
    record: AlignmentRecord, source: DataSource, splits: dict[str, ImageSplit]
) -> None:
    """Nothing, if alignment saw training images of the run alone.

    Raises:
        DataError: it saw a validation image, or an image beyond the run's own sample.
    """
    if "val" in splits:
        record.check_disjoint(source["val"].digests)
    classes = [c.id for c in source.classes]
    record.check_within(splits["train"].digests, dataset=source.dataset, classes=classes)


def used_knowledge(recipes: Sequence[TuneRecipe], path: Path | None) -> Path | None:
    """The cache, or None where none of the recipes reads one, which is said.

    Raises:
        MissingKnowledgeError: there is no such file.
    """
    if path is None or any(recipe.reads() for recipe in recipes):
        return path
    if not path.is_file():
        what = "there is no such file"
        raise MissingKnowledgeError(what, where=path, do="Check --knowledge.")
    for name in dict.fromkeys(recipe.method["name"] for recipe in recipes):
        say(f"method {name} reads no knowledge; {path} is not used")
    return None


def knowledge_of(
    recipe: TuneRecipe, source: DataSource, path: Path | None, shelf: Shelf, backbone: Backbone
) -> LoadedKnowledge | None:
    """What the recipe's method reads of a cache about the classes of `source`; None if nothing.

    Raises:
        MissingKnowledgeError: no cache, or it lacks something.
    """
    needs = recipe.reads()
    if not needs:
        return None
    if path is None:
        what = f"method {recipe.method['name']!r} needs a knowledge cache"
        raise MissingKnowledgeError(what, do="Pass --knowledge FILE.")
    return load_knowledge(
        shelf.cache(path, recipe.knowledge.expect),
        recipe.knowledge,
        dataset=source.dataset,
        classes=source.classes,
        seed=derive_seed(recipe.seed, "control"),
        needs=needs,
        backbone=backbone,
    )


def problem_of(
    recipe: TuneRecipe,
    source: DataSource,
    backbone: Backbone,
    loaded: LoadedKnowledge | None,
    train_labels: torch.Tensor | None,
) -> Problem:
    """What a method of this recipe may read about the classes of `source`."""
    execution = Execution(recipe.train.precision, compiled=recipe.train.compile)
    return Problem(
        backbone=executing(backbone, execution),
        class_names=tuple(c.name for c in source.classes),
        template=source.template,
        templates=source.templates,
        rows=loaded.rows if loaded else None,
        texts=loaded.texts.texts if loaded else None,
        symptoms=loaded.texts.symptoms if loaded else None,
        attributes=loaded.texts.attributes if loaded else None,
        train_labels=train_labels,
        seed=recipe.seed,
    )


def built(recipe: TuneRecipe, problem: Problem) -> Method:
    """The recipe's method with its initial values, in eval mode."""
    torch.manual_seed(derive_seed(recipe.seed, "init"))
    return recipe.method_class()(recipe.method_config(where="recipe"), problem).eval()


def prepare(
    recipe: TuneRecipe,
    *,
    data: str,
    knowledge: Path | None,
    samples: Path | None,
    device: str = "cpu",
    shelf: Shelf | None = None,
    backbone: BackboneSpec | None = None,
) -> Setup:
    """Loads everything a run needs and writes nothing.

    Args:
        recipe: of the run.
        data: the images.
        knowledge: the cache, for methods that need one.
        samples: a folder whose sample lists win over the recipe's seed; None draws them anew.
        device: of the run.
        shelf: what is on it is not loaded again.
        backbone: where the recipe's backbone is now, if elsewhere.

    Raises:
        DataError: the backbone was aligned on images that the run may not train on.
        VademecumError: whatever the data, the backbone, the cache or the recipe lack.
    """
    shelf = shelf or Shelf()
    where = pick_device(device)
    source = shelf.data(data, recipe.classes)
    splits, lists = _sampled(recipe.samples, source, data, samples)
    tower = shelf.backbone(backbone or recipe.backbone, where)
    if tower.alignment is not None:
        _refuse_leaks(tower.alignment, source, splits)
    loaded = knowledge_of(recipe, source, knowledge, shelf, tower)
    labels = torch.from_numpy(splits["train"].labels).long()
    problem = problem_of(recipe, source, tower, loaded, labels)
    method = built(recipe, problem).to(where)
    bindings: dict[str, Any] = {
        "dataset": source.dataset,
        "classes": [{"id": c.id, "name": c.name} for c in source.classes],
        "data": {name: split.digest for name, split in splits.items()},
        "samples": {name: chosen.digest for name, chosen in lists.items()},
        "backbone": tower.fingerprint,
    }
    if loaded is not None:
        bindings["cache"] = {
            "content_id": loaded.content_id,
            **({"block": loaded.block, "block_id": loaded.block_id} if loaded.block else {}),
            **({"block_made": loaded.block_made} if loaded.block else {}),
            **({"texts": loaded.texts.blocks} if loaded.texts.blocks else {}),
            "unused_classes": list(loaded.unused),
        }
    train, val = splits["train"], splits.get("val")
    return Setup(recipe, source, tower, loaded, method, train, val, lists, bindings, where, shelf)
