"""From the files' splits to train, val and test, with every way they can be wrong refused."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from cache.errors import DataError
from cache.registry import suggest
from prompt_tune.data.declaration import ALIASES, UNSPLIT, DataDeclaration, Divide
from prompt_tune.data.divide import divide
from prompt_tune.data.images import DataClass, ImageSplit
from prompt_tune.data.layout import Found, Part

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Piece:
    """Some rows of a part."""

    part: Part
    at: list[int]

    def pick(self, values: Sequence[Any]) -> list[Any]:
        """The values of these rows."""
        return [values[i] for i in self.at]


def pieces_of(
    found: Found, declaration: DataDeclaration, place: str
) -> tuple[dict[str, Piece], tuple[str, ...]]:
    """Our splits, from the files' or made here, and what was made here."""
    whole = found.parts.get("") if len(found.parts) == 1 else None
    pieces: dict[str, Piece] = {}
    if whole is not None:
        pieces["train"] = Piece(whole, list(range(len(whole.labels))))
        plan = declaration.divide or UNSPLIT
    else:
        for ours in SPLITS:
            names = declaration.splits.get(ours)  # type: ignore[call-overload]
            wanted = ALIASES[ours] if names is None else (names,)
            theirs = next((n for n in wanted if n in found.parts), None)
            if theirs is not None:
                part = found.parts[theirs]
                pieces[ours] = Piece(part, list(range(len(part.labels))))
        plan = declaration.divide or Divide()
    made = {
        name: f for name in ("val", "test") if (f := getattr(plan, name)) and name not in pieces
    }
    for ours in SPLITS:
        if ours not in pieces and ours not in made:
            what = f"the data have no {ours!r} split"
            do = f"Add it, name it under `splits`, or let `divide: {{{ours}: 0.1}}` make it."
            if ours == "train":
                do = "Add it, or name it under `splits`."
            listed = ", ".join(found.parts) or "none"
            raise DataError(what, where=place, found=listed, do=do)
    if not made:
        return pieces, ()
    pool = pieces["train"]
    drawn = divide(
        pool.pick(pool.part.keys),
        pool.pick(pool.part.labels),
        pool.pick(pool.part.patients),
        made,
        seed=plan.seed,
        where=place,
    )
    pieces |= {name: Piece(pool.part, at) for name, at in drawn.items()}
    shares = ", ".join(f"{name} {share:g}" for name, share in made.items())
    return pieces, (f"divided here with seed {plan.seed}: {shares}",)


def split_of(
    name: str, piece: Piece, classes: tuple[DataClass, ...], numbers: dict[str, int], place: str
) -> ImageSplit:
    """One of our splits, its labels joined to the classes.

    Raises:
        DataError: a label that is no class.
    """
    labels = piece.pick(piece.part.labels)
    for label, file in zip(labels, piece.pick(piece.part.files), strict=True):
        if label not in numbers:
            what = f"the label {label!r} is none of the declared classes"
            raise DataError(what, where=f"{place} [{name}]", found=file, do=suggest(label, numbers))
    return ImageSplit(
        name=name,
        classes=classes,
        labels=np.array([numbers[label] for label in labels], dtype=np.int64),
        ids=tuple(f"{name}/{k}" for k in range(len(labels))),
        patients=tuple(piece.pick(piece.part.patients)),
        files=tuple(piece.pick(piece.part.files)),
        rows=piece.part.rows,
        at=np.array(piece.at, dtype=np.int64),
    )


def refuse_gaps(splits: dict[str, ImageSplit], classes: tuple[DataClass, ...], place: str) -> None:
    """Nothing, unless a split is empty or a class has no training image.

    Raises:
        DataError: one of both.
    """
    for name, split in splits.items():
        if not len(split):
            what = f"the split {name!r} is empty"
            raise DataError(what, where=place)
    for one, count in zip(classes, splits["train"].counts(), strict=True):
        if not count:
            what = f"the class {one.id!r} has no image in train"
            raise DataError(what, where=place, do="Add images, or leave the class out.")


def refuse_overlap(pieces: dict[str, Piece], place: str) -> None:
    """One file twice, or one file or patient in two splits, would make the numbers dishonest."""
    allow = "Mend the splits, or declare `overlap: allow`."
    for name, piece in pieces.items():
        twice = _first_repeated(piece.pick(piece.part.files))
        if twice is not None:
            what = f"an image stands twice in {name}"
            raise DataError(what, where=place, found=twice, do=allow)
    for (one, a), (two, b) in combinations(pieces.items(), 2):
        for kind, left, right in (
            ("the patient", a.pick(a.part.patients), b.pick(b.part.patients)),
            ("the image", a.pick(a.part.files), b.pick(b.part.files)),
        ):
            shared = sorted({str(x) for x in left if x} & {str(x) for x in right if x})
            if shared:
                what = f"{kind} {shared[0]!r} stands in both {one} and {two}"
                found = f"{len(shared)} shared"
                raise DataError(what, where=place, found=found, do=allow)


def _first_repeated(values: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
