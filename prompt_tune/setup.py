"""Puts a run together: data, sample lists, backbone, knowledge and method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache.errors import DataError, MissingKnowledgeError
from cache.recipe import digest_of
from prompt_tune.backbone import Backbone
from prompt_tune.cases import Cases
from prompt_tune.data.few_shot import SampleList, few_shot
from prompt_tune.data.source import DataSource, ImageSplit
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

    def cases(self, split: ImageSplit, *, training: bool = False) -> Cases:
        """A split as this run's method reads it."""
        return Cases(
            split,
            self.backbone,
            pixels=self.method.reads_images,
            views=self.recipe.train.views if training else 1,
            seed=self.recipe.seed,
            device=self.device,
            open_store=self.shelf.features,
        )


def pick_device(device: str) -> str:
    """`auto` is CUDA where there is one, else CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def split_of(source: DataSource, name: str, data: str) -> ImageSplit:
    """A split that has images.

    Raises:
        DataError: there is no such split, or it is empty.
    """
    split = source.splits.get(name)
    if split is None or len(split) == 0:
        what = f"the {name} split is {'missing' if split is None else 'empty'}"
        raise DataError(what, where=data, found=f"splits {sorted(source.splits)}")
    return split


def _chosen(split: ImageSplit, shots: int | None, seed: int, file: Path) -> SampleList | None:
    if file.is_file():
        stored = SampleList.load(file, split)
        if stored.size != shots:
            what = "the saved sample list was drawn with another number of shots"
            do = "Use another run folder."
            raise DataError(what, where=file, found=stored.size, wanted=shots, do=do)
        return stored
    if shots is None:
        return None
    chosen = few_shot(split, shots, seed, allow_fewer=split.name != "train")
    file.parent.mkdir(parents=True, exist_ok=True)
    chosen.save(file)
    return chosen


def _validation_shots(spec: SampleSpec) -> int | None:
    if spec.val_shots is not None:
        return spec.val_shots
    return None if spec.shots is None else min(spec.shots, VAL_SHOTS)


def prepare(
    recipe: TuneRecipe,
    *,
    data: str,
    knowledge: Path | None,
    samples: Path,
    device: str = "cpu",
    shelf: Shelf | None = None,
) -> Setup:
    """Loads everything a run needs; sample lists found in `samples` win over the seed.

    What is on `shelf` already is not loaded again.

    Raises:
        VademecumError: whatever the data, the backbone, the cache or the recipe lack.
    """
    shelf = shelf or Shelf()
    source = shelf.data(data)
    train = split_of(source, "train", data)
    lists: dict[str, SampleList] = {}
    chosen = _chosen(train, recipe.samples.shots, recipe.samples.seed, samples / "train.json")
    if chosen is not None:
        lists["train"] = chosen
        train = chosen.apply(train)
    val = source.splits.get("val")
    val_shots = _validation_shots(recipe.samples)
    if val is None or len(val) == 0 or val_shots == 0:
        val = None
    else:
        chosen = _chosen(val, val_shots, recipe.samples.seed, samples / "val.json")
        if chosen is not None:
            lists["val"] = chosen
            val = chosen.apply(val)

    where = pick_device(device)
    backbone = shelf.backbone(recipe.backbone, where)
    method_class = recipe.method_class()
    loaded = None
    if method_class.needs_knowledge:
        if knowledge is None:
            what = f"method {recipe.method['name']!r} needs a knowledge cache"
            raise MissingKnowledgeError(what, do="Pass --knowledge FILE.")
        loaded = load_knowledge(
            shelf.cache(knowledge, recipe.knowledge.expect),
            recipe.knowledge,
            dataset=source.dataset,
            classes=source.classes,
            seed=derive_seed(recipe.seed, "control"),
        )
    problem = Problem(
        backbone=backbone,
        class_names=tuple(c.name for c in source.classes),
        template=source.template,
        templates=source.templates,
        rows=loaded.rows if loaded else None,
        seed=recipe.seed,
    )
    torch.manual_seed(derive_seed(recipe.seed, "init"))
    method = method_class(recipe.method_config(where="recipe"), problem).to(where).eval()
    bindings: dict[str, Any] = {
        "dataset": source.dataset,
        "classes": [{"id": c.id, "name": c.name} for c in source.classes],
        "data": {"train": train.digest} | ({"val": val.digest} if val is not None else {}),
        "samples": {name: chosen.digest for name, chosen in lists.items()},
        "backbone": backbone.fingerprint,
    }
    if loaded is not None:
        bindings["cache"] = {
            "content_id": loaded.content_id,
            "block": loaded.block,
            "block_id": loaded.block_id,
            "unused_classes": list(loaded.unused),
        }
    return Setup(
        recipe, source, backbone, loaded, method, train, val, lists, bindings, where, shelf
    )


def binding_digest(recipe: TuneRecipe, bindings: dict[str, Any]) -> str:
    """What a saved state must have been made with: the recipe and everything it was bound to.

    The cache counts by the block that was used, not by the whole file.
    """
    cache_part = {k: v for k, v in bindings.get("cache", {}).items() if k in {"block", "block_id"}}
    return digest_of({"recipe": recipe.model_dump(), "bindings": bindings | {"cache": cache_part}})
