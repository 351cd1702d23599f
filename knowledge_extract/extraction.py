"""Stage one in a straight line: resolve, look what is there, compute what is missing, seal."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cache.devices import check_device
from cache.durable import sweep, write_json_atomic
from cache.errors import CacheMismatchError, StorageError, VademecumError
from cache.plain import first_difference
from cache.progress import track
from cache.recipe import canonical_json
from cache.sealing import seal
from cache.shards import ShardFolder
from cache.store import KnowledgeCache
from knowledge_extract.answers import AnswerIds
from knowledge_extract.cloze import Filler
from knowledge_extract.crew import Crew, Workplace
from knowledge_extract.engine import Fp16OverflowError
from knowledge_extract.job import Job, prepare
from knowledge_extract.processes import crew_for
from knowledge_extract.recipe import ExtractRecipe
from knowledge_extract.settings import RunSettings
from knowledge_extract.sidecar import versions
from knowledge_extract.source import ModelSource
from knowledge_extract.todo import missing
from knowledge_extract.units import Unit

KEPT_AT_ONCE = 64  # entries of a replaced cache in one shard


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction left.

    Args:
        content_id: of the sealed cache.
        path: of the sealed cache.
        computed: entries computed by this call.
        reused: entries that were there before.
        notes: what the user should know, one line each.
    """

    content_id: str
    path: Path
    computed: int
    reused: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {**asdict(self), "path": str(self.path), "notes": list(self.notes)}

    def describe(self) -> str:
        """The result in a few lines."""
        counts = f"{self.computed} entries computed, {self.reused} were there"
        return "\n".join([f"{self.path}  {self.content_id}", counts, *self.notes])


def parts_folder(out: Path, *, wide: bool = False) -> Path:
    """The working folder beside a target; `wide` once float16 turned out too small."""
    return out.with_name(out.name + (".float32.parts" if wide else ".parts"))


def extract(
    recipe: ExtractRecipe, out: Path, run: RunSettings | None = None, *, overwrite: bool = False
) -> ExtractResult:
    """Computes what a recipe asks for and seals it as `out`.

    What was committed survives any interruption and is not computed again. When everything is
    there, no model is loaded.

    Args:
        recipe: validated.
        out: the file to make.
        run: where and how fast.
        overwrite: replace a sealed cache of another recipe; its readers keep the old file.

    Raises:
        CacheMismatchError: `out`, or the work beside it, belongs to another recipe.
        ModelError: the model cannot be found or loaded.
        ValueRefusedError: a value that is not finite, or too large for its type.
        SystemRefusedError: no memory, no space, or a package is not installed.
    """
    return extract_many([(recipe, out)], run, overwrite=overwrite)[0]


def extract_many(
    wanted: Sequence[tuple[ExtractRecipe, Path]],
    run: RunSettings | None = None,
    *,
    overwrite: bool = False,
) -> list[ExtractResult]:
    """Several extractions; those that read one model in one way share one load of it.

    Each file has a folder of work of its own and is sealed as soon as it is complete. Every recipe
    is checked before a model is loaded.

    Args:
        wanted: recipes and the files to make.
        run: where and how fast.
        overwrite: replace sealed caches of other recipes.

    Raises:
        StorageError: two recipes for one file.
        VademecumError: see `extract`; files that are sealed stay.
    """
    run = run or RunSettings()
    check_device(run.device)
    if run.threads:
        torch.set_num_threads(run.threads)
    files = [out.absolute() for _, out in wanted]
    if twice := next((file for file in files if files.count(file) > 1), None):
        what = "two recipes would make this file"
        raise StorageError(what, where=twice, do="Give one of them another name.")
    sources: dict[str, ModelSource] = {}
    works = []
    for recipe, out in wanted:
        model, wide = recipe.model.model_dump_json(), parts_folder(out, wide=True).is_dir()
        job = prepare(recipe, run, wide=wide, source=sources.get(model))
        sources[model] = job.source
        works.append(_Extraction(job, out, run, overwrite=overwrite))
    crew = crew_for(run)
    try:
        while left := [work for work in works if work.result is None]:
            work = next((work for work in left if work.next_is_held(crew)), left[0])
            try:
                work.step(crew)
            except VademecumError:
                if not work.sealed_by_another():
                    raise
    finally:
        crew.close()
    return [work.result for work in works if work.result is not None]


def finished(job: Job, out: Path, *, overwrite: bool) -> ExtractResult | None:
    """The result if `out` is already sealed, verified in full, else None.

    Raises:
        CacheMismatchError: `out` belongs to another recipe and may not be replaced.
        CacheFormatError: `out` is something else, or damaged.
    """
    if not out.exists():
        return None
    sweep(out.absolute().parent)  # the draft of a job that died when the file had its name
    wanted = json.loads(canonical_json(job.resolved()))
    with KnowledgeCache.open(out, verify="full") as sealed:
        if (difference := first_difference(sealed.recipe, wanted)) is not None:
            if overwrite:
                return None
            place, there, here = difference
            what = f"this cache was made by another recipe: {place} differs"
            do = "Choose another --out, or pass --overwrite: it keeps the entries that stay."
            there, here = repr(there)[:80], repr(here)[:80]
            raise CacheMismatchError(what, where=out, found=there, wanted=here, do=do)
        entries = sum(b.items(c.id) for b in sealed.blocks.values() for c in sealed.classes)
        note = "everything was there; no model was loaded"
        return ExtractResult(sealed.content_id, out, 0, entries, (note,))


