"""A CSV table of images: columns path, label and, where known, split and patient."""

import csv
import io
from collections import defaultdict
from pathlib import Path

from cache.errors import DataError
from cache.registry import suggest
from prompt_tune.data.declaration import DataDeclaration
from prompt_tune.data.layout import Found, Layout, file_part, image_root, read_text

Row = tuple[str, str, str | None]


def _column(wanted: str | None, usual: str, header: list[str], path: Path) -> str | None:
    name = wanted or usual
    if name in header:
        return name
    if wanted is None and usual in ("split", "patient"):
        return None
    do = suggest(name, header) if header else None
    what = f"the table has no column {name!r}"
    raise DataError(what, where=path, do=do)


def read(place: str, declaration: DataDeclaration) -> Found:
    """The images a table lists, with paths relative to the table or to the declared `images`.

    Labels that are whole numbers, and neither id, name nor label of a declared class, are positions
    in the declared class list.

    Raises:
        DataError: missing file or column, an empty cell, a missing image.
    """
    path = Path(place)
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        header = list(reader.fieldnames or [])
        lines = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        what = f"not a CSV table ({error})"
        raise DataError(what, where=path) from error
    columns = declaration.columns
    image = _column(columns.image, "path", header, path)
    label = _column(columns.label, "label", header, path)
    split = _column(columns.split, "split", header, path)
    patient = _column(columns.patient, "patient", header, path)

    rows: dict[str, list[Row]] = defaultdict(list)
    for number, row in lines:
        for column in filter(None, (image, label, split)):
            if not (row[column] or "").strip():
                what = f"line {number} has no {column!r}"
                raise DataError(what, where=path, do="Fill the cell or delete the line.")
        who = (row[patient] or "").strip() or None if patient else None
        name = row[split].strip() if split else ""
        rows[name].append((row[image or ""].strip(), row[label or ""].strip(), who))
    if not rows:
        what = "the table lists no images"
        raise DataError(what, where=path)
    parts, root = {}, image_root(path, declaration)
    for name, listed in rows.items():
        names, labels, patients = zip(*listed, strict=True)
        parts[name] = file_part(root, names, labels, patients)
    known = sorted({text for part in parts.values() for text in part.labels})
    told = {str(name) for c in declaration.classes for name in (c.id, c.name, c.label)}
    if declaration.classes and all(map(str.isdecimal, known)) and not told & set(known):
        return Found(parts, numbered=True)
    return Found(parts, tuple((text, text) for text in known))


LAYOUT = Layout(matches=lambda path: path.suffix.lower() == ".csv", read=read, lists=True)
