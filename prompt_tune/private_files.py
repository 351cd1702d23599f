"""Files made from patients' images: in the user's cache folder, for their owner alone.

Each is written whole and named by the SHA-256 of its bytes.
"""

import hashlib
import os
from pathlib import Path

from cache.durable import drafting, storage_errors
from cache.user_folder import user_cache


def private_folder(folder: Path) -> None:
    """Makes a folder, and those below `features`, for its owner alone."""
    root = user_cache() / "features"
    root.parent.mkdir(parents=True, exist_ok=True)
    for place in reversed([folder, *(p for p in folder.parents if root in (p, *p.parents))]):
        place.mkdir(mode=0o700, exist_ok=True)
        place.chmod(0o700)


def is_sound(path: Path) -> bool:
    """Whether the file is there and its bytes are those it is named after."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == path.stem
    except FileNotFoundError:
        return False  # removed by another process


def keep_private(folder: Path, data: bytes) -> Path:
    """Writes `data` under its SHA-256 for its owner alone, whole or not at all; returns where.

    A damaged file of that name is replaced.

    Raises:
        StorageError: the operating system refused something.
    """
    path = folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    with storage_errors(path):
        damaged = path.exists() and not is_sound(path)
    with drafting(folder) as draft:
        os.fchmod(draft.fd, 0o600)
        draft.write_at(data, 0)
        draft.sync()
        draft.publish(path, replace=damaged)
    return path
