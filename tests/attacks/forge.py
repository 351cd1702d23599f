"""What a careful attacker does: a hostile HDF5 part under a header whose digests are all right."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import numpy as np

from cache.durable import drafting
from cache.header import ITEMSIZE, PREFIX
from cache.packing import Source, pack
from cache.sealed import SealedFile

Body = dict[str, Any]


def length(dataset: Body) -> int:
    """Bytes of a dataset of the header."""
    return ITEMSIZE[dataset["dtype"]] * math.prod(dataset["shape"])


def spans(body: Body) -> list[tuple[int, int]]:
    """Where the datasets of a header lie."""
    found = body["content"]["datasets"]
    places = [(body["layout"][name], length(found[name])) for name in found]
    return sorted((start, start + size) for start, size in places if size)


def rest_of(raw: bytes, body: Body) -> str:
    """Digest of every byte after the user block that belongs to no dataset."""
    digest, at = hashlib.sha256(), body["userblock"]
    for first, last in [*spans(body), (len(raw), len(raw))]:
        digest.update(raw[at:first])
        at = last
    return digest.hexdigest()


def digest_all(path: Path) -> None:
    """Makes size, `rest` and the digest of every dataset in the header those of the file."""
    raw = path.read_bytes()

    def edit(body: Body) -> None:
        for name, dataset in body["content"]["datasets"].items():
            start = body["layout"][name]
            found = raw[start : start + length(dataset)]
            dataset["sha256"] = hashlib.sha256(found).hexdigest()
        body["rest"], body["size"] = rest_of(raw, body), len(raw)

    make.reforge(path, edit)


def seal_over(path: Path, sealed: bytes, change: Callable[[Path], None]) -> None:
    """A sealed cache at `path` whose HDF5 part went through `change`, every digest made right."""
    path.write_bytes(sealed)
    body = make.body_of(path)
    change(path)
    raw = bytearray(path.read_bytes())
    for first, last in spans(body):  # a library may have reused their room: put them back
        if len(raw) < last:
            raw.extend(bytes(last - len(raw)))
        raw[first:last] = sealed[first:last]
    raw[: body["userblock"]] = sealed[: body["userblock"]]
    path.write_bytes(raw)
    digest_all(path)


def header_text(path: Path) -> bytes:
    """The JSON of a sealed file."""
    raw = path.read_bytes()
    return raw[PREFIX : PREFIX + int.from_bytes(raw[8:16], "little")]


def repack(path: Path, sealed: Path, change: Callable[[Body, dict[str, np.ndarray]], None]) -> None:
    """A sealed cache written by a hostile writer: structure and digests right, content changed."""
    with SealedFile(sealed) as opened:
        arrays = {name: opened.array(name).copy() for name in opened.header.extents}
    content = {k: v for k, v in make.body_of(sealed)["content"].items() if k != "datasets"}
    for block in content["blocks"].values():
        del block["id"]
    change(content, arrays)
    with drafting(path.parent) as draft:
        pack(draft, content, {name: Source.of(array) for name, array in arrays.items()})
        draft.publish(path, replace=True)
