"""Decoded pictures, memory-mapped: every picture is decoded once on this machine.

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
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from cache.durable import drafting, storage_errors, sweep
from cache.errors import DataError
from cache.progress import track
from cache.user_folder import user_cache
from prompt_tune.data.images import ImageSplit, pixel_digest

VERSION = 1  # of the store; another version is another folder
CHUNK_BYTES = 32 * 2**20
METADATA = {"patient_derived": "true", "format": f"vademecum pixels {VERSION}"}


def private_folder(folder: Path) -> None:
    """Makes a folder, and those below `features`, for its owner alone."""
    root = user_cache() / "features"
    root.parent.mkdir(parents=True, exist_ok=True)
    for place in reversed([folder, *(p for p in folder.parents if root in (p, *p.parents))]):
        place.mkdir(mode=0o700, exist_ok=True)
        place.chmod(0o700)


def keep_private(folder: Path, data: bytes) -> Path:
    """Writes `data` under its SHA-256 for its owner alone, whole or not at all; returns where.

    Raises:
        StorageError: the operating system refused something.
    """
    path = folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    with drafting(folder) as draft:
        os.fchmod(draft.fd, 0o600)
        draft.write_at(data, 0)
        draft.sync()
        draft.publish(path, replace=False)
    return path
