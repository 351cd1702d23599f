"""Digests of decoded images by the bytes of their files, so that no file is decoded twice for them.

They lie in the user's cache folder, beside the image features and under the same rules.

    features/digests/<version and decoders>/<SHA-256 of the file>.safetensors

A picture is known by the SHA-256 of its file, which is read whole whenever a digest is asked for:
another file is never taken for it, whatever its name and time. Another Pillow may decode other
pixels, so the versions of all decoders are in the folder's name.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cache.durable import storage_errors
from cache.errors import StorageError
from cache.recipe import digest_of
from cache.user_folder import user_cache
from prompt_tune.private_files import is_sound, keep_private, private_folder

VERSION = 1  # of what is kept; another version is another folder
DECODERS = ("jpg", "libjpeg_turbo", "jpg_2000", "libtiff", "zlib", "webp", "avif")
METADATA = {"patient_derived": "true", "format": f"vademecum digests {VERSION}"}


def place() -> Path:
    """The folder of what these decoders made."""
    import datasets

    known = {name: features.version(name) for name in DECODERS if name in features.get_supported()}
    key = digest_of([VERSION, PIL.__version__, datasets.__version__, known])
    return user_cache() / "features" / "digests" / key


class Remembered:
    """The digests of some image files; what is new is kept, where that is possible.

    Args:
        rows: a `datasets.Dataset` of images that are files.
    """

    def __init__(self, rows: Any) -> None:
        import datasets

        self.image = rows.features["image"]
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self.folder = place()
        self._known: dict[bytes, bytes] = {}
        with suppress(StorageError), storage_errors(self.folder):  # then everything is decoded
            for path in sorted(self.folder.glob("*.safetensors")):
                self._read(path)

    @staticmethod
    def of(rows: Any) -> "Remembered | None":
        """Those of the rows of a split; None where these are no files, or not decoded as such."""
        image: Any = (getattr(rows, "features", None) or {}).get("image")
        fitting = type(image).__name__ == "Image" and image.decode and image.mode is None
        return Remembered(rows) if fitting else None

    def _read(self, path: Path) -> None:
        if not is_sound(path):
            path.unlink(missing_ok=True)
            return
        with suppress(SafetensorError, KeyError):  # sound bytes of something else
            stored = load(path.read_bytes())
            files, pixels = stored["files"], stored["digests"]
            if files.dtype == pixels.dtype == np.uint8 and files.shape == (len(pixels), 32):
                pairs = zip(files, pixels.reshape(-1, 32), strict=True)
                self._known |= {file.tobytes(): digest.tobytes() for file, digest in pairs}

    def digests(
        self, cases: Sequence[int], rows: Sequence[int], digest: Callable[[int, Image | None], str]
    ) -> list[str]:
        """The digests of some cases.

        Args:
            cases: what `digest` calls them.
            rows: where they are.
            digest: of a case and its image, decoded from the very bytes the digest is kept for;
                without the image where the bytes cannot be had here.
        """
        found, new = list[str](), dict[bytes, bytes]()
        for case, value in zip(cases, self.rows[list(rows)]["image"], strict=True):
            data = _bytes(value)
            if data is None:
                found.append(digest(case, None))
                continue
            key = hashlib.sha256(data).digest()
            if key not in self._known:
                decoded = self.image.decode_example({"bytes": data, "path": None})
                self._known[key] = new[key] = bytes.fromhex(digest(case, decoded))
            found.append(self._known[key].hex())
        if new:
            self._keep(new)
        return found

    def _keep(self, new: Mapping[bytes, bytes]) -> None:
        columns = {"files": b"".join(new), "digests": b"".join(new.values())}
        arrays = {n: np.frombuffer(b, np.uint8).reshape(-1, 32).copy() for n, b in columns.items()}
        with suppress(StorageError), storage_errors(self.folder):  # they are found again
            private_folder(self.folder)
            keep_private(self.folder, save(arrays, metadata=METADATA))


def _bytes(value: Mapping[str, Any] | None) -> bytes | None:
    """An image's file, whether the row holds it or names it."""
    data: bytes | None = None if value is None else value["bytes"]
    if value is not None and data is None:
        with suppress(OSError, TypeError, ValueError):
            data = Path(value["path"]).read_bytes()
    return data
