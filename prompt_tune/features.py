"""Image features of a frozen tower, computed once per picture and kept on this machine.

The store lies in the user's cache folder. It is keyed by what the tower is and by the pixels of
each picture, so every subset and every split of the same pictures shares the work. Features are
derived from patients' images and, unlike a knowledge cache, must never be shared: files are
readable by their owner only and marked `patient_derived`.

    features/<tower and preprocessing>/<view>/<SHA-256 of the file>.safetensors

Each file holds at most `CHUNK` pictures and is written whole, so a killed run loses less than that.
Files are mapped. Those with a picture that is asked for are read to compare their bytes with their
name; where these do not match, the file is removed and its pictures are encoded again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from cache.durable import storage_errors
from cache.errors import ModelError, StorageError
from cache.progress import track
from cache.recipe import digest_of
from cache.user_folder import user_cache
from prompt_tune.augment import Pictures
from prompt_tune.backbone import Backbone
from prompt_tune.data.images import ImageSplit
from prompt_tune.private_files import is_sound, keep_private, private_folder

VERSION = 1  # of the store; another version is another folder
BATCH = 16
CHUNK = 64
METADATA = {"patient_derived": "true", "format": f"vademecum features {VERSION}"}


class FeatureStore:
    """The features of one tower under one view, memory-mapped; never to be shared.

    Args:
        folder: made if missing, readable by its owner only.
        width: of one feature.

    Raises:
        StorageError: the folder cannot be used.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self._found: dict[str, tuple[Path, np.ndarray]] = {}
        self._sound: set[Path] = set()
        with storage_errors(folder):
            private_folder(folder)
            for path in sorted(folder.glob("*.safetensors")):
                self._open(path)

    def _open(self, path: Path) -> None:
        """Learns whose features a file holds; of their values none is read."""
        try:
            with safe_open(path, "pt") as file:
                digests, values = (file.get_tensor(name) for name in ("digests", "features"))
        except FileNotFoundError:
            return  # removed by another process
        except (SafetensorError, RuntimeError, ValueError):
            digests = values = torch.empty(0)
        kinds = (digests.dtype, values.dtype) == (torch.uint8, torch.float32)
        if kinds and (*digests.shape, *values.shape) == (len(values), 32, len(values), self.width):
            names = (row.tobytes().hex() for row in digests.numpy())
            for name, row in zip(names, values.numpy(), strict=True):
                self._found.setdefault(name, (path, row))
        elif not is_sound(path):  # sound bytes of something else stay
            path.unlink(missing_ok=True)

    def verify(self, digests: Iterable[str]) -> None:
        """Reads the files of some pictures; one that is damaged is removed."""
        with storage_errors(self.folder):
            for path in {self._found[d][0] for d in digests if d in self._found} - self._sound:
                if is_sound(path):
                    self._sound.add(path)
                else:
                    path.unlink(missing_ok=True)
                    self._found = {k: v for k, v in self._found.items() if v[0] != path}

    def __contains__(self, digest: str) -> bool:
        return digest in self._found

    def __getitem__(self, digest: str) -> Float[np.ndarray, "width"]:
        """The feature of the picture of that digest, mapped from disk.

        Raises:
            StorageError: it is not there.
        """
        if digest not in self:
            what = "a cached feature cannot be read back"
            raise StorageError(what, where=self.folder, do="Check the disk.")
        return self._found[digest][1]

    def add(self, digests: Sequence[str], values: Float[np.ndarray, "n width"]) -> None:
        """Keeps the features of some pictures, whole or not at all.

        Raises:
            StorageError: the operating system refused something.
        """
        keys = np.frombuffer(bytes.fromhex("".join(digests)), dtype=np.uint8).reshape(-1, 32)
        data = save({"digests": keys.copy(), "features": values}, metadata=METADATA)
        self._open(keep_private(self.folder, data))


def parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`items` in runs of `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def view_name(view: int, seed: int, *, flip: bool = True) -> str:
    """The folder of one view; view 0 is the test transform, whatever the seed."""
    if view == 0:
        return "view-0"
    return f"view-{view}-seed-{seed}" + ("" if flip else "-no-flip")


def store_of(backbone: Backbone, view: int, seed: int) -> FeatureStore:
    """The store of one view of one tower.

    Raises:
        StorageError: the user's cache folder cannot be used.
    """
    key = digest_of([VERSION, backbone.image_fingerprint, backbone.preprocess.digest])
    name = view_name(view, seed, flip=backbone.preprocess.flip)
    folder = user_cache() / "features" / key / name
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
        store.verify(first)
        lacking = sorted(i for digest, i in first.items() if digest not in store)
        for chunk in parts(lacking, CHUNK):
            yield view, chunk


def image_features(
    backbone: Backbone,
    split: ImageSplit,
    *,
    views: int = 1,
    seed: int = 0,
    open_store: Callable[[Backbone, int, int], FeatureStore] = store_of,
    keep: bool = False,
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
        keep: the pictures are read as pixels too, so those that are decoded are kept.

    Raises:
        DataError: an image cannot be read.
        ModelError: a feature is not finite.
        StorageError: the user's cache folder cannot be used.
    """
    stores = [open_store(backbone, view, seed) for view in range(views)]
    work = list(_chunks(split, stores))
    pictures = None
    if any(keep or view for view, _ in work):
        pictures = Pictures(split, backbone.preprocess, str(backbone.device))

    def pixels(part: Sequence[int], view: int) -> Float[Tensor, "batch 3 size size"]:
        if pictures is not None:
            return pictures.show(part, [view] * len(part), seed)
        return torch.stack([backbone.preprocess(split.image(i)) for i in part])

    if work:
        with track("encode images", sum(len(chunk) for _, chunk in work)) as progress:
            for view, chunk in work:
                values = _encode(backbone, split, chunk, partial(pixels, view=view))
                stores[view].add(tuple(split.digests[i] for i in chunk), values)
                progress.advance(len(chunk))
    found = np.empty((len(split), views, backbone.embed_dim), dtype=np.float32)
    for view, store in enumerate(stores):
        store.verify(split.digests)
        for i, digest in enumerate(split.digests):
            found[i, view] = store[digest]
    return torch.from_numpy(found)
