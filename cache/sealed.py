"""Sealed files: reading by header alone, and checking every byte.

A sealed file is an ordinary HDF5 file whose user block says where every dataset lies and what
its SHA-256 is. Reading uses that header only; the HDF5 library never parses a file.
"""

import hashlib
import importlib
import math
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from cache.durable import storage_errors
from cache.errors import CacheFormatError, ValueRefusedError
from cache.header import MAGIC, PREFIX, Extent, Header
from cache.header_reader import parse_header, prefix_length

if TYPE_CHECKING:
    from cache.skeleton import Skeleton

FIRST_READ = 1 << 16
READ_STEP = 1 << 20  # a piece is still in the processor's cache when it is digested
PAGE = 4096


def build_skeleton(
    datasets: Mapping[str, tuple[str, tuple[int, ...]]], userblock: int
) -> "Skeleton":
    """The skeleton of a file; h5py is imported only here, so that reading never needs it."""
    built: Skeleton = importlib.import_module("cache.skeleton").build(datasets, userblock)
    return built


def gaps(spans: Iterable[tuple[int, int]], start: int, size: int) -> Iterator[tuple[int, int]]:
    """The stretches from `start` to `size` that no span covers."""
    for first, last in sorted(spans):
        if start < first:
            yield start, first
        start = max(start, last)
    if start < size:
        yield start, size


def spans_of(extents: Iterable[Extent]) -> list[tuple[int, int]]:
    """Where datasets begin and end, those without bytes left out."""
    return [(e.offset, e.offset + e.nbytes) for e in extents if e.nbytes]


def dtype_of(extent: Extent) -> np.dtype:
    """The type of a dataset's elements."""
    return np.dtype("u1" if extent.dtype == "u1" else "<" + extent.dtype)


def empty_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that starts on a page.

    Some processors copy five times slower from the start of a page to 16 bytes after one, which is
    where `np.empty` puts large arrays. Starting on a page is fast wherever the bytes come from.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + nbytes].view(dtype).reshape(shape)


@contextmanager
def about(path: Path | str) -> Iterator[None]:
    """Puts the file's name before what a check says about it."""
    try:
        yield
    except CacheFormatError as error:
        raise CacheFormatError(str(error), where=path) from error


