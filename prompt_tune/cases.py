"""Batches of one split, from cached image features or from pixels.

Pixels come from decoded pictures, which are kept. On a GPU those of training are cropped and
resized there, a batch at once; those of evaluation by open_clip's transform. A picture gives the
same bits either way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from prompt_tune.augment import Pictures, on_device
from prompt_tune.backbone import Backbone
from prompt_tune.data.source import ImageSplit
from prompt_tune.features import FeatureStore, image_features, store_of
from prompt_tune.method import Batch
from prompt_tune.pixels import Picture, stored_pictures
from prompt_tune.seeds import derive_seed, permutation

Views = int | Literal["live"]


class Cases:
    """One split as a method reads it.

    With enumerated views, image `i` shows view `h(seed, epoch, i) mod views` in an epoch, where
    view 0 is the test transform; `live` draws a new augmentation for every image and epoch.

    Features are those of `backbone` as it is given. A run gives it in full precision, also where
    its own towers compute in bf16, and also where views are `live` and every batch is encoded.

    Args:
        split: the images.
        backbone: its image tower encodes, its preprocessing transforms.
        pixels: give pixels to the method; otherwise features.
        frozen: give it cached features beside pixels, where views are enumerated.
        views: number of enumerated views, or `live`.
        flip: mirror augmented views half of the time.
        seed: of the run.
        device: where batches go.
        open_store: see `image_features`.
    """

    def __init__(  # noqa: PLR0913 - all that a recipe says of how a split is read
        self,
        split: ImageSplit,
        backbone: Backbone,
        *,
        pixels: bool,
        frozen: bool = False,
        views: Views = 1,
        flip: bool = True,
        seed: int = 0,
        device: str = "cpu",
        open_store: Callable[[Backbone, int, int], FeatureStore] = store_of,
    ) -> None:
        if not flip:
            backbone = replace(backbone, preprocess=replace(backbone.preprocess, flip=False))
        self.split, self.backbone, self.pixels = split, backbone, pixels
        self.views, self.seed, self.device = views, seed, device
        self.labels = torch.from_numpy(split.labels).long()
        self._features: Tensor | None = None
        if views != "live" and (frozen or not pixels):
            self._features = image_features(
                backbone, split, views=views, seed=seed, open_store=open_store, keep=pixels
            )

    def __len__(self) -> int:
        return len(self.split)

    def _view(self, index: int, epoch: int | None) -> int:
        if epoch is None:
            return 0
        if self.views == "live":
            return 1 + derive_seed(self.seed, "live", epoch) % (2**31)
        return derive_seed(self.seed, "view", epoch, index) % int(self.views)

    def batch(self, indices: Tensor, *, epoch: int | None = None) -> Batch:
        """The cases at `indices`; `epoch` None means the test transform."""
        labels = on_device(self.labels[indices], self.device)
        images = features = None
        if self._features is not None:
            views = torch.tensor([self._view(i, epoch) for i in indices.tolist()])
            features = on_device(self._features[indices, views], self.device)
        if self.pixels:
            images = self._pixels(indices.tolist(), epoch)
        elif features is None:
            with torch.no_grad():
                features = self.backbone.image.encode(self._pixels(indices.tolist(), epoch))
        return Batch(labels=labels, images=images, features=features)

    def _pixels(
        self, indices: Sequence[int], epoch: int | None
    ) -> Float[Tensor, "batch 3 size size"]:
        if epoch is None:
            decoded = (Image.fromarray(self._decoded[i].numpy()) for i in indices)
            return torch.stack([*map(self.backbone.preprocess, decoded)]).to(self.device)
        return self._pictures.show(indices, [self._view(i, epoch) for i in indices], self.seed)

    @cached_property
    def _decoded(self) -> list[Picture]:
        return stored_pictures(self.split)

    @cached_property
    def _pictures(self) -> Pictures:
        """What training reads, on a GPU if it fits there."""
        return Pictures(self.split, self.backbone.preprocess, self.device)

    def prepare(self) -> None:
        """Decodes what batches of training read; they do it too, if nobody did before.

        Raises:
            DataError: an image cannot be read.
            StorageError: the user's cache folder cannot be used.
        """
        if self.pixels or self._features is None:
            self._pictures  # noqa: B018

    def in_order(self, size: int) -> Iterator[Batch]:
        """Every case once, in order, under the test transform."""
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(start + size, len(self))))

    def epoch(self, epoch: int, size: int) -> list[Tensor]:
        """Index batches of one training epoch, shuffled by the seed and the epoch alone.

        The last incomplete batch is dropped, unless it is the only one.
        """
        order = permutation(len(self), self.seed, "order", epoch)
        full = len(self) // size * size
        return list(order[: full or len(self)].split(size))

    def steps(self, size: int) -> int:
        """Optimiser steps of one epoch."""
        return max(len(self) // size, 1)


class Feed:
    """Batches of training, and how long the device waited for them.

    On a GPU its own clock counts, from the end of what it was given before to the end of making
    the batch, so what the host does meanwhile is free. Nothing is synchronised: between one batch
    and the next but one, a result must have been read from the device.

    Args:
        cases: of training; what they read is decoded here.
    """

    def __init__(self, cases: Cases) -> None:
        self.cases, self.on_gpu = cases, cases.device.startswith("cuda")
        cases.prepare()
        self._waited = 0.0
        self._marks: list[torch.cuda.Event] = []

    def batch(self, indices: Tensor, *, epoch: int) -> Batch:
        """The cases at `indices` as an epoch shows them."""
        began = time.perf_counter()
        self._mark()
        batch = self.cases.batch(indices, epoch=epoch)
        self._mark()
        if not self.on_gpu:
            self._waited += time.perf_counter() - began
        self._fold(keep=4)
        return batch

    def waited(self) -> float:
        """Seconds of all batches so far; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self._fold(keep=0)
        return self._waited

    def _mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)

    def _fold(self, *, keep: int) -> None:
        while len(self._marks) > keep:
            began, ended, *self._marks = self._marks
            self._waited += began.elapsed_time(ended) / 1000
