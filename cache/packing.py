"""Packing: datasets become one sealed file, with the same bytes wherever it is done."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cache.blocks import raw_bytes
from cache.durable import Draft
from cache.errors import CacheFormatError
from cache.header import ITEMSIZE, SMALLEST_USERBLOCK, block_id, encode_header
from cache.header_reader import parse_header
from cache.sealed import build_skeleton, gaps

if TYPE_CHECKING:
    from cache.skeleton import Skeleton

Buffer = bytes | bytearray | memoryview
WRITE_STEP = 1 << 22


@dataclass(frozen=True)
class Source:
    """One dataset to be packed; `chunks` gives its bytes in order when called."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Buffer]]

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        """An array that is in memory."""
        solid = np.ascontiguousarray(array)
        dtype = solid.dtype.str.lstrip("<|")
        return cls(dtype, solid.shape, lambda: [raw_bytes(solid)])

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


def packed_size(sources: Mapping[str, Source]) -> int:
    """About how many bytes a file of these datasets takes, from above."""
    return sum(source.nbytes + 2048 for source in sources.values()) + (1 << 16)


@dataclass(frozen=True)
class _Plan:
    """A file that is about to be written."""

    content: Mapping[str, Any]
    sources: Mapping[str, Source]
    skeleton: "Skeleton"
    userblock: int

    def header(self, digests: Mapping[str, str], rest: str) -> tuple[bytes, str] | None:
        """The user block and the content id; None if the header does not fit."""
        datasets = {
            name: {"dtype": s.dtype, "sha256": digests[name], "shape": list(s.shape)}
            for name, s in self.sources.items()
        }
        full: dict[str, Any] = {**self.content, "datasets": datasets}
        if full["kind"] == "knowledge":
            blocks = full["blocks"]
            full["blocks"] = {n: {**b, "id": block_id(full, n)} for n, b in blocks.items()}
        size = self.skeleton.size
        raw = encode_header(full, self.skeleton.offsets, rest, size, self.userblock)
        return None if raw is None else (raw, parse_header(raw, size).content_id)


_BLANK = "0" * 64


def _plan(content: Mapping[str, Any], sources: Mapping[str, Source]) -> _Plan:
    """The plan with the smallest user block that holds the header."""
    shapes = {name: (s.dtype, s.shape) for name, s in sources.items()}
    userblock = SMALLEST_USERBLOCK
    while True:
        plan = _Plan(content, sources, build_skeleton(shapes, userblock), userblock)
        if plan.header(dict.fromkeys(sources, _BLANK), _BLANK) is not None:
            return plan
        userblock *= 2


def pack(draft: Draft, content: Mapping[str, Any], sources: Mapping[str, Source]) -> str:
    """Writes a whole sealed file into `draft` and returns its content id.

    The same content gives the same bytes under every supported version of h5py. `content` lacks
    `datasets` and the ids of the blocks; both are computed here.

    Raises:
        ValueRefusedError: the header would be too large.
    """
    plan = _plan(content, sources)
    offsets, size = plan.skeleton.offsets, plan.skeleton.size
    digests = {name: _write(draft, s, offsets[name]) for name, s in sources.items()}
    spans = [(offsets[name], offsets[name] + s.nbytes) for name, s in sources.items() if s.nbytes]
    rest = hashlib.sha256()
    for start, stop in gaps(spans, plan.userblock, size):
        raw = plan.skeleton.read(start, stop)
        draft.write_at(raw, start)
        rest.update(raw)
    header = plan.header(digests, rest.hexdigest())
    if header is None:
        what = "the header outgrew its place"
        raise CacheFormatError(what, where=draft.path)
    draft.write_at(header[0], 0)
    return header[1]


def _gathered(source: Source, offset: int) -> Iterator[Buffer]:
    """The bytes of a dataset; those of a large one in pieces that end on large boundaries.

    The system keeps what is written so in large pages, and reads from them a quarter faster.
    """
    if source.nbytes <= WRITE_STEP:
        yield from source.chunks()
        return
    room, gathered = WRITE_STEP - offset % WRITE_STEP, bytearray()
    for chunk in source.chunks():
        left = memoryview(chunk).cast("B")
        while left:
            piece, left = left[: room - len(gathered)], left[room - len(gathered) :]
            gathered += piece
            if len(gathered) == room:
                yield gathered
                room, gathered = WRITE_STEP, bytearray()
    yield gathered


def _write(draft: Draft, source: Source, offset: int) -> str:
    digest, at = hashlib.sha256(), offset
    for chunk in _gathered(source, offset):
        digest.update(chunk)
        at = draft.write_at(chunk, at)
    if at - offset != source.nbytes:
        what = "an entry changed while it was packed"
        raise CacheFormatError(what, where=draft.path)
    return digest.hexdigest()
