"""The header of a sealed file: canonical JSON in the HDF5 user block.

What it holds and how it is written. `cache.header_reader` reads it back.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache.blocks import BLOCK_NAME, BLOCK_NAME_LENGTH, KINDS, RESERVED, BlockSpec
from cache.errors import CacheMismatchError, ValueRefusedError

MAGIC = b"VADEMC\0\x01"
PREFIX = 48  # magic, length, digest
LARGEST_HEADER = 1 << 20
MOST_COMMAS = 1 << 15  # in the header's JSON: bounds the work of reading it, before it is read
MOST_BLOCKS = 64
SMALLEST_USERBLOCK = 4096
FORMAT = 1
ALIGNMENT = 64
ITEMSIZE = {"u1": 1, "i8": 8, "f2": 2, "f4": 4}
CLASS_COLUMNS = ("id", "name", "modality", "source")
HEX = re.compile(r"[0-9a-f]{64}")

_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode
Shapes = dict[str, tuple[str, tuple[int | str, ...]]]


@dataclass(frozen=True)
class Extent:
    """One dataset: what it holds and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A header that passed every check that needs no other byte of the file."""

    content: Mapping[str, Any]
    extents: Mapping[str, Extent]
    specs: Mapping[str, BlockSpec]
    rest: str
    size: int
    userblock: int
    content_id: str
    kind: str


def plain_json(value: Any) -> bytes:
    """`cache.recipe.canonical_json` for data that came from JSON, several times faster."""
    return _ENCODE(value).encode("ascii")


def plain_digest(value: Any) -> str:
    """SHA-256 of `plain_json`, hexadecimal."""
    return hashlib.sha256(plain_json(value)).hexdigest()


def class_datasets() -> Shapes:
    """Datasets of the class table; `C` classes, `B:...` bytes of text."""
    shapes: Shapes = {}
    for column in CLASS_COLUMNS:
        shapes[f"classes__{column}"] = ("u1", (f"B:classes:{column}",))
        shapes[f"classes__{column}_offsets"] = ("i8", ("C+1",))
    return shapes


def block_datasets(name: str, spec: BlockSpec) -> Shapes:
    """Datasets of one block; `N` entries, `T` rows, `B:...` bytes of text, per block."""
    n = f"N:{name}"
    shapes: Shapes = {f"{name}__{c}": ("u1", (n, 32)) for c in ("keys", "digests", "sources")}
    shapes |= {f"{name}__{c}": ("i8", (n,)) for c in ("class", "item")}
    for column, kind in KINDS[spec.kind].columns.items():
        if kind == "int":
            shapes[f"{name}__{column}"] = ("i8", (n,))
        elif kind == "text":
            shapes[f"{name}__{column}"] = ("u1", (f"B:{name}:{column}",))
            shapes[f"{name}__{column}_offsets"] = ("i8", (n + "+1",))
        else:
            inner = (len(spec.layers),) if spec.layers else ()
            width = int(spec.width or 0)
            shapes[f"{name}__{column}"] = (str(spec.dtype), (f"T:{name}", *inner, width))
            shapes[f"{name}__offsets"] = ("i8", (n + "+1",))
    return shapes


def wanted_datasets(kind: str, specs: Mapping[str, BlockSpec]) -> Shapes:
    """Exactly the datasets a file of this kind with these blocks has."""
    shapes: Shapes = {}
    if kind != "shard":
        shapes |= class_datasets()
        shapes |= {name: ("u1", (f"B:{name}",)) for name in ("recipe", "provenance")}
    if kind != "extraction":
        for name, spec in specs.items():
            shapes |= block_datasets(name, spec)
    return shapes


def check_block_name(name: object) -> None:
    """Nothing, if a block may be called `name`.

    Raises:
        ValueRefusedError: it may not.
    """
    fits = isinstance(name, str) and len(name) <= BLOCK_NAME_LENGTH and name not in RESERVED
    if not fits or BLOCK_NAME.fullmatch(str(name)) is None:
        wanted = f"words of a-z and 0-9 joined by _, at most {BLOCK_NAME_LENGTH} characters"
        what = "not a name for a block"
        raise ValueRefusedError(what, where="blocks", found=repr(name)[:80], wanted=wanted)


def block_id(content: Mapping[str, Any], name: str) -> str:
    """SHA-256 of a block's specification and data; no other block of the file is part of it."""
    block = {k: v for k, v in content["blocks"][name].items() if k != "id"}
    datasets, prefix = content["datasets"], f"{name}__"
    own = {k.removeprefix(prefix): v for k, v in datasets.items() if k.startswith(prefix)}
    ids = [datasets[f"classes__id{tail}"]["sha256"] for tail in ("", "_offsets")]
    data = {"block": block, "class_ids": ids, "dataset": content["dataset"], "datasets": own}
    return plain_digest(data)


def encode_header(
    content: Mapping[str, Any], layout: Mapping[str, int], rest: str, size: int, userblock: int
) -> bytes | None:
    """The whole user block, or None if the header does not fit into it.

    Raises:
        ValueRefusedError: a header of more than 1 MiB.
    """
    body = {"content": content, "layout": layout, "rest": rest, "size": size}
    raw = plain_json({**body, "userblock": userblock})
    if len(raw) > LARGEST_HEADER:
        found, wanted = f"{len(raw)} bytes", f"at most {LARGEST_HEADER}"
        what = "the header of the cache is too large"
        raise ValueRefusedError(what, found=found, wanted=wanted, do="Use fewer blocks.")
    if PREFIX + len(raw) > userblock:
        return None
    prefix = MAGIC + len(raw).to_bytes(8, "little") + hashlib.sha256(raw).digest()
    return (prefix + raw).ljust(userblock, b"\0")


def check_expected(content_id: str, expect: str | None, where: object) -> None:
    """Nothing, if `content_id` is (or starts with, from 12 digits) the one expected.

    Raises:
        CacheMismatchError: it is not.
    """
    if expect is None:
        return
    wanted = expect.lower().removeprefix("sha256:")
    if len(wanted) < 12 or not content_id.startswith(wanted):
        what, do = "another content id than expected", "Use the cache the id was made for."
        raise CacheMismatchError(what, where=where, found=content_id, wanted=expect, do=do)