class _Extraction:
    """One recipe on its way to one file."""

    def __init__(self, job: Job, out: Path, run: RunSettings, *, overwrite: bool) -> None:
        self.out, self.run, self.overwrite = out, run, overwrite
        self.started = time.time()
        self.result = finished(job, out, overwrite=overwrite)
        self.todo: list[tuple[str, list[Unit]]] = []
        if self.result is None:
            self._open(job, wide=parts_folder(out, wide=True).is_dir())

    def _open(self, job: Job, *, wide: bool) -> None:
        """Looks what is there and what is missing."""
        self.place = Workplace(job, parts_folder(self.out, wide=wide), wide=wide)
        if wide:
            _drop_narrow(parts_folder(self.out), job)
        self.limit, self.halved, self.computed = self.run.batch_size, 0, 0
        self.loads: list[dict[str, Any]] = []
        self._keep_sealed()
        present = set(self.place.shards.present())
        self.before = len(present)
        self._given(present)
        self._fill(present)
        self.todo = missing(job, present, self.place.answers)

    def next_is_held(self, crew: Crew) -> bool:
        """True if the next step needs no model that is not loaded."""
        return not self.todo or crew.holds(self.place.job, self.todo[0][0])

    def step(self, crew: Crew) -> None:
        """One pass over a model; after the last one the file is sealed."""
        if self.todo:
            try:
                self._pass(crew, *self.todo[0])
            except Fp16OverflowError:
                job = self.place.job
                self._open(prepare(job.recipe, self.run, wide=True, source=job.source), wide=True)
            else:
                del self.todo[0]
        if not self.todo:
            self._seal()

    def sealed_by_another(self) -> bool:
        """True if another job sealed the same work, and removed the shards under this one."""
        if self.out.exists():
            self.result = finished(self.place.job, self.out, overwrite=True)
        return self.result is not None

    def _keep_sealed(self) -> None:
        """Commits what the cache that is about to be replaced holds of this recipe."""
        if not self.out.exists():
            return
        job, shards = self.place.job, self.place.shards
        wanted = job.all_keys() - shards.present()
        with KnowledgeCache.open(self.out, verify="full") as sealed:
            for name, block in sealed.blocks.items():
                spec = sealed.sealed.header.specs[name].plain()
                homes = [n for n, own in job.specs.items() if own.plain() == spec]
                rows = zip(block.keys(), block.entries(), strict=True)
                kept = [replace(e, block=homes[0]) for key, e in rows if homes and key in wanted]
                for start in range(0, len(kept), KEPT_AT_ONCE):
                    part = kept[start : start + KEPT_AT_ONCE]
                    shards.commit(part, batch_shape=(len(part),))

    def _given(self, present: set[str]) -> None:
        entries = list(self.place.job.given())
        keys = [self.place.job.entry_key(entry) for entry in entries]
        new = [e for e, key in zip(entries, keys, strict=True) if key not in present]
        if new:
            self.place.shards.commit(new, batch_shape=(len(new),))
            self.computed += len(new)

    def _fill(self, present: set[str]) -> None:
        """Commits what fill-mask models put into gaps, one attribute of one class at a time."""
        job = self.place.job
        for name, source in job.fillers.items():
            left = [gap for gap in job.gaps(name) if not present.issuperset(gap.keys(job.specs))]
            if not left:
                continue
            filler = Filler(source, self.run)
            for gap in left:
                entries = filler.entries(gap)
                self.place.shards.commit(entries, batch_shape=(1,))
                self.computed += len(entries)

    def _pass(self, crew: Crew, quantisation: str, units: list[Unit]) -> None:
        """Works through the units of one model."""
        started = time.time()
        label = f"extracting ({quantisation})" if quantisation != "none" else "extracting"
        with track(label, sum(len(u.pieces) for u in units)) as progress:
            for done in crew.work(self.place, quantisation, units, self.limit):
                self.computed += done.entries
                self.limit, self.halved = min(self.limit, done.limit), self.halved + done.halved
                note = f"({self.limit} at a time)" if self.halved else ""
                progress.advance(done.pieces, note)
        self.loads.append(
            {
                "quantisation": quantisation,
                "devices": list(crew.devices),
                "load_seconds": round(crew.load_seconds, 3),
                "seconds": round(time.time() - started, 3),
                "units": len(units),
            }
        )

    def _seal(self) -> None:
        """Seals the file and writes the sidecar."""
        self.place.answers.remove()  # nothing is missing any more, so nobody reads them again
        expected = self.place.job.all_keys()
        content_id = seal(self.place.shards, self.out, expected=expected, replace=self.overwrite)
        counts = (self.computed, self.before)
        self.result = ExtractResult(content_id, self.out, *counts, self._notes())
        self._write_sidecar(self.result)

    def _notes(self) -> tuple[str, ...]:
        notes = [] if self.loads else ["everything was there; no model was loaded"]
        notes += self.place.shards.damaged
        if self.place.wide:
            notes.append("values too large for float16: every states block is stored as float32")
        if self.halved:
            notes.append(f"out of memory: went on with batches of {self.limit}")
        return tuple(notes)

    def _write_sidecar(self, result: ExtractResult) -> None:
        settings = {k: v for k, v in asdict(self.run).items() if k != "models"}
        record = {
            "content_id": result.content_id,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 3),
            "computed": result.computed,
            "reused": result.reused,
            "settings": settings,
            "threads": torch.get_num_threads(),
            "smallest_batch": self.limit,
            "halved": self.halved,
            "passes": self.loads,
            "versions": versions(),
        }
        write_json_atomic(self.out.with_name(self.out.name + ".run.json"), record)


def _drop_narrow(folder: Path, job: Job) -> None:
    """Removes the float16 work that float32 work takes the place of."""
    if folder.is_dir():
        AnswerIds(folder).remove()
        narrow = prepare(job.recipe, RunSettings(), source=job.source).header
        ShardFolder(folder, header=narrow).clear()
