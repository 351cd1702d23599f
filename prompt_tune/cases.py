"""Batches of one split, from cached image features or from pixels.

Pixels of training come from decoded pictures, which are kept, and on a GPU all at once; those of
evaluation from the image files by open_clip's transform. A picture gives the same bits either way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prompt_tune.augment import Pictures, on_device
from prompt_tune.backbone import Backbone
from prompt_tune.data.source import ImageSplit
from prompt_tune.features import FeatureStore, image_features, store_of
from prompt_tune.method import Batch
from prompt_tune.seeds import derive_seed, permutation

Views = int | Literal["live"]


class Cases:
    """One split as a method reads it.

    With enumerated views, image `i` shows view `h(seed, epoch, i) mod views` in an epoch, where
    view 0 is the test transform; `live` draws a new augmentation for every image and epoch.

    Args:
        split: the images.
        backbone: its image tower encodes, its preprocessing transforms.
        pixels: give pixels to the method; otherwise cached features where views are enumerated.
        views: number of enumerated views, or `live`.
        seed: of the run.
        device: where batches go.
        open_store: see `image_features`.
    """

    def __init__(
        self,
        split: ImageSplit,
        backbone: Backbone,
        *,
        pixels: bool,
        views: Views = 1,
        seed: int = 0,
        device: str = "cpu",
        open_store: Callable[[Backbone, int, int], FeatureStore] = store_of,
    ) -> None:
        self.split, self.backbone, self.pixels = split, backbone, pixels
        self.views, self.seed, self.device = views, seed, device
        self.labels = torch.from_numpy(split.labels).long()
        self._features: Tensor | None = None
        if not pixels and views != "live":
            self._features = image_features(
                backbone, split, views=views, seed=seed, open_store=open_store
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
        if self._features is not None:
            views = torch.tensor([self._view(i, epoch) for i in indices.tolist()])
            return Batch(
                labels=labels, features=on_device(self._features[indices, views], self.device)
            )
        pixels = self._pixels(indices.tolist(), epoch)
        if self.pixels:
            return Batch(labels=labels, images=pixels)
        with torch.no_grad():
            return Batch(labels=labels, features=self.backbone.image.encode(pixels))

    def _pixels(
        self, indices: Sequence[int], epoch: int | None
    ) -> Float[Tensor, "batch 3 size size"]:
        if epoch is None:
            images = [self.backbone.preprocess(self.split.image(i)) for i in indices]
            return torch.stack(images).to(self.device)
        return self._pictures.show(indices, [self._view(i, epoch) for i in indices], self.seed)

    @cached_property
    def _pictures(self) -> Pictures:
        """Opened by the first batch of training: what is read once is not kept."""
        return Pictures(self.split, self.backbone.preprocess, self.device)

    def prepare(self) -> None:
        """Decodes what batches of training read; they do it too, if nobody did before.

        Raises:
            DataError: an image cannot be read.
            StorageError: the user's cache folder cannot be used.
        """
        if self._features is None:
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
