"""Out of memory halves the batch and goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from cache.errors import SystemRefusedError

P = TypeVar("P")
R = TypeVar("R")
CPU_REFUSALS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error means that a smaller batch may work."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(r in str(error) for r in CPU_REFUSALS)


@dataclass
class Batches:
    """Runs work in pieces that fit, and remembers how many did.

    Args:
        limit: rows at once; falls by halves, never rises again within a run.
        halved: how often it fell.
    """

    limit: int
    halved: int = 0

    def run(
        self, rows: Sequence[P], work: Callable[[Sequence[P]], Sequence[R]], most: int | None = None
    ) -> tuple[list[R], int]:
        """The results of `work` over all rows, in order, and the rows of the largest batch.

        Args:
            rows: what `work` takes a part of at a time.
            work: gives one result per row.
            most: a bound for these rows only.

        Raises:
            SystemRefusedError: one row alone does not fit.
        """
        results: list[R] = []
        largest = 0
        while len(results) < len(rows):
            step = min(self.limit, most or self.limit)
            part = rows[len(results) : len(results) + step]
            try:
                done = work(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(part), error)
            else:
                results += done
                largest = max(largest, len(part))
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # outside the handler, which keeps the frames alive
        return results, largest

    def _halve(self, rows: int, error: BaseException) -> None:
        if rows == 1:
            what = "out of memory with a batch of one"
            do = "Use quantisation nf4, shorter texts or fewer new tokens; what was done is kept."
            raise SystemRefusedError(what, do=do) from error
        self.limit = (rows + 1) // 2
        self.halved += 1
