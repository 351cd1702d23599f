"""Who computes the units of a pass: this process, or several.

A crew remembers the model it loaded last, so that jobs of one model, quantisation and compute dtype
share one load.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import torch

from cache.shards import ShardFolder
from knowledge_extract.answers import AnswerIds
from knowledge_extract.batches import Batches
from knowledge_extract.engine import Engine
from knowledge_extract.job import Job
from knowledge_extract.model import LanguageModel, load_model
from knowledge_extract.settings import RunSettings
from knowledge_extract.units import Unit


class Workplace:
    """A job and the folder in which its work is kept; any number of processes may open it.

    Args:
        job: what is to be done.
        folder: of the shards.
        wide: whether every states block of the job is float32 by force.
    """

    def __init__(self, job: Job, folder: Path, *, wide: bool) -> None:
        self.job, self.folder, self.wide = job, folder, wide
        self.shards = ShardFolder(folder, header=job.header)
        self.answers = AnswerIds(folder)


@dataclass(frozen=True)
class Done:
    """A unit that was computed and committed.

    Args:
        entries: that it yielded.
        pieces: texts that were read.
        limit: rows that fit at once.
        halved: how often memory ran out.
    """

    entries: int
    pieces: int
    limit: int
    halved: int


class Crew(Protocol):
    """Computes and commits units."""

    devices: list[str]
    load_seconds: float

    def holds(self, job: Job, quantisation: str) -> bool:
        """True if the model is loaded already."""

    def work(
        self, place: Workplace, quantisation: str, units: Sequence[Unit], limit: int
    ) -> Iterator[Done]:
        """Computes and commits units, `limit` rows at once.

        Raises:
            VademecumError: see `extract`; what was committed stays.
            Fp16OverflowError: a value that only float32 holds.
        """

    def close(self) -> None:
        """Lets go of models and processes."""


class OneProcess:
    """This process.

    Args:
        run: where to compute.
    """

    def __init__(self, run: RunSettings) -> None:
        self.devices: list[str] = []
        self.load_seconds = 0.0
        self._run = run
        self._held: tuple[str, str, str] | None = None
        self._language: LanguageModel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def holds(self, job: Job, quantisation: str) -> bool:
        """True if the model is loaded already."""
        return self._held == model_key(job, quantisation)

    def work(
        self, place: Workplace, quantisation: str, units: Sequence[Unit], limit: int
    ) -> Iterator[Done]:
        """Computes and commits units; see `Crew`."""
        batches = Batches(limit)
        language = self._model(place.job, quantisation)
        with Engine(place.job, language, place.answers, batches) as engine:
            for unit in units:
                before = batches.halved
                entries, shape = engine.entries(unit)
                place.shards.commit(entries, batch_shape=shape)
                fell = batches.halved - before
                yield Done(len(entries), len(unit.pieces), batches.limit, fell)

    def close(self) -> None:
        """Frees the model."""
        if self._language is not None:
            self._held = self._language = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _model(self, job: Job, quantisation: str) -> LanguageModel:
        """The model; loaded, after the last one was freed, if it is another."""
        self.load_seconds = 0.0
        if self._language is None or not self.holds(job, quantisation):
            self.close()
            started = time.time()
            dtype = job.recipe.compute_dtype
            self._language = load_model(job.source, quantisation, dtype, job.end, self._run)
            self._held = model_key(job, quantisation)
            self.load_seconds = time.time() - started
        self.devices = [str(self._language.device)]
        return replace(self._language, pad=job.end)


def model_key(job: Job, quantisation: str) -> tuple[str, str, str]:
    """What two jobs must agree in to share a loaded model."""
    return job.source.model_digest, quantisation, job.recipe.compute_dtype
