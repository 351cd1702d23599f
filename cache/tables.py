"""Entries as columns: how a block's entries become datasets, and back."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from cache.blocks import KINDS, BlockSpec, ClassRecord, Value, entry_digest
from cache.errors import CacheFormatError, ValueRefusedError
from cache.header import CLASS_COLUMNS
from cache.packing import Buffer, Source
from cache.sealed import SealedFile


def digests_array(digests: Sequence[bytes]) -> np.ndarray:
    """Digests as rows of 32 bytes."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def ints_array(numbers: Iterable[int]) -> np.ndarray:
    """Integers of 64 bits, little-endian."""
    return np.array(list(numbers), "<i8").reshape(-1)


def offsets_of(lengths: Iterable[int]) -> np.ndarray:
    """Where each piece starts when pieces of these lengths follow each other, and the end."""
    return np.concatenate([ints_array([0]), np.cumsum(ints_array(lengths))]).astype("<i8")


def text_sources(name: str, texts: Sequence[str]) -> dict[str, Source]:
    """A column of texts: its bytes in UTF-8 and their offsets."""
    raw = [text.encode("utf-8") for text in texts]
    return {
        name: Source.of(np.frombuffer(b"".join(raw), np.uint8)),
        f"{name}_offsets": Source.of(offsets_of(map(len, raw))),
    }


def bytes_source(raw: bytes) -> Source:
    """A dataset of plain bytes."""
    return Source.of(np.frombuffer(raw, np.uint8))


def class_sources(classes: Sequence[ClassRecord]) -> dict[str, Source]:
    """The class table."""
    sources: dict[str, Source] = {}
    for column in CLASS_COLUMNS:
        texts = [getattr(record, column) for record in classes]
        sources |= text_sources(f"classes__{column}", texts)
    return sources


def read_offsets(sealed: SealedFile, name: str, end: int) -> np.ndarray:
    """A dataset of offsets, after checking that it runs from 0 to `end` without going back.

    Raises:
        CacheFormatError: it does not.
    """
    offsets = sealed.array(name)
    if offsets[0] != 0 or offsets[-1] != end or (offsets[:-1] > offsets[1:]).any():
        what = f"dataset {name} does not run from 0 to {end}"
        raise CacheFormatError(what, where=sealed.path)
    return offsets


class TextColumn:
    """A column of texts in a sealed file."""

    def __init__(self, sealed: SealedFile, name: str) -> None:
        self._sealed, self._name = sealed, name
        end = sealed.header.extents[name].shape[0]
        self._offsets = read_offsets(sealed, f"{name}_offsets", end)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        first, last = int(self._offsets[row]), int(self._offsets[row + 1])
        raw = self._sealed.rows(self._name, first, last).tobytes()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"text {row} of dataset {self._name} is not UTF-8"
            raise CacheFormatError(what, where=self._sealed.path) from error


def read_classes(sealed: SealedFile) -> tuple[ClassRecord, ...]:
    """The class table, sorted by id.

    Raises:
        CacheFormatError: an id that is none or stands twice, or a text no writer would store.
    """
    columns = [TextColumn(sealed, f"classes__{column}") for column in CLASS_COLUMNS]
    rows = [tuple(column[row] for column in columns) for row in range(len(columns[0]))]
    for row in rows:
        if not all(unicodedata.is_normalized("NFC", text) for text in row):
            # asked before anything normalises it: that is quadratic for a hostile text
            name = ascii(row[0][:100]).strip("'")
            what = f"class {name}: a text is not in Unicode normal form C"
            raise CacheFormatError(what, where=sealed.path)
    try:
        classes = tuple(ClassRecord(*row) for row in rows)
    except ValueRefusedError as error:
        what = f"refused: {error}"
        raise CacheFormatError(what, where=sealed.path) from error
    ids = [record.id for record in classes]
    if ids != sorted(set(ids)):
        what = "the class table is not sorted by id"
        raise CacheFormatError(what, where=sealed.path)
    return classes


