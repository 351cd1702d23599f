"""Typed blocks: what a cache is made of, and what one entry of each kind holds."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from cache.errors import ValueRefusedError
from cache.plain import check_header_data, refuse_places
from cache.recipe import canonical_json

Column = Literal["array", "text", "int"]
Value = np.ndarray | str | int

SLUG = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
BLOCK_NAME = re.compile(r"[a-z](?:_?[a-z0-9])*")
BLOCK_NAME_LENGTH = 40
RESERVED = ("classes", "recipe", "provenance")
DTYPES = {"f2": "<f2", "f4": "<f4"}
WIDEST = 1 << 24
MOST_LAYERS = 4096


@dataclass(frozen=True)
class Kind:
    """The columns every entry of a block of this kind has, in the order they are digested."""

    columns: Mapping[str, Column]
    layered: bool = False

    @property
    def has_array(self) -> bool:
        """True if entries hold an array, so that the block has a dtype and a width."""
        return "array" in self.columns.values()


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "states": Kind({"values": "array"}, layered=True),
        "embeddings": Kind({"values": "array"}),
        "texts": Kind(
            {"text": "text", "prompt": "text", "prompt_tokens": "int", "text_tokens": "int"}
        ),
        "attributes": Kind({"attribute": "text", "value": "text", "rank": "int"}),
    }
)


def _refuse(what: str, where: object, found: object, wanted: object = None) -> ValueRefusedError:
    return ValueRefusedError(what, where=where, found=repr(found)[:80], wanted=wanted)


@dataclass(frozen=True)
class BlockSpec:
    """Everything that defines the values of a block.

    Args:
        kind: one of `KINDS`.
        spec: plain data without floats, texts or paths (model digest, quantisation, pooling ...).
        dtype: `"f2"` or `"f4"` for kinds with arrays, else None.
        layers: which decoder layers, for `states`; else empty.
        width: length of the last axis, for kinds with arrays; else None.

    Raises:
        ValueRefusedError: a field that does not fit the kind, or `spec` holding what it may not.
    """

    kind: str
    spec: Mapping[str, Any]
    dtype: str | None = None
    layers: tuple[int, ...] = ()
    width: int | None = None

    def __post_init__(self) -> None:
        if str(self.kind) not in KINDS:
            what = "unknown block kind"
            raise _refuse(what, "kind", self.kind, "one of " + ", ".join(KINDS))
        kind = KINDS[self.kind]
        if not issubclass(type(self.spec), Mapping):
            what = "the spec of a block is a table"
            raise _refuse(what, "spec", self.spec)
        check_header_data(self.spec, "spec")
        self._check_array_fields(has_array=kind.has_array)
        whole = all(type(n) is int and 0 <= n < MOST_LAYERS for n in self.layers)
        if not whole or len(set(self.layers)) != len(self.layers):
            what = "layers are distinct numbers from 0"
            raise _refuse(what, "layers", self.layers)
        if bool(self.layers) is not kind.layered:
            wanted = "at least one" if kind.layered else "none"
            what = f"layers of a block of {self.kind}"
            raise _refuse(what, "layers", self.layers, wanted)

    def _check_array_fields(self, *, has_array: bool) -> None:
        dtype, width = self.dtype, self.width
        if not (str(dtype) in DTYPES if has_array else dtype is None):
            wanted = "f2 or f4" if has_array else "None"
            what = f"dtype of a block of {self.kind}"
            raise _refuse(what, "dtype", dtype, wanted)
        sound = type(width) is int and 0 < width <= WIDEST
        if not (sound if has_array else width is None):
            wanted = f"1 to {WIDEST}" if has_array else "None"
            what = f"width of a block of {self.kind}"
            raise _refuse(what, "width", width, wanted)

    def plain(self) -> dict[str, Any]:
        """The specification as plain data, as it is digested and stored."""
        plain: dict[str, Any] = json.loads(self.canonical)
        return plain

    @cached_property
    def canonical(self) -> bytes:
        """The specification as canonical JSON."""
        return canonical_json(asdict(self))


@dataclass(frozen=True)
class ClassRecord:
    """One class; its identity is the data set's id and `id`.

    Raises:
        ValueRefusedError: an id that is no slug, or a text that is not text or holds a path.
    """

    id: str
    name: str
    modality: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if SLUG.fullmatch(str(self.id)) is None:
            what = "not a class id"
            raise _refuse(what, "class", self.id, "[a-z0-9][a-z0-9_.-]*")
        for name in ("id", "name", "modality", "source"):
            text, where = getattr(self, name), f"class {self.id}, {name}"
            object.__setattr__(self, name, normal_text(text, where))
            refuse_places(text, where)
        if not self.name:
            what = "a class needs a name"
            raise _refuse(what, f"class {self.id}", self.name)


@dataclass(frozen=True)
class Entry:
    """What one prompt or text gave: the unit that is committed, digested and compared.

    Args:
        block: name of the block it belongs to.
        class_id: the class it is about.
        item: number of the entry within its class and block, from 0.
        values: one value per column of the block's kind.
        source_digest: SHA-256 of the texts that made it.
    """

    block: str
    class_id: str
    item: int
    values: Mapping[str, Value] = field(repr=False)
    source_digest: str


def entry_key(spec: BlockSpec, class_id: str, item: int, source_digest: str) -> str:
    """The name of an entry: SHA-256 of what determines its value.

    Equal keys mean equal prompts, models and settings, in any file of any laboratory.
    """
    rest = canonical_json({"class": class_id, "item": item, "of": source_digest})
    return hashlib.sha256(b'{"block":' + spec.canonical + b"," + rest[1:]).hexdigest()


def normal_text(text: object, where: str) -> str:
    """`text` in Unicode normal form C.

    Raises:
        ValueRefusedError: not a string, or one with half of a surrogate pair.
    """
    if not isinstance(text, str):
        what = "not a text"
        raise _refuse(what, where, text)
    try:
        return unicodedata.normalize("NFC", text).encode("utf-8").decode("utf-8")
    except UnicodeEncodeError as error:
        what = "a text that is not valid Unicode"
        raise _refuse(what, where, text) from error


def all_finite(array: np.ndarray) -> bool:
    """True if an array of floats holds neither NaN nor infinity."""
    if array.dtype == np.float16:  # numpy looks at halves one by one; at their bits 20 times faster
        bits = np.ascontiguousarray(array).reshape(-1).view(np.uint16)
        return int((bits & 0x7FFF).max(initial=0)) < 0x7C00
    return bool(np.isfinite(array).all())


def _array(spec: BlockSpec, value: object, where: str) -> np.ndarray:
    inner = (len(spec.layers), spec.width) if spec.layers else (spec.width,)
    shape, what = getattr(value, "shape", None), "an array of another shape than its block says"
    wanted = f"[rows, {', '.join(map(str, inner))}]"
    if not isinstance(value, np.ndarray) or shape is None or shape[1:] != inner or shape[0] < 1:
        raise _refuse(what, where, shape if shape is not None else value, wanted)
    if value.dtype.kind != "f":
        what = "an array of another type than float"
        raise _refuse(what, where, str(value.dtype))
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(value, dtype=DTYPES[str(spec.dtype)])
    if all_finite(stored):
        return stored
    at = np.argwhere(~np.isfinite(stored))[0]
    place = where + (f", layer {spec.layers[at[1]]}" if spec.layers else "")
    place += f", row {at[0]}, component {at[-1]}"
    number = float(value[tuple(at)])
    if np.isfinite(number):
        what = f"{number:g} is too large for {np.dtype(DTYPES[str(spec.dtype)])}"
        do = "Store this block as float32."
        raise ValueRefusedError(what, where=place, do=do)
    do = "The model gave no number here; try another compute dtype."
    what = "a value is not finite"
    raise ValueRefusedError(what, where=place, found=str(number), do=do)


def checked_values(spec: BlockSpec, entry: Entry) -> dict[str, Value]:
    """The values of an entry as they will be stored.

    Raises:
        ValueRefusedError: a missing or unknown column, another shape or type, a value that is
            not finite or does not fit; block, class, item and layer are named.
    """
    where = f"block {entry.block}, class {entry.class_id}, item {entry.item}"
    columns = KINDS[spec.kind].columns
    if set(entry.values) != set(columns):
        wanted = ", ".join(columns)
        what = "an entry with other columns"
        raise _refuse(what, where, sorted(entry.values), wanted)
    stored: dict[str, Value] = {}
    for name, column in columns.items():
        value = entry.values[name]
        if column == "array":
            stored[name] = _array(spec, value, where)
        elif column == "text":
            stored[name] = normal_text(value, f"{where}, {name}")
        else:
            if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
                what = "not an integer of 64 bits"
                raise _refuse(what, f"{where}, {name}", value)
            stored[name] = value
    return stored


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array, rows first."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def entry_digest(kind: str, values: Mapping[str, Value]) -> bytes:
    """SHA-256 over the values of an entry, column by column.

    An array is its row count and its bytes, a text its length and its bytes, an integer eight
    bytes; counts and integers are little-endian with 64 bits.
    """
    digest = hashlib.sha256()
    for name in KINDS[kind].columns:
        value = values[name]
        if isinstance(value, np.ndarray):
            digest.update(len(value).to_bytes(8, "little"))
            digest.update(raw_bytes(value))
        elif isinstance(value, str):
            raw = value.encode("utf-8")
            digest.update(len(raw).to_bytes(8, "little") + raw)
        else:
            digest.update(value.to_bytes(8, "little", signed=True))
    return digest.digest()
