"""Batches of one split, from cached image features or from pixels."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

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
        labels = self.labels[indices].to(self.device)
        views = [self._view(int(i), epoch) for i in indices]
        if self._features is not None:
            features = self._features[indices, torch.tensor(views)]
            return Batch(labels=labels, features=features.to(self.device))
        pixels = torch.stack(
            [
                self.backbone.preprocess.view(
                    self.split.image(i), view, self.seed, self.split.digests[i]
                )
                for i, view in zip(indices.tolist(), views, strict=True)
            ]
        ).to(self.device)
        if self.pixels:
            return Batch(labels=labels, images=pixels)
        with torch.no_grad():
            return Batch(labels=labels, features=self.backbone.image.encode(pixels))

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
