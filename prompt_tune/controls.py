"""The controls of knowledge: another class's, random of equal moments, random words."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cache.errors import RecipeError


def derangement(count: int, seed: int) -> tuple[int, ...]:
    """A seeded permutation of `count` classes that leaves none in its place.

    Raises:
        RecipeError: fewer than two classes have no derangement.
    """
    if count < 2:
        what = "knowledge cannot be shuffled between fewer than two classes"
        raise RecipeError(what, where="knowledge.control", found=f"{count} classes")
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(count)
        if not (order == np.arange(count)).any():
            return tuple(int(i) for i in order)


def gaussian_like(
    rows: Sequence[Float[Tensor, "rows width"]], seed: int
) -> list[Float[Tensor, "rows width"]]:
    """Gaussian rows with each row's own mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(r.shape, generator=generator) * r.std(1, keepdim=True, correction=0)
        + r.mean(1, keepdim=True)
        for r in rows
    ]


def resampled_words(phrases: tuple[tuple[str, ...], ...], seed: int) -> tuple[tuple[str, ...], ...]:
    """Phrases of as many words each, every word drawn from those of all classes."""
    words = [w for own in phrases for phrase in own for w in phrase.split()]
    random = np.random.default_rng(seed)
    return tuple(
        tuple(" ".join(random.choice(words, len(phrase.split()))) for phrase in own)
        for own in phrases
    )
