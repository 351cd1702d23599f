"""The HDF5 part of a sealed file, without its data, built in memory.

The HDF5 library writes into a sparse object of ours, never to a disk, and it never reads a byte
that it did not write itself. With the settings below its output depends on names, types, shapes
and the size of the user block only, so a verifier can build it again and compare.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import h5py
import numpy as np
from h5py import h5d, h5f, h5fd, h5p, h5s, h5t

from cache.header import ALIGNMENT

PAGE = 4096


class _Sparse(io.RawIOBase):
    """A file that keeps only the pages that were written; what was not is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[int, bytearray] = {}
        self.size, self.at = 0, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def truncate(self, size: int | None = None) -> int:
        self.size = self.at if size is None else size
        return self.size

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PAGE):
            self._write_piece(view[start : start + PAGE])
        return len(view)

    def _write_piece(self, piece: memoryview) -> None:
        while piece:
            number, inside = divmod(self.at, PAGE)
            part = piece[: PAGE - inside]
            page = self.pages.setdefault(number, bytearray(PAGE))
            page[inside : inside + len(part)] = part
            self.at += len(part)
            self.size = max(self.size, self.at)
            piece = piece[len(part) :]

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        for done in range(len(buffer)):
            number, inside = divmod(self.at + done, PAGE)
            page = self.pages.get(number)
            buffer[done] = page[inside] if page else 0
        self.at += len(buffer)
        return len(buffer)


@dataclass(frozen=True)
class Skeleton:
    """All bytes of a file that are not data; pages that are missing are zero."""

    offsets: Mapping[str, int]
    pages: Mapping[int, bytes]
    size: int

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`."""
        first, last = start // PAGE, -(-stop // PAGE)
        raw = b"".join(self.pages.get(n, bytes(PAGE)) for n in range(first, last))
        return raw[start - first * PAGE : stop - first * PAGE]


def build(datasets: Mapping[str, tuple[str, tuple[int, ...]]], userblock: int) -> Skeleton:
    """The HDF5 file with these datasets, `(dtype, shape)` by name, all contiguous and unfilled."""
    creation, access = h5p.create(h5p.FILE_CREATE), h5p.create(h5p.FILE_ACCESS)
    creation.set_userblock(userblock)
    creation.set_obj_track_times(False)
    access.set_libver_bounds(h5f.LIBVER_V18, h5f.LIBVER_V18)
    access.set_alignment(1, ALIGNMENT)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    sparse = _Sparse()
    access.set_fileobj_driver(h5fd.fileobj_driver, sparse)
    file = h5f.create(b"sealed", h5f.ACC_TRUNC, creation, access)
    made = []
    for name, (dtype, shape) in sorted(datasets.items()):
        layout = h5p.create(h5p.DATASET_CREATE)
        layout.set_layout(h5d.CONTIGUOUS)
        layout.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5d.FILL_TIME_NEVER)
        layout.set_obj_track_times(False)
        element = h5t.py_create(np.dtype("u1" if dtype == "u1" else "<" + dtype))
        space = h5s.create_simple(shape)
        made.append((name, h5d.create(file, name.encode("ascii"), element, space, layout)))
    offsets = {}
    for name, dataset in made:
        dtype, shape = datasets[name]
        empty = 0 in shape  # an empty dataset has no address; the library answers nonsense
        offsets[name] = 0 if empty else int(dataset.get_offset())
    file.close()
    return Skeleton(offsets, {n: bytes(page) for n, page in sparse.pages.items()}, sparse.size)


LIBRARY = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
