"""Decoded pictures, memory-mapped: what reads pixels has each decoded once on this machine.

Training, validation and evaluation of such a method all read here. Besides, a file is decoded once
for its digest, by which data are known before a method is; see `data.remembered`.

The store lies in the user's cache folder, beside the image features and under the same rules: its
files are readable by their owner only, marked `patient_derived`, and never shared.

    features/pixels/<version>/<SHA-256 of the file>.safetensors

A file holds pictures of any sizes, one after the other, three bytes a pixel; `digests`, `sizes`
(height, width) and, summed over the sizes, the offsets say where each lies. It is written whole
when `CHUNK_BYTES` are decoded, so a killed run loses less than that. A picture's key is the digest
of its pixels, which is compared when the picture is first read: a file that holds others than it
says is removed, and its pictures are decoded again.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from cache.durable import storage_errors, sweep
from cache.errors import DataError, StorageError
from cache.progress import track
from cache.user_folder import user_cache
from prompt_tune.data.images import ImageSplit
from prompt_tune.private_files import keep_private, private_folder

VERSION = 1  # of the store; another version is another folder
CHUNK_BYTES = 32 * 2**20
Picture = UInt8[Tensor, "height width 3"]
METADATA = {"patient_derived": "true", "format": f"vademecum pixels {VERSION}"}


def _digest(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    """`image_digest` of decoded pixels."""
    height, width, _ = pixels.shape
    digest = hashlib.sha256(f"{width}x{height}:".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


class PixelStore:
    """Pictures by the digest of their pixels; never to be shared.

    Args:
        folder: made if missing, readable by its owner only.

    Raises:
        StorageError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, tuple[Path, Tensor]] = {}
        self._sound: set[str] = set()
        with storage_errors(folder):
            private_folder(folder)
            sweep(folder)
            for path in sorted(folder.glob("*.safetensors")):
                self._open(path)

    def _open(self, path: Path) -> None:
        """Learns where the pictures of a file lie; of their pixels none is read."""
        try:
            with safe_open(path, "pt") as file:
                keys, sizes, pixels = (file.get_tensor(n) for n in ("digests", "sizes", "pixels"))
            areas = pixels.split(sizes.prod(dim=1).tolist())
            views = [area.view(*size, 3) for area, size in zip(areas, sizes.tolist(), strict=True)]
            names = [row.tobytes().hex() for row in keys.numpy()]
            self._found |= {n: (path, view) for n, view in zip(names, views, strict=True)}
        except FileNotFoundError:
            return  # removed by another process
        except (SafetensorError, RuntimeError, ValueError):
            path.unlink(missing_ok=True)

    def verify(self, digests: Iterable[str]) -> None:
        """Reads some pictures; a file where one is another than its digest says is removed."""
        for digest in digests:
            if digest in self._sound or digest not in self._found:
                continue
            path, pixels = self._found[digest]
            if _digest(pixels.numpy()) == digest:
                self._sound.add(digest)
            else:
                path.unlink(missing_ok=True)
                self._found = {k: v for k, v in self._found.items() if v[0] != path}

    def __contains__(self, digest: str) -> bool:
        return digest in self._found

    def __getitem__(self, digest: str) -> Picture:
        """The picture of that digest, mapped from disk.

        Raises:
            StorageError: it is not there.
        """
        self.verify([digest])
        if digest not in self:
            what = "a decoded picture cannot be read back"
            raise StorageError(what, where=self.folder, do="Check the disk.")
        return self._found[digest][1]

    def add(self, pictures: Mapping[str, UInt8[np.ndarray, "height width 3"]]) -> None:
        """Keeps some pictures, whole or not at all.

        Raises:
            StorageError: the operating system refused something.
        """
        keys = np.frombuffer(bytes.fromhex("".join(pictures)), dtype=np.uint8).reshape(-1, 32)
        sizes = np.array([p.shape[:2] for p in pictures.values()], dtype=np.int64)
        pixels = np.concatenate([p.reshape(-1, 3) for p in pictures.values()])
        tensors = {"digests": keys.copy(), "sizes": sizes, "pixels": pixels}
        self._open(keep_private(self.folder, save(tensors, metadata=METADATA)))


def _decoded(split: ImageSplit, indices: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
    """The pictures at `indices` by digest, in portions of `CHUNK_BYTES`.

    Raises:
        DataError: an image cannot be read, or is another than a moment ago.
    """
    chunk: dict[str, np.ndarray] = {}
    held = 0
    for i in indices:
        pixels = np.asarray(split.image(i))
        if _digest(pixels) != split.digests[i]:
            what = "the image changed while it was being read"
            raise DataError(what, where=split.files[i], do="Start again.")
        chunk[split.digests[i]] = pixels
        held += pixels.nbytes
        if held >= CHUNK_BYTES:
            yield chunk
            chunk, held = {}, 0
    if chunk:
        yield chunk


def stored_pictures(split: ImageSplit) -> list[Picture]:
    """Every picture of a split, mapped from disk; those the store lacks are decoded first.

    Raises:
        DataError: an image cannot be read.
        StorageError: the user's cache folder cannot be used.
    """
    store = PixelStore(user_cache() / "features" / "pixels" / str(VERSION))
    first = {digest: i for i, digest in reversed(list(enumerate(split.digests)))}
    store.verify(first)
    lacking = sorted(i for digest, i in first.items() if digest not in store)
    if lacking:
        with track("decode images", len(lacking)) as progress:
            for chunk in _decoded(split, lacking):
                store.add(chunk)
                progress.advance(len(chunk))
    return [store[digest] for digest in split.digests]