class BlockTable:
    """The columns of one block in a sealed file. Rows are sorted by class and item."""

    def __init__(self, sealed: SealedFile, name: str, classes: int) -> None:
        self._sealed, self._name, self._classes = sealed, name, classes
        self.spec: BlockSpec = sealed.header.specs[name]

    def __len__(self) -> int:
        return self._sealed.header.extents[f"{self._name}__keys"].shape[0]

    def column(self, name: str) -> np.ndarray:
        """One dataset of the block."""
        return self._sealed.array(f"{self._name}__{name}")

    @cached_property
    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """Class and item of every row, after checking that they are sorted and in range."""
        kind, item = self.column("class"), self.column("item")
        good = not len(kind) or (kind[0] >= 0 and kind[-1] < self._classes and item.min() >= 0)
        step = np.diff(kind)
        if not good or ((step < 0) | ((step == 0) & (np.diff(item) <= 0))).any():
            what = f"block {self._name}: entries are not sorted by class and item"
            raise CacheFormatError(what, where=self._sealed.path)
        return kind, item

    @cached_property
    def _first(self) -> list[int]:
        """The first row of each class, and the end."""
        first: list[int] = np.searchsorted(self.index[0], np.arange(self._classes + 1)).tolist()
        return first

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where the rows of each entry start in `values`."""
        end = self._sealed.header.extents[f"{self._name}__values"].shape[0]
        return read_offsets(self._sealed, f"{self._name}__offsets", end)

    @cached_property
    def _texts(self) -> Mapping[str, TextColumn]:
        columns = KINDS[self.spec.kind].columns
        names = [name for name, column in columns.items() if column == "text"]
        return {name: TextColumn(self._sealed, f"{self._name}__{name}") for name in names}

    def find(self, class_index: int, item: int) -> int | None:
        """The row of an entry."""
        items, (first, last) = self.index[1], self._first[class_index : class_index + 2]
        row = first + item  # right unless an item before it is missing
        if not (first <= row < last and items[row] == item):
            row = first + int(np.searchsorted(items[first:last], item))
        return row if row < last and items[row] == item else None

    def values(self, row: int) -> dict[str, Value]:
        """The values of one entry; arrays are read-only views."""
        found: dict[str, Value] = {}
        for name, column in KINDS[self.spec.kind].columns.items():
            if column == "array":
                first, last = int(self.offsets[row]), int(self.offsets[row + 1])
                found[name] = self._sealed.rows(f"{self._name}__{name}", first, last)
            elif column == "text":
                found[name] = self._texts[name][row]
            else:
                found[name] = int(self.column(name)[row])
        if self._sealed.by_entry:
            self._check_entry(row, found)
        return found

    def _check_entry(self, row: int, values: Mapping[str, Value]) -> None:
        if entry_digest(self.spec.kind, values) != self.column("digests")[row].tobytes():
            what = f"entry {row} of block {self._name} is damaged: its digest differs"
            raise CacheFormatError(what, where=self._sealed.path, do="Fetch the file again.")


def block_sources(
    name: str,
    spec: BlockSpec,
    rows: Sequence[tuple[int, int, bytes, bytes, bytes]],
    columns: Mapping[str, Sequence[Value]],
    streams: Mapping[str, tuple[Sequence[int], Iterable[Buffer]]],
) -> dict[str, Source]:
    """The datasets of one block.

    Args:
        name: of the block.
        spec: of the block.
        rows: class, item, key, digest and source digest of each entry, in file order.
        columns: texts and integers, by column.
        streams: arrays, by column: the row count of each entry, and all their bytes in order.
    """
    sources = {
        f"{name}__class": Source.of(ints_array(row[0] for row in rows)),
        f"{name}__item": Source.of(ints_array(row[1] for row in rows)),
        f"{name}__keys": Source.of(digests_array([row[2] for row in rows])),
        f"{name}__digests": Source.of(digests_array([row[3] for row in rows])),
        f"{name}__sources": Source.of(digests_array([row[4] for row in rows])),
    }
    inner = (len(spec.layers),) if spec.layers else ()
    for column, kind in KINDS[spec.kind].columns.items():
        full = f"{name}__{column}"
        if kind == "text":
            sources |= text_sources(full, [str(text) for text in columns[column]])
        elif kind == "int":
            sources[full] = Source.of(np.array(columns[column], "<i8").reshape(-1))
        else:
            counts, chunks = streams[column]
            shape = (sum(counts), *inner, int(spec.width or 0))
            sources[full] = Source(str(spec.dtype), shape, lambda chunks=chunks: chunks)  # type: ignore[misc]
            sources[f"{name}__offsets"] = Source.of(offsets_of(counts))
    return sources