class SealedFile:
    """A sealed file, open for reading; every dataset is digested when it is first touched.

    Args:
        path: the file. Symbolic links are followed; only a regular file is read.

    Attributes:
        path: the file, or what messages call it.
        by_entry: True if `rows` gives bytes that only the digest of their entry covers.

    Raises:
        CacheFormatError: missing, foreign, damaged, incomplete or of a newer version.
        StorageError: the operating system refused to read it.
    """

    by_entry = False

    def __init__(self, path: Path) -> None:
        self.path: Path | str = path
        self._map: mmap.mmap | None = None
        self._verified: set[str] = set()
        self._views: dict[str, np.ndarray] = {}
        with about(path):
            self._fd = _open(path)
            try:
                with storage_errors(path):
                    self.header = self._read_header()
            except BaseException:
                self.close()
                raise

    def _read_header(self) -> Header:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            what = "not a regular file"
            raise CacheFormatError(what, do="Name a knowledge cache.")
        raw = os.pread(self._fd, FIRST_READ, 0)
        wanted = PREFIX + prefix_length(raw[:PREFIX])
        while len(raw) < wanted:
            more = os.pread(self._fd, wanted - len(raw), len(raw))
            if not more:
                do = "The copy may be incomplete; fetch the file again."
                what = "the file ends inside its header"
                raise CacheFormatError(what, do=do)
            raw += more
        return parse_header(raw, found.st_size)

    def close(self) -> None:
        """Lets go of the file; arrays that were given out stay readable."""
        self._map = None
        self._views.clear()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bytes(self) -> memoryview:
        """The whole file, mapped read-only."""
        if self._map is None:
            with about(self.path), storage_errors(self.path):
                self._need_open()
                if os.fstat(self._fd).st_size != self.header.size:
                    what = "the file changed its size while it was open"
                    raise CacheFormatError(what)
                self._map = mmap.mmap(self._fd, self.header.size, access=mmap.ACCESS_READ)
        return memoryview(self._map)

    def _need_open(self) -> None:
        if self._fd < 0:
            what = "the cache was closed"
            raise CacheFormatError(what)

    def array(self, name: str, *, check: bool = True) -> np.ndarray:
        """A dataset as a read-only view of the file; `check=False` leaves the digest for later.

        Raises:
            CacheFormatError: its bytes are not those that were sealed.
        """
        if check and name not in self._verified:
            self.verify_dataset(name)
        if name not in self._views:
            extent = self.header.extents[name]
            dtype = dtype_of(extent)
            raw = (
                self.bytes[extent.offset : extent.offset + extent.nbytes] if extent.nbytes else b""
            )
            self._views[name] = np.frombuffer(raw, dtype).reshape(extent.shape)
        return self._views[name]

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` of a dataset; see `by_entry`."""
        return self.array(name)[first:last]

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """A dataset copied into memory of its own, the fastest way to get all of it.

        Bytes that no digest has covered yet are digested where they are handed out.

        Args:
            name: of the dataset.
            out: where to put it, an array of its type and shape; None makes one that starts on a
                page.

        Raises:
            CacheFormatError: its bytes are not those that were sealed.
            ValueRefusedError: `out` does not fit.
        """
        extent = self.header.extents[name]
        dtype, digest = dtype_of(extent), hashlib.sha256()
        out = empty_pages(extent.shape, dtype) if out is None else out
        if (out.dtype, out.shape) != (dtype, extent.shape) or not out.flags.carray:
            what, wanted = (
                "the array to read into does not fit",
                f"{dtype} {extent.shape}, writable",
            )
            found = f"{out.dtype} {out.shape}"
            raise ValueRefusedError(what, where=f"dataset {name}", found=found, wanted=wanted)
        raw = out.reshape(-1).view(np.uint8).data
        check = name not in self._verified
        with about(self.path), storage_errors(self.path):
            self._need_open()
            step = READ_STEP if check else max(1, extent.nbytes)
            for at in range(0, extent.nbytes, step):
                piece = raw[at : at + step]
                self._fill(piece, extent.offset + at)
                if check:
                    digest.update(piece)
        if check:
            self._compare(extent, digest.hexdigest())
        return out

    def _fill(self, piece: memoryview, at: int) -> None:
        while piece:
            done = os.preadv(self._fd, [piece], at)
            if not done:
                what = "the file changed its size while it was open"
                raise CacheFormatError(what)
            piece, at = piece[done:], at + done

    def _compare(self, extent: Extent, sha256: str) -> None:
        if sha256 != extent.sha256:
            what = f"dataset {extent.name} is damaged: its digest differs"
            raise CacheFormatError(what, where=self.path, do="Fetch the file again.")
        self._verified.add(extent.name)

    def verify_dataset(self, name: str) -> None:
        """Nothing, if the bytes of one dataset are those that were sealed.

        Raises:
            CacheFormatError: they are not.
        """
        extent = self.header.extents[name]
        raw = self.bytes[extent.offset : extent.offset + extent.nbytes] if extent.nbytes else b""
        self._compare(extent, hashlib.sha256(raw).hexdigest())

    def verify_bytes(self) -> None:
        """Nothing, if every byte of the file is the one that was sealed.

        Raises:
            CacheFormatError: one is not; the message says in which part.
        """
        header, raw = self.header, self.bytes
        length = PREFIX + prefix_length(bytes(raw[:PREFIX]))
        if any(raw[length : header.userblock]):
            what = "the padding after the header is not zero"
            raise CacheFormatError(what, where=self.path)
        for name in header.extents:
            self.verify_dataset(name)
        rest = hashlib.sha256()
        for start, stop in gaps(spans_of(header.extents.values()), header.userblock, header.size):
            rest.update(raw[start:stop])
        if rest.hexdigest() != header.rest:
            what, do = "the HDF5 structure is damaged: its digest differs", "Fetch the file again."
            raise CacheFormatError(what, where=self.path, do=do)

    def verify_structure(self) -> None:
        """Nothing, if the HDF5 part holds the datasets of the header and nothing else.

        The structure is built again from the header and compared byte by byte, so that what HDF5
        tools show is what this reader reads, and the HDF5 library still sees no foreign byte.

        Raises:
            CacheFormatError: it holds something else, such as a link, a filter or an attribute.
        """
        header, raw = self.header, self.bytes
        shapes = {name: (e.dtype, e.shape) for name, e in header.extents.items()}
        skeleton = build_skeleton(shapes, header.userblock)
        offsets = {name: e.offset for name, e in header.extents.items()}
        same = dict(skeleton.offsets) == offsets and skeleton.size == header.size
        between = gaps(spans_of(header.extents.values()), header.userblock, header.size)
        if not same or any(raw[a:b] != skeleton.read(a, b) for a, b in between):
            what = "the HDF5 structure is not the one its header describes"
            do = "Do not open this file with HDF5 tools."
            raise CacheFormatError(what, where=self.path, do=do)


def _open(path: Path) -> int:
    """A file descriptor; never waits for a FIFO or a device."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "there is no such file"
        raise CacheFormatError(what, do="Check the path.") from error
    except OSError as error:
        with storage_errors(path):
            raise
        raise AssertionError from error  # pragma: no cover - storage_errors always raises


def is_sealed(path: Path) -> bool:
    """True if `path` is a file that starts like a sealed one."""
    with suppress(OSError, CacheFormatError):
        fd = _open(path)
        try:
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
            prefix = os.pread(fd, PREFIX, 0) if regular else b""
        finally:
            os.close(fd)
        return prefix[:6] == MAGIC[:6]
    return False
