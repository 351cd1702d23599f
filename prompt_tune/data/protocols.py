"""Protocols that several papers share, each written down once.

**Few-shot**: `prompt_tune.data.few_shot`, K of every class.

**Base-to-novel** (Zhou et al., "Conditional Prompt Learning for Vision-Language Models", CVPR 2022;
for medical images BiomedCoOp, CVPR 2025): classes in label order, the first ceil(C / 2) are base,
the rest novel. A method is tuned on the base classes, and one checkpoint is evaluated twice, on the
test images of the base classes among base classes alone, and likewise for the novel ones. Published
code draws the K shots of every class first and drops the novel classes afterwards. Here the shots
of a class depend on the seed and that class's images alone, so both orders give the same images.

**Cross-dataset transfer**: a checkpoint is evaluated on another data set with that set's classes;
see `prompt_tune.transfer`.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from cache.errors import DataError


class BaseNovel(NamedTuple):
    """Class ids of the two halves, each in label order."""

    base: tuple[str, ...]
    novel: tuple[str, ...]


def base_to_novel(class_ids: Sequence[str]) -> BaseNovel:
    """The first ceil(C / 2) classes and the rest: what a recipe's `classes` has, and what it lacks.

    Args:
        class_ids: of the whole data set, in label order.

    Raises:
        DataError: fewer than four classes, so that one half would have nothing to tell apart.
    """
    if len(class_ids) < 4:
        what = "base-to-novel needs two classes on either side"
        raise DataError(what, found=f"{len(class_ids)} classes", wanted="at least 4")
    half = -(-len(class_ids) // 2)
    return BaseNovel(tuple(class_ids[:half]), tuple(class_ids[half:]))


def harmonic_mean(base: float, novel: float) -> float:
    """`2 b n / (b + n)` of the accuracies of one checkpoint; 0 where both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def mean_harmonic(pairs: Sequence[tuple[float, float]]) -> float:
    """The mean over seeds, and likewise over data sets, of each one's harmonic mean.

    Args:
        pairs: (base, novel) accuracy of each.

    Differs: published tables print the arithmetic mean of the two averages, or the harmonic mean of
    the averages, under the same heading; neither is this number.
    """
    return fmean(harmonic_mean(base, novel) for base, novel in pairs)
