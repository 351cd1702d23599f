"""How far the arrays of two caches are apart, layer by layer, summed up entry by entry."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LayerDifference:
    """How far one layer of a block is apart, over all entries that both caches have.

    Attributes:
        layer: decoder layer; None for kinds without layers.
        max_abs: the largest difference of a component.
        mean_abs: the mean difference.
        cosine_mean: mean cosine of the rows.
        cosine_min: the smallest.
        largest: the largest magnitude in either cache, to compare `max_abs` with.
    """

    layer: int | None
    max_abs: float
    mean_abs: float
    cosine_mean: float
    cosine_min: float
    largest: float


class LayerSums:
    """What is needed of one layer to say how far apart it is."""

    def __init__(self, layer: int | None) -> None:
        self.layer = layer
        self.rows = self.components = 0
        self.largest = self.max_abs = self.total = self.cosines = 0.0
        self.cosine_min = 1.0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Takes note of the rows of one entry."""
        apart = np.abs(x - y)
        lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        both_zero = ~x.any(axis=-1) & ~y.any(axis=-1)
        cosines = np.where(both_zero, 1.0, (x * y).sum(-1) / np.where(lengths > 0, lengths, 1.0))
        self.rows += len(x)
        self.components += x.size
        self.largest = max(self.largest, float(np.abs(x).max()), float(np.abs(y).max()))
        self.max_abs = max(self.max_abs, float(apart.max()))
        self.total += float(apart.sum())
        self.cosines += float(cosines.sum())
        self.cosine_min = min(self.cosine_min, float(cosines.min()))

    def result(self) -> LayerDifference:
        """The numbers over all entries."""
        return LayerDifference(
            layer=self.layer,
            max_abs=self.max_abs,
            mean_abs=self.total / self.components,
            cosine_mean=self.cosines / self.rows,
            cosine_min=self.cosine_min,
            largest=self.largest,
        )
