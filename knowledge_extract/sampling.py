"""Seeded sampling in which no row of a batch can change another."""

import random
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from cache.recipe import digest_of

REVISION = 1  # of the draw; part of every key
NUCLEUS = 1024  # most likely tokens that are looked at before all are


def draw_seed(seed: int, class_id: str, item: int, attempt: int) -> int:
    """The seed of one answer: 64 bits of a digest of what it is for."""
    place = {"seed": seed, "class": class_id, "item": item, "attempt": attempt}
    return int(digest_of(place)[:16], 16)


class Sampler:
    r"""Chooses the next token of every row, each with random numbers of its own.

    Nucleus sampling (Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020):
    $p = \mathrm{softmax}(z/T)$ in float64; of the tokens in falling order of $p$ the shortest
    beginning whose sum reaches `top_p` is kept; the token is the first whose running sum exceeds
    $u$ times that of all kept ones, $u$ uniform on [0, 1). $u$ comes from Python's Mersenne
    Twister, whose numbers are the same in every version.

    What a row gets depends on other rows only through the rounding of its logits: a draw that falls
    within it of the border between two tokens can fall otherwise.

    Args:
        seeds: one for each row of the batch.
        temperature: T.
        top_p: the share of the probability that is kept.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self._random = [random.Random(seed) for seed in seeds]  # noqa: S311 - no secret
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, logits: Float[Tensor, "rows tokens"], numbers: Sequence[int]) -> list[int]:
        """The next token of the rows of these numbers."""
        chances = (logits.double() / self._temperature).softmax(dim=-1).cpu()
        return [self._one(p, self._random[n]) for p, n in zip(chances, numbers, strict=True)]

    def _one(self, chances: Tensor, source: random.Random) -> int:
        best, tokens = chances.topk(min(NUCLEUS, len(chances)))
        sums = best.cumsum(dim=0)
        if sums[-1] < self._top_p:
            best, tokens = chances.sort(descending=True, stable=True)
            sums = best.cumsum(dim=0)
        inside = min(int((sums < self._top_p).sum()) + 1, len(sums))
        target = source.random() * float(sums[inside - 1])
        at = int((sums[:inside] <= target).sum())
        return int(tokens[min(at, inside - 1)])
