"""Progress of long work: a bar with ETA on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0  # seconds between plain lines


def say(line: str) -> None:
    """Shows one line on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(line)


class Track:
    """One running piece of work; `advance` after each unit."""

    def __init__(self, label: str, total: int, bar: Progress | None, before: int = 0) -> None:
        self.label, self.total, self.done, self._before = label, total, before, before
        self._bar, self._started, self._said = bar, time.monotonic(), time.monotonic()
        self._task = bar.add_task(label, total=total, completed=before) if bar else None

    def advance(self, by: int = 1, note: str = "") -> None:
        """`by` more units are done; `note` is shown beside the label."""
        self.done += by
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=by, description=f"{self.label} {note}".strip())
            return
        now = time.monotonic()
        if self.done >= self.total or now - self._said >= PLAIN_EVERY:
            self._said = now
            left = (
                (now - self._started)
                / max(self.done - self._before, 1)
                * max(self.total - self.done, 0)
            )
            tail = f", about {left:.0f} s left" if left >= 1 else ""
            line = f"{self.label}: {self.done}/{self.total} {note}".rstrip() + tail
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - the plain form of a bar


@contextmanager
def track(label: str, total: int, before: int = 0) -> Iterator[Track]:
    """Shows the progress of `total` units on standard error.

    Args:
        label: what is being done.
        total: units in all.
        before: units that an earlier run did; they do not count for the time that is left.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Track(label, total, None, before)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        yield Track(label, total, bar, before)
