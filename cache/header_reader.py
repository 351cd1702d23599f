"""Reading the header of a sealed file, by allow-list.

Nothing in a header is believed before it was checked, and nothing that is not listed is accepted.
FORMAT.md gives the same rules in words.
"""

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from cache.blocks import BlockSpec
from cache.errors import CacheFormatError, ValueRefusedError
from cache.header import (
    ALIGNMENT,
    FORMAT,
    HEX,
    LARGEST_HEADER,
    MAGIC,
    MOST_BLOCKS,
    MOST_COMMAS,
    PREFIX,
    SMALLEST_USERBLOCK,
    Extent,
    Header,
    Shapes,
    block_id,
    check_block_name,
    plain_digest,
    plain_json,
    wanted_datasets,
)
from cache.plain import LARGEST_INT, check_header_data, is_token


class _RefusedError(Exception):
    """A fault in a header; `str()` says which."""


def _need(condition: object, what: str) -> None:
    if not condition:
        raise _RefusedError(what)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    _need(len(table) == len(pairs), "a key stands twice in the header")
    return table


def _no_number(text: str) -> Any:
    _need(False, f"the header holds the number {text[:30]}, only integers are allowed")  # noqa: FBT003


def _integer(text: str) -> int:
    _need(len(text) <= 17, "the header holds an integer too large")
    return int(text)


def _parse_json(raw: bytes) -> dict[str, Any]:
    _need(raw.count(b",") <= MOST_COMMAS, f"the header has more than {MOST_COMMAS} commas")
    try:
        data = json.loads(
            raw.decode("ascii"),
            object_pairs_hook=_unique,
            parse_float=_no_number,
            parse_constant=_no_number,
            parse_int=_integer,
        )
        _need(plain_json(data) == raw, "the header is not in canonical form")
    except (ValueError, RecursionError) as error:
        what = "the header is not JSON in ASCII"
        raise _RefusedError(what) from error
    _need(type(data) is dict, "the header is not a table")
    table: dict[str, Any] = data
    return table


def _keys(table: Any, wanted: set[str], what: str) -> None:
    _need(type(table) is dict, f"{what} is not a table")
    for other in sorted(set(table) ^ wanted)[:1]:
        found = "is missing" if other in wanted else "is unknown"
        _need(condition=False, what=f"{what} has other keys: {ascii(other)[:80]} {found}")


def _is_count(value: Any, largest: int = LARGEST_INT) -> bool:
    return type(value) is int and 0 <= value <= largest


def _is_hex(value: Any) -> bool:
    return type(value) is str and HEX.fullmatch(value) is not None


_CONTENT_KEYS = {
    "knowledge": {"blocks", "dataset", "datasets", "format", "kind", "recipe"},
    "extraction": {"blocks", "dataset", "datasets", "format", "kind", "recipe"},
    "shard": {"batch", "blocks", "datasets", "extraction", "format", "kind", "sequence"},
}


def _check_content(content: Any) -> str:
    _need(type(content) is dict, "content is not a table")
    found = content.get("format")
    _need(type(found) is int and found > 0, "content.format is not a version")
    if found > FORMAT:
        what = f"made by a newer version (format {found})"
        raise CacheFormatError(what, wanted=f"format {FORMAT}", do="Update this program.")
    kind = content.get("kind")
    _need(type(kind) is str and kind in _CONTENT_KEYS, "content.kind is unknown")
    _keys(content, _CONTENT_KEYS[kind], "content")
    if kind == "shard":
        batch = content["batch"]
        _need(type(batch) is list and len(batch) <= 8, "content.batch is not a shape")
        _need(all(_is_count(n) for n in batch), "content.batch is not a shape")
        _need(_is_count(content["sequence"], 1 << 40), "content.sequence is not a count")
        _need(_is_hex(content["extraction"]), "content.extraction is not a digest")
    else:
        dataset = content["dataset"]
        _need(type(dataset) is str and is_token(dataset), "content.dataset is not an id")
        _need(type(content["recipe"]) is dict, "content.recipe is not a table")
        check_header_data(content["recipe"], "content.recipe")
    return str(kind)


def _check_blocks(content: Mapping[str, Any], kind: str) -> dict[str, BlockSpec]:
    blocks, specs = content["blocks"], {}
    _need(type(blocks) is dict and blocks, "content.blocks is not a table of blocks")
    _need(len(blocks) <= MOST_BLOCKS, f"the header has more than {MOST_BLOCKS} blocks")
    fields = {"dtype", "kind", "layers", "spec", "width"} | (
        {"id"} if kind == "knowledge" else set()
    )
    for name, block in blocks.items():
        check_block_name(name)
        _keys(block, fields, f"content.blocks.{name}")
        layers = block["layers"]
        _need(type(layers) is list, f"content.blocks.{name}.layers is not a list")
        specs[name] = BlockSpec(
            kind=block["kind"],
            spec=block["spec"],
            dtype=block["dtype"],
            layers=tuple(layers),
            width=block["width"],
        )
    return specs


