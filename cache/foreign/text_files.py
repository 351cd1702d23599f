"""Files of texts and attributes by class, as people publish them: JSON, YAML, CSV."""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cache.errors import CacheFormatError, RecipeError, ValueRefusedError
from cache.foreign.importing import foreign_file
from cache.plain import strict_json
from cache.recipe import parse_yaml

LARGEST = {".csv": 64 << 20, ".json": 64 << 20, ".yaml": 8 << 20, ".yml": 8 << 20}
MOST_ROWS = 1_000_000
LONGEST = 20_000  # characters
COLUMNS = {
    "texts": ({"class", "text"}, {"class", "text"}),
    "attributes": ({"class", "attribute", "value"}, {"class", "attribute", "value", "rank"}),
}
Row = Mapping[str, Any]


def read_bytes(path: Path) -> bytes:
    """A file of texts, whole.

    Raises:
        CacheFormatError: of another kind, not a regular file, or too large.
        StorageError: the operating system refused to read it.
    """
    largest = LARGEST.get(path.suffix.lower())
    if largest is None:
        what, wanted = "not a file of texts by its name", "one of " + ", ".join(LARGEST)
        raise CacheFormatError(what, where=path, found=path.suffix or "no ending", wanted=wanted)
    with foreign_file(path) as fd:
        size = os.fstat(fd).st_size
        if size > largest:
            what, wanted = "a file of texts is too large", f"at most {largest} bytes"
            raise CacheFormatError(what, where=path, found=f"{size} bytes", wanted=wanted)
        with os.fdopen(os.dup(fd), "rb") as stream:
            return stream.read(largest + 1)[:largest]


def read_rows(raw: bytes, path: Path, kind: str) -> list[Row]:
    """Class and text, or class, attribute, value and rank, in the order of the file.

    Texts are `{class: [text, ...]}`, attributes `{class: {attribute: [value, ...]}}` with values
    ranked from 0 as they stand; either may be a table of rows with these columns (`rank` may be
    left out), as CSV or as a list of tables.

    Raises:
        CacheFormatError: something else.
        ValueRefusedError: more rows, or longer texts, than anybody writes.
    """
    rows: list[Row] = []
    for row in _rows(_parsed(raw, path), path, kind):
        rows.append(_sound(row, path, len(rows)))
        if len(rows) > MOST_ROWS:
            what = "too many texts"
            raise ValueRefusedError(what, where=path, wanted=f"at most {MOST_ROWS}")
    return rows


def _parsed(raw: bytes, path: Path) -> Any:
    suffix = path.suffix.lower()
    try:
        text = raw.decode("utf-8-sig")
        if suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            return list(reader)
        if suffix == ".json":
            return strict_json(text.encode())
        return parse_yaml(text, where=path)
    except (ValueError, csv.Error, RecursionError, RecipeError) as error:
        what = f"the texts are not valid {suffix[1:].upper()}"
        found = " ".join(str(error).split())[:200]
        raise CacheFormatError(what, where=path, found=found) from error


def _rows(data: Any, path: Path, kind: str) -> Iterator[Row]:
    required, allowed = COLUMNS[kind]
    if isinstance(data, list):
        for number, row in enumerate(data):
            if not isinstance(row, dict) or not required <= set(row) <= allowed:
                found = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
                what, wanted = f"row {number + 1} has other columns", ", ".join(sorted(allowed))
                raise CacheFormatError(what, where=path, found=found, wanted=wanted)
            yield row
    elif isinstance(data, dict):
        yield from _nested(data, path, kind)
    else:
        what, wanted = "not a table of classes", "classes with their texts, or a list of rows"
        raise CacheFormatError(what, where=path, found=type(data).__name__, wanted=wanted)


def _nested(data: Mapping[Any, Any], path: Path, kind: str) -> Iterator[Row]:
    for name, own in data.items():
        if kind == "texts":
            for text in _listed(own, path, name):
                yield {"class": name, "text": text}
            continue
        if not isinstance(own, dict):
            what, wanted = f"class {name!r} has no table of attributes", "{attribute: [value, ...]}"
            raise CacheFormatError(what, where=path, found=type(own).__name__, wanted=wanted)
        for attribute, values in own.items():
            for rank, value in enumerate(_listed(values, path, f"{name}, {attribute}")):
                yield {"class": name, "attribute": attribute, "value": value, "rank": rank}


def _listed(found: Any, path: Path, name: object) -> list[Any]:
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list):
        what, wanted = f"{str(name)!r} has no list of texts", "[text, ...]"
        raise CacheFormatError(what, where=path, found=type(found).__name__, wanted=wanted)
    return found


def _sound(row: Row, path: Path, number: int) -> Row:
    """A row of short texts, with its rank as a number."""
    for column, value in row.items():
        if column == "rank":
            continue
        if not isinstance(value, str):
            what = f"row {number + 1}, {column}: not a text"
            do = "Put it between quotes." if isinstance(value, bool | int | float) else None
            raise CacheFormatError(what, where=path, found=repr(value)[:80], do=do)
        if len(value) > LONGEST:
            what, wanted = f"row {number + 1}, {column}: too long", f"at most {LONGEST} characters"
            found = f"{len(value)} characters"
            raise ValueRefusedError(what, where=path, found=found, wanted=wanted)
    return {**row, "rank": _rank(row["rank"], path, number)} if row.get("rank") else row


def _rank(found: Any, path: Path, number: int) -> int:
    text = str(found).strip()
    if isinstance(found, bool) or not text.isdecimal() or len(text) > 9:
        what, wanted = f"row {number + 1}, rank: not a rank", "a number from 0"
        raise CacheFormatError(what, where=path, found=repr(found)[:80], wanted=wanted)
    return int(text)
