"""Reading a sealed cache where it lies, over ranges: a few reads instead of a download.

The header and the index of a block are read whole and digested whole. One entry of `values` or of
a column of texts is one piece of a dataset, so the digest of the dataset says nothing about it; it
is checked against the entry's own digest, which the index holds. No byte is handed out that no
digest covers.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from cache.blocks import KINDS
from cache.errors import CacheFormatError, StorageError
from cache.header import PREFIX, Extent, Header, check_expected
from cache.header_reader import parse_header, prefix_length
from cache.sealed import FIRST_READ, SealedFile, about, dtype_of
from cache.sharing.http_ranges import HttpRanges
from cache.sharing.remote_errors import remote_errors
from cache.sharing.remote_file import HttpFile, remote_at
from cache.store import KnowledgeCache, check_kind

BRIDGED = 1 << 17  # bytes between two datasets that cost less than another read
LARGEST_READ = 1 << 30


def open_remote(place: str | Path | BinaryIO, *, expect: str | None = None) -> KnowledgeCache:
    """A cache that is read over ranges, piece by piece as it is used.

    Args:
        place: an address (`https://`, `s3://`, `hf://`, a path), or an open binary file that can
            seek, such as one of fsspec.
        expect: the content id it must have (or at least 12 digits of its start).

    Raises:
        CacheFormatError: missing, foreign, damaged, incomplete or of a newer version.
        CacheMismatchError: sound, but not the one expected.
        RecipeError: an address of an unknown kind.
        MissingExtraError: what the address needs is not installed.
        StorageError: the server or the file system refused.
    """
    sealed = _at(str(place)) if isinstance(place, str | Path) else RangedFile(place, "remote cache")
    try:
        check_kind(sealed)
        check_expected(sealed.header.content_id, expect, sealed.path)
        return KnowledgeCache(sealed)
    except BaseException:
        sealed.close()
        raise


def _at(address: str) -> "RangedFile":
    remote = remote_at(address)
    with _refusals(remote.shown):
        http = isinstance(remote, HttpFile)
        file: Any = HttpRanges(address, remote.shown) if http else remote._open(0)
    return RangedFile(file, remote.shown)


@contextmanager
def _refusals(label: str) -> Iterator[None]:
    """Turns what file systems raise into one clear line."""
    try:
        with remote_errors(label):
            yield
    except FileNotFoundError as error:
        what = "there is no such file or server"
        raise CacheFormatError(what, where=label, do="Check the address.") from error


class RangedFile(SealedFile):
    """A sealed file behind reads at a place; made by `open_remote`.

    Args:
        file: can seek and read; it is closed with this.
        label: what messages call it.

    Attributes:
        reads: how many reads were made.
    """

    by_entry = True

    def __init__(self, file: BinaryIO, label: str) -> None:
        self.path, self.reads = label, 0
        self._verified: set[str] = set()
        self._file: Any = file
        self._views: dict[str, np.ndarray] = {}
        try:
            self.header = self._remote_header()
        except BaseException:
            self.close()
            raise

    def _read_at(self, start: int, length: int) -> bytes:
        if self._file is None:
            what = "the cache was closed"
            raise CacheFormatError(what, where=self.path)
        if length > LARGEST_READ:
            what, do = "too large to read over ranges", "Pull the file first."
            raise CacheFormatError(what, where=self.path, found=f"{length} bytes", do=do)
        with _refusals(str(self.path)):
            self.reads += 1
            self._file.seek(start)
            raw: bytes = self._file.read(length)
        if len(raw) != length:
            what = "the server gave another number of bytes than asked for"
            raise StorageError(what, where=self.path, found=len(raw), wanted=length)
        return raw

    def _remote_header(self) -> Header:
        with _refusals(str(self.path)):
            size = self._file.seek(0, io.SEEK_END)
        raw = self._read_at(0, min(size, FIRST_READ))
        with about(self.path):
            wanted = min(size, PREFIX + prefix_length(raw[:PREFIX]))
            if len(raw) < wanted:
                raw += self._read_at(len(raw), wanted - len(raw))
            return parse_header(raw, size)

    def close(self) -> None:
        """Lets go of the file; arrays that were given out stay readable."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._views.clear()

    @property
    def bytes(self) -> NoReturn:
        """Nothing: the whole file is not read over ranges."""
        what = "this needs the whole file"
        raise CacheFormatError(what, where=self.path, do="Pull the file first.")

    def _block_of(self, name: str) -> tuple[str, str] | None:
        """Block and column, if every entry's digest covers its own piece of this dataset."""
        block, _, column = name.partition("__")
        spec = self.header.specs.get(block)
        kind = KINDS[spec.kind].columns.get(column) if spec else None
        return (block, column) if kind in {"array", "text"} else None

    def _group(self, name: str) -> list[Extent]:
        """The datasets that are needed whenever this one is."""
        prefix, _, column = name.partition("__")
        alone = self._block_of(name) or column in {"", "keys", "sources"}
        return [
            extent
            for other, extent in self.header.extents.items()
            if other == name
            or (
                not alone
                and other.startswith(prefix + "__")
                and other.partition("__")[2] not in {"keys", "sources"}
                and not self._block_of(other)
            )
        ]

    def array(self, name: str, *, check: bool = True) -> np.ndarray:
        """A dataset, read and digested whole, with those of its block that go with it.

        Raises:
            CacheFormatError: its bytes are not those that were sealed.
            StorageError: the server refused.
        """
        del check
        if name not in self._views:
            wanted = [e for e in self._group(name) if e.name not in self._views]
            for extents in _bridged(sorted(wanted, key=lambda e: e.offset)):
                first, end = extents[0].offset, extents[-1].offset + extents[-1].nbytes
                raw = memoryview(self._read_at(first, end - first) if end > first else b"")
                for extent in extents:
                    self._take(extent, raw[extent.offset - first :][: extent.nbytes])
        return self._views[name]

    def _take(self, extent: Extent, raw: memoryview) -> None:
        self._compare(extent, hashlib.sha256(raw).hexdigest())
        self._views[extent.name] = np.frombuffer(raw, dtype_of(extent)).reshape(extent.shape)

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of a dataset; those of arrays and texts are one read, for the caller to digest."""
        extent = self.header.extents[name]
        if name in self._views or self._block_of(name) is None:
            return self.array(name)[first:last]
        step = extent.nbytes // extent.shape[0] if extent.nbytes else 0
        raw = self._read_at(extent.offset + first * step, (last - first) * step)
        return np.frombuffer(raw, dtype_of(extent)).reshape(last - first, *extent.shape[1:])

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """A dataset in memory of its own, read and digested whole."""
        found = self.array(name)
        if out is None:
            return found.copy()
        np.copyto(out, found, casting="no")
        return out


def _bridged(extents: Sequence[Extent]) -> Iterator[list[Extent]]:
    """Neighbours, so that what lies close is one read."""
    group: list[Extent] = []
    for extent in extents:
        if group and extent.offset - (group[-1].offset + group[-1].nbytes) > BRIDGED:
            yield group
            group = []
        group.append(extent)
    if group:
        yield group
