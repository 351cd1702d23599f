"""Sample lists: which cases a run may see, drawn once, saved, and checked when read back.

Cases are ordered by SHA-256 of (seed, image digest), so a list is the same on every machine, with
every library version and whatever the order of the files; a list of k shots is contained in every
longer one of the same seed.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cache.durable import write_atomic
from cache.errors import DataError, RecipeError
from cache.recipe import RecipePart, digest_of, validate
from prompt_tune.data.divide import hashed
from prompt_tune.data.images import ImageSplit

Index = Annotated[int, Field(ge=0)]


class SampleList(RecipePart):
    """Some cases of a split.

    Attributes:
        kind: `few-shot` (size per class) or `stratified` (size in all).
        size: what was asked for.
        seed: what it was drawn with.
        split: name of the split.
        split_digest: digest of the whole split it was drawn from.
        classes: class ids in label order.
        indices: positions in the split, ascending.
        labels: label of each.
        digests: image digest of each.
    """

    format: Literal["vademecum sample list 1"] = "vademecum sample list 1"
    kind: Literal["few-shot", "stratified"]
    size: int
    seed: int
    split: str
    split_digest: str
    classes: tuple[str, ...]
    indices: tuple[Index, ...]
    labels: tuple[Index, ...]
    digests: tuple[str, ...]

    @model_validator(mode="after")
    def _one_of_each(self) -> "SampleList":
        if not len(set(self.indices)) == len(self.labels) == len(self.digests):
            what = "indices, labels and digests do not belong together"
            raise ValueError(what)
        return self

    def __len__(self) -> int:
        return len(self.indices)

    def counts(self) -> tuple[int, ...]:
        """Cases per class, in label order."""
        return tuple(self.labels.count(k) for k in range(len(self.classes)))

    def apply(self, split: ImageSplit) -> ImageSplit:
        """The listed cases of `split`.

        Raises:
            DataError: `split` is not the one the list was drawn from.
        """
        self.check(split, where="sample list")
        return split.subset(self.indices)

    def check(self, split: ImageSplit, *, where: object) -> None:
        """Compares classes, labels and image digests of the listed cases with `split`.

        Raises:
            DataError: they differ.
        """
        do = "Use the data it was drawn from, or delete the list to draw a new one."
        if self.split != split.name or self.classes != tuple(c.id for c in split.classes):
            what = "the sample list belongs to another split or other classes"
            found, wanted = f"{self.split} of {len(self.classes)} classes", split.name
            raise DataError(what, where=where, found=found, wanted=wanted, do=do)
        if self.indices and max(self.indices) >= len(split):
            what = "the sample list names a case the split does not have"
            raise DataError(what, where=where, found=max(self.indices), do=do)
        digests = split.subset(self.indices).digests
        labels = split.labels[list(self.indices)].tolist()
        here, listed = (
            zip(digests, labels, strict=True),
            zip(self.digests, self.labels, strict=True),
        )
        for index, one, other in zip(self.indices, here, listed, strict=True):
            if one != other:
                what = f"case {split.ids[index]} is not the image or label the sample list names"
                raise DataError(what, where=where, do=do)

    def save(self, path: Path) -> None:
        """Writes the list as JSON, whole or not at all."""
        write_atomic(path, self.model_dump_json(indent=1).encode())

    @property
    def digest(self) -> str:
        """SHA-256 of the list: its classes, labels and image digests."""
        return digest_of([self.split, self.classes, self.labels, self.digests])

    @classmethod
    def load(cls, path: Path, split: ImageSplit | None = None) -> "SampleList":
        """The list at `path`, checked against `split` where one is given.

        Raises:
            DataError: missing, damaged, or drawn from other data.
        """
        stored = _read(path)
        if split is not None:
            stored.check(split, where=path)
        return stored


def _read(path: Path) -> SampleList:
    try:
        return validate(SampleList, json.loads(path.read_text(encoding="utf-8")), where=path)
    except FileNotFoundError as error:
        what = "no such sample list"
        raise DataError(what, where=path) from error
    except (OSError, ValueError, RecipeError) as error:
        what, do = "not a sample list, or damaged", "Delete it to draw a new one."
        raise DataError(what, where=path, do=do) from error


def few_shot(split: ImageSplit, shots: int, seed: int, *, allow_fewer: bool = False) -> SampleList:
    """`shots` cases of every class.

    Args:
        split: where from.
        shots: cases per class.
        seed: another seed, other cases.
        allow_fewer: take all cases of a class that has fewer, instead of refusing.

    Raises:
        DataError: fewer than one shot, or a class with too few images.
    """
    if shots < 1:
        what = "a few-shot sample needs at least one image per class"
        raise DataError(what, found=shots)
    if not allow_fewer:
        for one, count in zip(split.classes, split.counts(), strict=True):
            if count < shots:
                what = f"the class {one.id!r} has too few images for {shots} shots"
                do = "Use fewer shots."
                raise DataError(what, where=split.name, found=count, wanted=shots, do=do)
    taken = [index for queue in _queues(split, seed) for index in queue[:shots]]
    return _listed(split, "few-shot", shots, seed, taken)


def stratified_part(split: ImageSplit, n: int, seed: int) -> SampleList:
    """`n` cases with the classes in the proportions of the split (largest remainder).

    A class that is present keeps at least one case while `n` allows it.

    Raises:
        DataError: `n` is not between 1 and the size of the split.
    """
    if not 1 <= n <= len(split):
        what = "a part of a split has at least one image and at most all"
        raise DataError(what, where=split.name, found=n, wanted=f"1 to {len(split)}")
    shares = _shares(split.counts(), n)
    queues = _queues(split, seed)
    taken = [index for queue, share in zip(queues, shares, strict=True) for index in queue[:share]]
    return _listed(split, "stratified", n, seed, taken)


def stored_or_drawn(
    path: Path, split: ImageSplit, draw: Callable[[ImageSplit], SampleList]
) -> SampleList:
    """The list stored at `path`, whatever its seed, or else a new one, drawn and stored.

    Raises:
        DataError: the stored list is damaged or was drawn from other data.
    """
    if path.exists():
        return SampleList.load(path, split)
    drawn = draw(split)
    drawn.save(path)
    return drawn


def _shares(counts: Sequence[int], n: int) -> list[int]:
    """`n` divided in proportion to `counts`, in whole numbers.

    Exact integer arithmetic; a tie goes to the smaller label.
    """
    total = sum(counts)
    present = [k for k, count in enumerate(counts) if count]
    floor = 1 if n >= len(present) else 0
    shares = [max(floor, n * count // total) if count else 0 for count in counts]
    while sum(shares) != n:
        short = sum(shares) < n
        sign = 1 if short else -1
        movable = [k for k in present if (shares[k] < counts[k] if short else shares[k] > floor)]
        nearest = max(movable, key=lambda k: (sign * (n * counts[k] - shares[k] * total), -k))
        shares[nearest] += sign
    return shares


def _queues(split: ImageSplit, seed: int) -> list[list[int]]:
    """The cases of each class in drawing order; equal images in the order of the split."""
    digests = split.digests
    queues: list[list[int]] = [[] for _ in split.classes]
    for index in sorted(range(len(split)), key=lambda i: (hashed(seed, digests[i]), i)):
        queues[split.labels[index]].append(index)
    return queues


def _listed(
    split: ImageSplit,
    kind: Literal["few-shot", "stratified"],
    size: int,
    seed: int,
    taken: Sequence[int],
) -> SampleList:
    indices = sorted(taken)
    return SampleList(
        kind=kind,
        size=size,
        seed=seed,
        split=split.name,
        split_digest=split.digest,
        classes=tuple(c.id for c in split.classes),
        indices=tuple(indices),
        labels=tuple(split.labels[indices].tolist()),
        digests=tuple(split.digests[i] for i in indices),
    )
