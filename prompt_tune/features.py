"""Image features of a frozen tower, computed once per picture and kept on this machine.

The store lies in the user's cache folder. It is keyed by what the tower is and by the pixels of
each picture, so every subset and every split of the same pictures shares the work. Features are
derived from patients' images and, unlike a knowledge cache, must never be shared: files are
readable by their owner only and marked `patient_derived`.

    features/<tower and preprocessing>/<view>/<SHA-256 of the file>.safetensors

Each file holds at most `CHUNK` pictures and is written whole, so a killed run loses less than that.
A file whose bytes do not match its name is removed and its pictures are encoded again.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from cache.durable import storage_errors
from cache.errors import ModelError
from cache.progress import track
from cache.recipe import digest_of
from cache.user_folder import user_cache
from prompt_tune.augment import Pictures
from prompt_tune.backbone import Backbone
from prompt_tune.data.images import ImageSplit
from prompt_tune.pixels import keep_private, private_folder

VERSION = 1  # of the store; another version is another folder
BATCH = 16
CHUNK = 64
METADATA = {"patient_derived": "true", "format": f"vademecum features {VERSION}"}


class FeatureStore:
    """The features of one tower under one view; never to be shared.

    Args:
        folder: made if missing, readable by its owner only.
        width: of one feature.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self.rows: dict[str, np.ndarray] = {}
        with storage_errors(folder):
            private_folder(folder)
            for path in sorted(folder.glob("*.safetensors")):
                self._read(path)

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != path.stem:
            path.unlink(missing_ok=True)
            return
        try:
            chunk = load(data)
            digests, values = chunk["digests"], chunk["features"]
        except (SafetensorError, KeyError):
            return  # sound bytes of something else
        if values.shape == (len(digests), self.width):
            for digest, row in zip(digests, values, strict=True):
                self.rows.setdefault(digest.tobytes().hex(), row)

    def add(self, digests: Sequence[str], values: Float[np.ndarray, "n width"]) -> None:
        """Keeps the features of some pictures, whole or not at all."""
        keys = np.frombuffer(bytes.fromhex("".join(digests)), dtype=np.uint8).reshape(-1, 32)
        data = save({"digests": keys.copy(), "features": values}, metadata=METADATA)
        keep_private(self.folder, data)
        self.rows.update(zip(digests, values, strict=True))


def parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`items` in runs of `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def view_name(view: int, seed: int) -> str:
    """The folder of one view; view 0 is the test transform, whatever the seed."""
    return "view-0" if view == 0 else f"view-{view}-seed-{seed}"


def store_of(backbone: Backbone, view: int, seed: int) -> FeatureStore:
    """The store of one view of one tower.

    Raises:
        StorageError: the user's cache folder cannot be used.
    """
    key = digest_of([VERSION, backbone.image_fingerprint, backbone.preprocess.digest])
    folder = user_cache() / "features" / key / view_name(view, seed)
    return FeatureStore(folder, backbone.embed_dim)


def _encode(
    backbone: Backbone,
    split: ImageSplit,
    indices: Sequence[int],
    pixels: Callable[[Sequence[int]], Float[Tensor, "batch 3 size size"]],
) -> Float[np.ndarray, "n width"]:
    with torch.inference_mode():
        rows = [
            backbone.image.encode(pixels(part).to(backbone.device)).float().cpu()
            for part in parts(indices, BATCH)
        ]
    values = torch.cat(rows).numpy()
    if not np.isfinite(values).all():
        at = indices[int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])]
        what = "the image tower gave a value that is not finite"
        raise ModelError(what, where=split.ids[at], found=backbone.name)
    return values


def _chunks(split: ImageSplit, stores: list[FeatureStore]) -> Iterator[tuple[int, Sequence[int]]]:
    """(view, indices) of what the stores lack; equal pictures are encoded once."""
    first = {digest: i for i, digest in reversed(list(enumerate(split.digests)))}
    for view, store in enumerate(stores):
        lacking = sorted(i for digest, i in first.items() if digest not in store.rows)
        for chunk in parts(lacking, CHUNK):
            yield view, chunk


def image_features(
    backbone: Backbone,
    split: ImageSplit,
    *,
    views: int = 1,
    seed: int = 0,
    open_store: Callable[[Backbone, int, int], FeatureStore] = store_of,
) -> Float[Tensor, "cases views embed"]:
    """The image tower's output for every case and view, in float32, not normalised.

    View 0 is the test transform; view k is the k-th augmentation of that picture under `seed`,
    whatever else is in the split. Reads what is cached, encodes and caches the rest.

    Args:
        backbone: whose image tower encodes.
        split: the images.
        views: how many.
        seed: of the augmentations.
        open_store: gives the store of a tower, view and seed; see `Shelf.features`.

    Raises:
        DataError: an image cannot be read.
        ModelError: a feature is not finite.
        StorageError: the user's cache folder cannot be used.
    """
    stores = [open_store(backbone, view, seed) for view in range(views)]
    work = list(_chunks(split, stores))
    augmented = None
    if any(view for view, _ in work):
        augmented = Pictures(split, backbone.preprocess, str(backbone.device))

    def pixels(part: Sequence[int], view: int) -> Float[Tensor, "batch 3 size size"]:
        if view and augmented is not None:
            return augmented.show(part, [view] * len(part), seed)
        return torch.stack([backbone.preprocess(split.image(i)) for i in part])

    if work:
        with track("encode images", sum(len(chunk) for _, chunk in work)) as progress:
            for view, chunk in work:
                values = _encode(backbone, split, chunk, partial(pixels, view=view))
                stores[view].add(tuple(split.digests[i] for i in chunk), values)
                progress.advance(len(chunk))
    found = np.empty((len(split), views, backbone.embed_dim), dtype=np.float32)
    for view, store in enumerate(stores):
        for i, digest in enumerate(split.digests):
            found[i, view] = store.rows[digest]
    return torch.from_numpy(found)