def _check_shapes(datasets: Any, wanted: Shapes) -> None:
    _keys(datasets, set(wanted), "content.datasets")
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in wanted.items():
        _keys(datasets[name], {"dtype", "sha256", "shape"}, f"dataset {name}")
        found = datasets[name]["shape"]
        _need(datasets[name]["dtype"] == dtype, f"dataset {name} is not of type {dtype}")
        _need(_is_hex(datasets[name]["sha256"]), f"dataset {name} has no digest")
        _need(type(found) is list and len(found) == len(shape), f"dataset {name}: another rank")
        for have, want in zip(found, shape, strict=True):
            _need(_is_count(have, 1 << 47), f"dataset {name}: a length that is none")
            if isinstance(want, int):
                expected = want
            else:
                symbol, plus, _ = want.partition("+")
                expected = sizes.setdefault(symbol, have - bool(plus)) + bool(plus)
            _need(
                have == expected and have >= 0, f"dataset {name} has another shape than its peers"
            )
    _need(all(size >= 0 for size in sizes.values()), "a dataset of offsets is empty")


def _check_layout(body: Mapping[str, Any], size: int, end: int) -> dict[str, Extent]:
    datasets, layout, start = body["content"]["datasets"], body["layout"], body["userblock"]
    fits = _is_count(start, 2 * LARGEST_HEADER) and start >= max(SMALLEST_USERBLOCK, end)
    _need(fits and start & (start - 1) == 0, "the user block has an impossible size")
    found = body["size"]
    _need(_is_count(found), "the size in the header is no size")
    if found != size:
        do = "The copy may be incomplete; fetch the file again."
        what = "another size than when sealed"
        raise CacheFormatError(what, found=size, wanted=found, do=do)
    _need(_is_hex(body["rest"]), "rest is not a digest")
    _keys(layout, set(datasets), "layout")
    extents, spans = {}, []
    for name, dataset in datasets.items():
        offset = layout[name]
        _need(_is_count(offset), f"dataset {name} has no offset")
        extent = Extent(name, dataset["dtype"], tuple(dataset["shape"]), dataset["sha256"], offset)
        extents[name] = extent
        if extent.nbytes == 0:
            _need(offset == 0, f"dataset {name} is empty and has an offset")
            continue
        _need(offset % ALIGNMENT == 0, f"dataset {name} is not aligned to {ALIGNMENT} bytes")
        _need(
            start < offset and offset + extent.nbytes <= size, f"dataset {name} is outside the file"
        )
        spans.append((offset, offset + extent.nbytes, name))
    spans.sort()
    for (_, before, _), (after, _, name) in pairwise(spans):
        _need(before <= after, f"dataset {name} overlaps another")
    return extents


def prefix_length(prefix: bytes) -> int:
    """Length of the JSON, from the first 48 bytes of a file.

    Raises:
        CacheFormatError: not the start of a sealed file.
    """
    if prefix[:6] != MAGIC[:6]:
        what, do = "not a knowledge cache", "Only files made by `vademecum extract` are read."
        raise CacheFormatError(what, do=do)
    if prefix[:8] != MAGIC or len(prefix) < PREFIX:
        what = "a knowledge cache of an unknown version, or a damaged one"
        raise CacheFormatError(what, do="Update this program or fetch the file again.")
    length = int.from_bytes(prefix[8:16], "little")
    if not 2 <= length <= LARGEST_HEADER:
        what = "the length of the header is impossible"
        raise CacheFormatError(what, found=length, wanted=f"2 to {LARGEST_HEADER}")
    return length


def parse_header(raw: bytes, size: int) -> Header:
    """The header of a file of `size` bytes; `raw` is its start, header included.

    Raises:
        CacheFormatError: anything that FORMAT.md does not allow; the message says what.
    """
    length = prefix_length(raw[:PREFIX])
    text = raw[PREFIX : PREFIX + length]
    if hashlib.sha256(text).digest() != raw[16:PREFIX]:
        do = "Fetch the file again."
        what = "the header is damaged: its digest differs"
        raise CacheFormatError(what, do=do)
    try:
        body = _parse_json(text)
        _keys(body, {"content", "layout", "rest", "size", "userblock"}, "the header")
        content = body["content"]
        kind = _check_content(content)
        specs = _check_blocks(content, kind)
        _check_shapes(content["datasets"], wanted_datasets(kind, specs))
        extents = _check_layout(body, size, PREFIX + length)
        for name, block in content["blocks"].items() if kind == "knowledge" else ():
            own = block_id(content, name)
            _need(block["id"] == own, f"block {name} carries the id of another")
    except (_RefusedError, ValueRefusedError) as error:
        what = f"refused: {error}"
        raise CacheFormatError(what) from error
    return Header(
        content=content,
        extents=extents,
        specs=specs,
        rest=body["rest"],
        size=size,
        userblock=body["userblock"],
        content_id=plain_digest(content),
        kind=kind,
    )
