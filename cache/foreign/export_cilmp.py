"""A sealed cache as `<class name>.pth` files that the published CILMP code loads.

The zip members and the few opcodes of the pickle are written as bytes, the same ones torch writes.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.blocks import raw_bytes
from cache.durable import refuse_source_folder, storage_errors, write_atomic
from cache.errors import CacheMismatchError, MissingKnowledgeError, StorageError, ValueRefusedError
from cache.store import Block, KnowledgeCache

STORAGES = {"f2": b"HalfStorage", "f4": b"FloatStorage"}
ALIGNMENT = 64  # of the numbers in the file, as torch does it
PUBLISHED_WIDTH = 4096
LARGEST_COUNT = 2**31 - 1
_ROOT = "archive"


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Args:
        files: SHA-256 by file name.
        shape: of every tensor.
        dtype: `f2` or `f4`.
        content_id: of the cache they came from.
    """

    files: Mapping[str, str]
    shape: tuple[int, int]
    dtype: str
    content_id: str

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "shape": list(self.shape)}

    def describe(self) -> str:
        """The report as lines for a terminal."""
        layers, width = self.shape
        lines = [f"wrote {len(self.files)} files, {layers} layers of width {width}, {self.dtype}"]
        if width != PUBLISHED_WIDTH:
            lines.append(f"the published code needs width {PUBLISHED_WIDTH}: change it there")
        return "\n".join(lines)


def _number(value: int) -> bytes:
    """A count as the shortest opcode for it."""
    if value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    return b"J" + value.to_bytes(4, "little")


def _text(text: bytes) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text


def pickle_of(shape: tuple[int, int], dtype: str) -> bytes:
    """The pickle of a bare tensor, byte for byte as `torch.save` writes it."""
    layers, width = shape
    storage = [
        b"((" + _text(b"storage") + b"q\x01",
        b"ctorch\n" + STORAGES[dtype] + b"\nq\x02",
        _text(b"0") + b"q\x03" + _text(b"cpu") + b"q\x04",
        _number(layers * width) + b"tq\x05Q",
    ]
    return b"".join(
        [
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00",
            *storage,
            b"K\x00" + _number(layers) + _number(width) + b"\x86q\x06",
            _number(width) + b"K\x01\x86q\x07",
            b"\x89ccollections\nOrderedDict\nq\x08)Rq\ttq\nRq\x0b.",
        ]
    )


def pth_bytes(array: np.ndarray) -> bytes:
    """A file that `torch.load` reads as this array, `[layers, width]` of float16 or float32.

    Raises:
        ValueRefusedError: more values than the format counts.
    """
    if array.size > LARGEST_COUNT:
        what = "too many values for a tensor in this format"
        raise ValueRefusedError(what, found=array.size, wanted=f"at most {LARGEST_COUNT}")
    dtype = array.dtype.str.lstrip("<")
    layers, width = array.shape
    members = {
        "data.pkl": pickle_of((layers, width), dtype),
        "byteorder": b"little",
        "data/0": bytes(raw_bytes(array)),
        "version": b"3\n",
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, raw in members.items():
            info = zipfile.ZipInfo(f"{_ROOT}/{name}", (1980, 1, 1, 0, 0, 0))
            info.create_system = 0
            info.external_attr = 0
            before = file.tell() + 30 + len(info.filename) + 4
            fill = -before % ALIGNMENT
            info.extra = b"FB" + fill.to_bytes(2, "little") + b"Z" * fill
            archive.writestr(info, raw)
    return file.getvalue()


def _file_names(found: KnowledgeCache) -> dict[str, str]:
    """File name by class id."""
    names: dict[str, str] = {}
    for record in found.classes:
        name = record.name + ".pth"
        whole = record.name.isprintable() and not set(record.name) & set('/\\:*?"<>|')
        if not whole or name.startswith((".", " ", "-")) or len(name.encode("utf-8")) > 255:
            what = "the name of this class cannot be the name of a file"
            where = f"{found.path}, class {record.id}"
            raise ValueRefusedError(what, where=where, found=ascii(record.name[:80]))
        twin = next((i for i, n in names.items() if n.casefold() == name.casefold()), None)
        if twin is not None:
            what = f"the classes {twin!r} and {record.id!r} have one name"
            raise ValueRefusedError(what, where=found.path, found=ascii(record.name[:80]))
        names[record.id] = name
    return names


def _tensor(block: Block, class_id: str, item: int, dtype: str) -> np.ndarray:
    states = block.array(class_id, item)
    where = f"block {block.name}, class {class_id}, item {item}"
    if states.shape[0] != 1:
        what = f"an entry with {states.shape[0]} rows is no table of layers and width"
        raise MissingKnowledgeError(what, where=where, do="Name a block of pooled states.")
    with np.errstate(over="ignore"):
        values: np.ndarray = states[0].astype("<" + dtype)
    if not np.isfinite(values).all():
        what = f"a value is too large for {np.dtype(dtype)}"
        raise ValueRefusedError(what, where=where, do="Export it as f4.")
    return values


def export_cilmp(
    file: Path,
    folder: Path,
    *,
    block: str = "layers",
    item: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes one `<class name>.pth` per class; importing them again gives the same values.

    The same cache gives the same bytes. All entries are checked before anything is written.

    Args:
        file: a sealed cache.
        folder: made if missing; `llm_representations/<dataset>` of the published code.
        block: of states with one row per entry.
        item: which entry of each class.
        dtype: `f2` or `f4`; None keeps what is stored.
        overwrite: replace files of these names.

    Raises:
        CacheFormatError: the cache is damaged.
        MissingKnowledgeError: no such block or item, or more than one row per entry.
        ValueRefusedError: a class name that is no file name, or a value too large for `dtype`.
        CacheMismatchError: a file of that name exists and `overwrite` is off.
    """
    refuse_source_folder(folder)
    with KnowledgeCache.open(file) as found:
        chosen = found.blocks[block]
        if chosen.kind != "states":
            what = f"a block of {chosen.kind} holds no layers"
            raise MissingKnowledgeError(what, where=f"{file}, block {block}")
        wanted = dtype or str(chosen.dtype)
        if wanted not in STORAGES:
            what = "unknown type of numbers"
            raise ValueRefusedError(what, where="dtype", found=repr(wanted), wanted="f2 or f4")
        names = _file_names(found)
        for class_id in names:
            _tensor(chosen, class_id, item, wanted)
        _check_free(folder, names, overwrite=overwrite)
        written = {}
        for class_id, name in names.items():
            raw = pth_bytes(_tensor(chosen, class_id, item, wanted))
            if not write_atomic(folder / name, raw, replace=overwrite):
                what = "this file appeared meanwhile"
                raise StorageError(what, where=folder / name)
            written[name] = hashlib.sha256(raw).hexdigest()
        shape = (len(chosen.layers), int(chosen.width or 0))
        return ExportReport(written, shape, wanted, found.content_id)


def _check_free(folder: Path, names: Mapping[str, str], *, overwrite: bool) -> None:
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        there = [name for name in names.values() if os.path.lexists(folder / name)]
    if there and not overwrite:
        what, do = "this file exists", "Choose another folder, or pass --overwrite."
        raise CacheMismatchError(what, where=folder / there[0], do=do)
