"""What the imports of foreign files have in common: from places in a file to a sealed cache."""

import hashlib
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.blocks import MOST_LAYERS, BlockSpec, ClassRecord, Entry
from cache.durable import storage_errors
from cache.errors import CacheFormatError, RecipeError, ValueRefusedError
from cache.extraction import ExtractionHeader
from cache.folder import ShardFolder
from cache.recipe import read_yaml
from cache.sealing import seal

# how torch and HDF5 call what is read, and how it is stored
DTYPES = {"Half": "f2", "Float": "f4", "BFloat16": "f4", "Double": "f4"}
RAW = {"Half": "<f2", "Float": "<f4", "BFloat16": "<u2", "Double": "<f8"}
LARGEST_ARRAY = 1 << 30
BATCH_BYTES = 64 << 20
READ_STEP = 1 << 20


def slug(name: str) -> str:
    """`name` in lower-case ASCII with dashes, as data sets make ids of it; may be empty."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9.]+", "-", ascii_name).strip("-.")


def read_class_table(path: Path) -> dict[str, str]:
    """Class ids and names from a YAML file, a table of `id: name`.

    Raises:
        RecipeError: unreadable, or something else.
    """
    found = read_yaml(path)
    sound = isinstance(found, dict) and found
    if not sound or any(type(text) is not str for pair in found.items() for text in pair):
        what = "a table of classes has lines of the form `id: name`"
        raise RecipeError(what, where=path)
    return dict(found)


@contextmanager
def foreign_file(path: Path) -> Iterator[int]:
    """A foreign file, open for reading; FIFOs and devices are not waited for.

    Raises:
        CacheFormatError: not a regular file.
        StorageError: the operating system refused to open it.
    """
    with storage_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            what = "not a regular file"
            raise CacheFormatError(what, where=path)
        yield fd
    finally:
        os.close(fd)


def file_digest(fd: int) -> str:
    """SHA-256 of an open file."""
    digest, at = hashlib.sha256(), 0
    while piece := os.pread(fd, READ_STEP, at):
        digest.update(piece)
        at += len(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class Place:
    """Where the numbers of one array lie in a file; `strides` in elements.

    Made from what a limited child said, so it is checked here again.

    Raises:
        CacheFormatError: not within the file, or not what an array is.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    nbytes: int

    @classmethod
    def checked(cls, said: Any, size: int, path: Path) -> "Place":
        """The place a child named in a file of `size` bytes."""
        names = {"dtype", "shape", "strides", "first", "nbytes"}
        sound = type(said) is dict and set(said) == names and said["dtype"] in DTYPES
        if sound:
            lists = [said["shape"], said["strides"], [said["first"], said["nbytes"]]]
            sound = all(
                type(x) is list and all(type(n) is int and n >= 0 for n in x) for x in lists
            )
        if sound:
            shape, strides = tuple(said["shape"]), tuple(said["strides"])
            place = cls(said["dtype"], shape, strides, said["first"], said["nbytes"])
            itemsize = np.dtype(RAW[place.dtype]).itemsize
            if place.nbytes > LARGEST_ARRAY:
                what = "an array too large for the knowledge of one class"
                found, wanted = f"{place.nbytes} bytes", f"at most {LARGEST_ARRAY}"
                raise CacheFormatError(what, where=path, found=found, wanted=wanted)
            fits = 0 < math.prod(place.shape) * itemsize <= place.nbytes <= size - place.first
            if fits and len(place.shape) == len(place.strides) <= 8:
                return place
        what = "reading it gave no sound answer"
        raise CacheFormatError(what, where=path)

    def read(self, fd: int, path: Path) -> np.ndarray:
        """The numbers, as float16 or float32.

        Raises:
            CacheFormatError: the file ends before them.
            ValueRefusedError: float64 that float32 cannot hold exactly.
        """
        raw, at = bytearray(self.nbytes), 0
        with storage_errors(path):
            while at < self.nbytes and (
                done := os.preadv(fd, [memoryview(raw)[at:]], self.first + at)
            ):
                at += done
        if at < self.nbytes:
            what = "the file changed while it was read"
            raise CacheFormatError(what, where=path)
        dtype = np.dtype(RAW[self.dtype])
        steps = [stride * dtype.itemsize for stride in self.strides]
        try:
            found = np.ndarray(self.shape, dtype, raw, 0, steps)
        except (TypeError, ValueError) as error:
            what = "reading it gave no sound answer"
            raise CacheFormatError(what, where=path) from error
        return _as_stored(np.ascontiguousarray(found), self.dtype, path)


def _as_stored(found: np.ndarray, dtype: str, path: Path) -> np.ndarray:
    """float16 and float32 as they are, bfloat16 and float64 exactly as float32."""
    if dtype == "BFloat16":
        return (found.astype("<u4") << 16).view("<f4")
    if dtype != "Double":
        return found
    with np.errstate(over="ignore"):
        single = found.astype("<f4")
    if ((single != found) & np.isfinite(found)).any():
        what = "float64 values that float32 cannot hold exactly"
        raise ValueRefusedError(what, where=path, do="Save them as float32.")
    return single


