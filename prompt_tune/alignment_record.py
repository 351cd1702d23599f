"""What an alignment saw: the record that lies beside its weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from cache.errors import DataError, ModelError, RecipeError
from cache.recipe import RecipePart, digest_of, validate
from prompt_tune.data.few_shot import SampleList

RECORD = "alignment.json"


class AlignedClass(RecipePart):
    """A class whose images and name alignment saw."""

    id: str
    name: str


class AlignmentRecord(RecipePart):
    """Everything that defined an alignment, and how well it fits what it saw.

    Attributes:
        dataset: id of the data set.
        samples: the training images, by position, label and pixel digest.
        ids: the ids of those images.
        classes: the classes, in label order.
        recipe: the resolved recipe, without paths.
        towers: SHA-256 of the files both towers came from.
        weights: digest of every tensor of the aligned model.
        train_accuracy: on the images it saw, so no measure of anything else.
        versions: of the libraries.
    """

    format: Literal["vademecum alignment 1"] = "vademecum alignment 1"
    dataset: str
    samples: SampleList
    ids: tuple[str, ...]
    classes: tuple[AlignedClass, ...]
    recipe: dict[str, Any]
    towers: dict[str, str]
    weights: str
    train_accuracy: float
    versions: dict[str, str]

    @model_validator(mode="after")
    def _belong_together(self) -> "AlignmentRecord":
        listed = tuple(c.id for c in self.classes)
        known = all(label < len(listed) for label in self.samples.labels)
        if len(self.ids) != len(self.samples) or self.samples.classes != listed or not known:
            what = "images, ids and classes do not belong together"
            raise ValueError(what)
        return self

    @property
    def digest(self) -> str:
        """What enters the fingerprint of the aligned backbone."""
        classes = [[c.id, c.name] for c in self.classes]
        return digest_of([self.dataset, self.samples.digest, classes, self.recipe])

    @property
    def request(self) -> str:
        """What was asked for: the same request makes the same folder."""
        return request_digest(self.dataset, self.samples, self.recipe, self.towers)

    def describe(self) -> str:
        """One sentence for tables and run records."""
        return (
            f"text projection trained on {len(self.samples)} {self.samples.split} images of "
            f"{len(self.classes)} classes of {self.dataset}: not zero-shot on those classes"
        )

    def check_disjoint(self, digests: Sequence[str], class_ids: Sequence[str] = ()) -> None:
        """Nothing, if alignment saw none of these images and none of these classes.

        Args:
            digests: pixel digests of held-out images.
            class_ids: held-out classes. A run does not know that a class is held out: its recipe's
                `classes` are those it has, not those it will never have. Who does base-to-novel
                names the novel ones here, or aligns with the base classes alone.

        Raises:
            DataError: it saw one; the first is named.
        """
        do = "Align again without what is held out."
        for class_id in class_ids:
            if class_id in {c.id for c in self.classes}:
                what = f"alignment saw the held-out class {class_id!r}"
                raise DataError(what, where=RECORD, do=do)
        seen = dict(zip(self.samples.digests, self.ids, strict=True))
        for digest in digests:
            if digest in seen:
                what = f"alignment saw a held-out image, as {seen[digest]}"
                raise DataError(what, where=RECORD, found=f"pixels {digest[:16]}…", do=do)

    def check_within(self, digests: Sequence[str], *, dataset: str, classes: Sequence[str]) -> None:
        """Nothing, if alignment saw no image of these classes but these.

        Otherwise a run on K images per class would not be a K-shot run. Classes that the run does
        not have are left aside: a backbone aligned on base classes serves a run on novel ones,
        which is what base-to-novel measures; see `check_disjoint`. So is another data set.

        Args:
            digests: pixel digests of the images the run trains on.
            dataset: id of the run's data set.
            classes: ids of the run's classes.

        Raises:
            DataError: it saw another; the first is named.
        """
        if dataset != self.dataset:
            return
        allowed, listed = (
            set(digests),
            zip(self.samples.digests, self.samples.labels, self.ids, strict=True),
        )
        for digest, label, id_ in listed:
            if self.samples.classes[label] in classes and digest not in allowed:
                what = "alignment saw an image that this run does not train on"
                do = "Align with the shots, seed and classes of the run, or with fewer shots."
                raise DataError(what, where=RECORD, found=id_, do=do)

    def check_weights(self, digest: str) -> None:
        """Nothing, if the weights are those that alignment left.

        Raises:
            ModelError: they are others.
        """
        if digest != self.weights:
            what = "the weights are not those the alignment left"
            found, wanted = f"{digest[:16]}…", f"{self.weights[:16]}…"
            raise ModelError(what, where=RECORD, found=found, wanted=wanted, do="Align again.")


def request_digest(
    dataset: str, samples: SampleList, recipe: dict[str, Any], towers: dict[str, str]
) -> str:
    """SHA-256 of everything that decides what an alignment gives."""
    return digest_of([dataset, samples.digest, recipe, towers])


def alignment_record(folder: Path) -> AlignmentRecord:
    """The record of a folder made by `vademecum align`.

    Raises:
        ModelError: no such folder, or no sound record in it.
    """
    path = folder / RECORD
    try:
        return validate(AlignmentRecord, json.loads(path.read_text(encoding="utf-8")), where=path)
    except FileNotFoundError as error:
        what = "not a folder made by `vademecum align`"
        raise ModelError(what, where=folder, found=f"no {RECORD}") from error
    except (OSError, ValueError, RecipeError) as error:
        what = "the alignment record is damaged"
        raise ModelError(what, where=path, do="Align again.") from error
