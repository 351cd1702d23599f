"""Compares data with what a declaration expects of them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from cache.errors import DataError
from prompt_tune.data.declaration import DataDeclaration
from prompt_tune.data.images import ImageSplit


def unexpected_counts(
    declaration: DataDeclaration, counts: Mapping[str, Sequence[int]]
) -> list[str]:
    """A line for every split whose images are not as many as expected.

    Args:
        declaration: whose `expected.images` count.
        counts: of each split, the images of each class in label order.
    """
    lines = []
    for name, wanted in declaration.expected.images.items():
        here = counts.get(name, ())
        if isinstance(wanted, int):
            if sum(here) != wanted:
                lines.append(f"{name} has {sum(here)} images, expected {wanted}")
        elif tuple(here) != wanted:
            ids = [c.id for c in declaration.classes]
            full = here or [0] * len(ids)
            differ = [
                f"{one} {n} not {w}" for one, n, w in zip(ids, full, wanted, strict=True) if n != w
            ]
            lines.append(f"{name} has other counts than expected: {', '.join(differ)}")
    return lines


def unexpected_file(declaration: DataDeclaration, place: str) -> tuple[str | None, str | None]:
    """(the digest of the file at `place` if one is known for its name, what is wrong with it)."""
    path = Path(place)
    wanted = declaration.expected.files.get(path.name)
    if wanted is None or not path.is_file():
        return None, None
    kind = wanted.partition(":")[0]
    with path.open("rb") as file:
        found = f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"
    return found, None if found == wanted else f"{path.name} is {found}, expected {wanted}"


def refuse_unexpected(
    declaration: DataDeclaration, splits: Mapping[str, ImageSplit], place: str
) -> None:
    """Nothing, if counts and file digest are as expected, as far as they are known.

    Raises:
        DataError: they are not; the first difference is named.
    """
    counts = {name: split.counts() for name, split in splits.items()}
    lines = unexpected_counts(declaration, counts)
    if (wrong := unexpected_file(declaration, place)[1]) is not None:
        lines.append(wrong)
    if lines:
        do = "Fetch the data again, or declare `expected: {strict: false}`."
        raise DataError(lines[0], where=place, do=do)