@dataclass(frozen=True)
class Piece:
    """One class to import: its record, what its entry came from, and how to read it."""

    record: ClassRecord
    source: str
    place: Place
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class ImportReport:
    """What an import made.

    Args:
        content_id: of the sealed cache.
        dataset: id of the data set.
        block: its one block.
        kind: of the block.
        classes: name by id.
        layers: of every entry; empty for embeddings.
        width: of every row.
        dtype: as stored; `found` is the type in the files.
        found: `Half`, `Float`, `BFloat16` or `Double`.
        licence: of the model, `unknown` unless given.
        ignored: names of files that were not looked at.
    """

    content_id: str
    dataset: str
    block: str
    kind: str
    classes: Mapping[str, str]
    layers: tuple[int, ...]
    width: int
    dtype: str
    found: str
    licence: str
    ignored: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "layers": list(self.layers), "ignored": list(self.ignored)}

    def describe(self) -> str:
        """The report as lines for a terminal."""
        layers = f"{len(self.layers)} layers of " if self.layers else ""
        lines = [
            f"imported {len(self.classes)} classes of {self.dataset} into block {self.block}",
            f"{layers}width {self.width}, {self.dtype}"
            + (f" (from {self.found})" if DTYPES[self.found] != RAW[self.found][1:] else ""),
            f"licence of the model: {self.licence}",
            f"content id {self.content_id}",
        ]
        if self.ignored:
            lines.append("not looked at: " + ", ".join(map(ascii, self.ignored)))
        return "\n".join(lines)


@dataclass(frozen=True)
class Labels:
    """What the user says about an import; nothing of it can be seen in the files.

    Args:
        dataset: id of the data set.
        block: name of the block to make.
        kind: `states` or `embeddings`.
        modality: of all classes.
        licence: of the model, if known.
        model: a short token that names it, if known.
        first_layer: number of the decoder layer in the first row; 0 is the embedding.
    """

    dataset: str
    block: str
    kind: str = "states"
    modality: str = ""
    licence: str | None = None
    model: str | None = None
    first_layer: int = 1

    def spec(self, places: Sequence[tuple[str, Place]], origin: str) -> BlockSpec:
        """The specification that fits all arrays.

        Raises:
            CacheFormatError: two arrays of another shape or type; both are named.
        """
        name, first = places[0]
        for other, place in places:
            same = place.shape[-2:] == first.shape[-2:] or self.kind == "embeddings"
            if place.dtype != first.dtype or place.shape[-1] != first.shape[-1] or not same:
                found = f"{place.dtype} {list(place.shape)}"
                wanted = f"{first.dtype} {list(first.shape)} as for {name!r}"
                what = "another shape or type than the other classes"
                raise CacheFormatError(what, where=f"class {other!r}", found=found, wanted=wanted)
        depth = first.shape[-2] if self.kind == "states" else 0
        if depth > MOST_LAYERS:
            what = "more layers than any model has"
            raise CacheFormatError(what, where=f"class {name!r}", found=depth, wanted=MOST_LAYERS)
        layers = tuple(range(self.first_layer, self.first_layer + depth))
        spec = {"from": origin, "model": self.model or "unknown", "source": "imported"}
        return BlockSpec(self.kind, spec, DTYPES[first.dtype], layers, first.shape[-1])


def _batches(pieces: Sequence[Piece], block: str, *, layered: bool) -> Iterator[list[Entry]]:
    waiting: list[Entry] = []
    size = 0
    for piece in pieces:
        values = piece.read()
        rows = values[None] if values.ndim == 2 and layered else values
        waiting.append(Entry(block, piece.record.id, 0, {"values": rows}, piece.source))
        size += rows.nbytes
        if size >= BATCH_BYTES:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def seal_import(
    pieces: Sequence[Piece], out: Path, labels: Labels, recipe: Mapping[str, Any], *, replace: bool
) -> ImportReport:
    """Commits every piece as item 0 of its class and seals; a refused import leaves nothing.

    Raises:
        CacheError: a class that stands twice, values that are not finite, or `out` is another
            cache and `replace` is off.
        StorageError: no space, no permission.
    """
    named = [(piece.record.name, piece.place) for piece in pieces]
    spec = labels.spec(named, str(recipe["imported"]["from"]))
    licence = labels.licence or "unknown"
    told = {"model": labels.model or "unknown", "model_licence": licence, "tool": "vademecum"}
    header = ExtractionHeader(
        labels.dataset, tuple(p.record for p in pieces), {labels.block: spec}, recipe, told
    )
    folder = ShardFolder(out.with_name(out.name + ".parts"), header=header)
    try:
        for batch in _batches(pieces, labels.block, layered=bool(spec.layers)):
            folder.commit(batch, batch_shape=(len(batch),))
        content_id = seal(folder, out, replace=replace)
    except BaseException:
        folder.clear()  # cheap to do again, and in the way of another try with other files
        raise
    return ImportReport(
        content_id,
        labels.dataset,
        labels.block,
        spec.kind,
        {record.id: record.name for record in header.classes},
        spec.layers,
        int(spec.width or 0),
        str(spec.dtype),
        pieces[0].place.dtype,
        licence,
    )
