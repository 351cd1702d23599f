"""CoOp-style split files: for train, val and test a list of [path, label, class name]."""

import json
from pathlib import Path
from typing import Any

from cache.errors import DataError
from prompt_tune.data.declaration import DataDeclaration
from prompt_tune.data.layout import Found, Layout, Part, file_part, image_root, read_text

SHAPE = '{"train": [[path, label, class name], ...], ...}'


def _part(name: str, entries: Any, classes: dict[int, str], path: Path, root: Path) -> Part:
    if not isinstance(entries, list):
        what = f"{name!r} is not a list"
        raise DataError(what, where=path, found=type(entries).__name__, wanted=SHAPE)
    names, labels = [], []
    for number, entry in enumerate(entries):
        match entry:
            case [str(image), int(label), str(class_name)] if not isinstance(label, bool):
                pass
            case _:
                what = f"{name}[{number}] is not [path, label, class name]"
                raise DataError(what, where=path, found=json.dumps(entry)[:80])
        if classes.setdefault(label, class_name) != class_name:
            what = f"{name}[{number}] calls label {label} {class_name!r}"
            raise DataError(what, where=path, wanted=repr(classes[label]))
        names.append(image)
        labels.append(class_name)
    return file_part(root, names, labels)


def read(place: str, declaration: DataDeclaration) -> Found:
    """The images a split file lists, with paths relative to it or to the declared `images`.

    A class is known by its name; the integer labels give the order where no classes are declared,
    and where they are, another order is noted.

    Raises:
        DataError: missing file, another shape, a label with two names, a missing image.
    """
    path = Path(place)
    try:
        listing = json.loads(read_text(path))
    except ValueError as error:
        what = f"not valid JSON ({error})"
        raise DataError(what, where=path, wanted=SHAPE) from error
    if not isinstance(listing, dict):
        what = "not a split file"
        raise DataError(what, where=path, found=type(listing).__name__, wanted=SHAPE)
    classes: dict[int, str] = {}
    root = image_root(path, declaration)
    parts = {name: _part(name, rows, classes, path, root) for name, rows in listing.items()}
    return Found(parts, tuple((classes[k], classes[k]) for k in sorted(classes)), ordered=True)


LAYOUT = Layout(matches=lambda path: path.suffix.lower() == ".json", read=read, lists=True)
