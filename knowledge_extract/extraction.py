"""Stage one in a straight line: resolve, look what is there, compute what is missing, seal."""

import gc
import json
import time
from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cache.durable import write_json_atomic
from cache.errors import CacheMismatchError, StorageError
from cache.plain import first_difference
from cache.progress import Track, track
from cache.recipe import canonical_json
from cache.sealing import seal
from cache.shards import ShardFolder
from cache.store import KnowledgeCache
from knowledge_extract.answers import AnswerIds
from knowledge_extract.batches import Batches
from knowledge_extract.engine import Engine, Fp16OverflowError
from knowledge_extract.job import Job, prepare
from knowledge_extract.model import load_model
from knowledge_extract.recipe import ExtractRecipe
from knowledge_extract.settings import RunSettings
from knowledge_extract.sidecar import versions
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
    run = run or RunSettings()
    wide = parts_folder(out, wide=True).is_dir()
    job = prepare(recipe, run, wide=wide)
    if (done := finished(job, out, overwrite=overwrite)) is not None:
        return done
    if not out.absolute().parent.is_dir():
        what = "no such folder"
        raise StorageError(what, where=out.absolute().parent, do="Create it first.")
    if run.threads:
        torch.set_num_threads(run.threads)
    try:
        return _Extraction(job, out, run, wide=wide).finish(replace=overwrite)
    except Fp16OverflowError:
        job = prepare(recipe, run, wide=True)
        return _Extraction(job, out, run, wide=True).finish(replace=overwrite)
    except StorageError:
        # Another job may have sealed the same work and removed the folder under this one.
        if parts_folder(out, wide=wide).exists() or not out.exists():
            raise
        if (done := finished(job, out, overwrite=True)) is None:
            raise
        return done


def finished(job: Job, out: Path, *, overwrite: bool) -> ExtractResult | None:
    """The result if `out` is already sealed, verified in full, else None.

    Raises:
        CacheMismatchError: `out` belongs to another recipe and may not be replaced.
        CacheFormatError: `out` is something else, or damaged.
    """
    if not out.exists():
        return None
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
    """One run towards one target."""

    def __init__(self, job: Job, out: Path, run: RunSettings, *, wide: bool) -> None:
        self.job, self.out, self.run, self.wide = job, out, run, wide
        self.folder = parts_folder(out, wide=wide)
        self.shards = ShardFolder(self.folder, header=job.header)
        if wide:
            _drop_narrow(parts_folder(out), job)
        self.answers = AnswerIds(self.folder)
        self.batches = Batches(run.batch_size)
        self.computed = 0
        self.loads: list[dict[str, Any]] = []

    def finish(self, *, replace: bool) -> ExtractResult:
        """Computes what is missing, seals, and writes the sidecar."""
        started = time.time()
        self._keep_sealed()
        present = set(self.shards.present())
        before = len(present)
        self._given(present)
        for quantisation, units in missing(self.job, present, self.answers):
            self._pass(quantisation, units)
        self.answers.remove()  # nothing is missing any more, so nobody reads them again
        expected = self.job.all_keys()
        content_id = seal(self.shards, self.out, expected=expected, replace=replace)
        notes = self._notes()
        self._write_sidecar(started, content_id, before)
        return ExtractResult(content_id, self.out, self.computed, before, notes)

    def _keep_sealed(self) -> None:
        """Commits what the cache that is about to be replaced holds of this recipe."""
        if not self.out.exists():
            return
        wanted = self.job.all_keys() - self.shards.present()
        with KnowledgeCache.open(self.out, verify="full") as sealed:
            for name, block in sealed.blocks.items():
                spec = sealed.sealed.header.specs[name].plain()
                homes = [n for n, own in self.job.specs.items() if own.plain() == spec]
                rows = zip(block.keys(), block.entries(), strict=True)
                kept = [replace(e, block=homes[0]) for key, e in rows if homes and key in wanted]
                for start in range(0, len(kept), KEPT_AT_ONCE):
                    part = kept[start : start + KEPT_AT_ONCE]
                    self.shards.commit(part, batch_shape=(len(part),))

    def _given(self, present: set[str]) -> None:
        entries = list(self.job.given())
        keys = [self.job.entry_key(entry) for entry in entries]
        new = [e for e, key in zip(entries, keys, strict=True) if key not in present]
        if new:
            self.shards.commit(new, batch_shape=(len(new),))
            self.computed += len(new)

    def _pass(self, quantisation: str, units: list[Unit]) -> None:
        """Loads the model once and works through its units."""
        recipe, started = self.job.recipe, time.time()
        language = load_model(
            self.job.source, quantisation, recipe.compute_dtype, self.job.end, self.run
        )
        loaded = time.time() - started
        label = f"extracting ({quantisation})" if quantisation != "none" else "extracting"
        engine = Engine(self.job, language, self.answers, self.batches)
        with engine, track(label, sum(len(u.pieces) for u in units)) as progress:
            for unit in units:
                self._unit(engine, unit, progress)
        device = str(language.device)
        self.loads.append(
            {
                "quantisation": quantisation,
                "device": device,
                "load_seconds": round(loaded, 3),
                "seconds": round(time.time() - started, 3),
                "units": len(units),
            }
        )
        del engine, language
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _unit(self, engine: Engine, unit: Unit, progress: Track) -> None:
        entries, shape = engine.entries(unit)
        self.shards.commit(entries, batch_shape=shape)
        self.computed += len(entries)
        note = f"({self.batches.limit} at a time)" if self.batches.halved else ""
        progress.advance(len(unit.pieces), note)

    def _notes(self) -> tuple[str, ...]:
        notes = [] if self.loads else ["everything was there; no model was loaded"]
        notes += self.shards.damaged
        if self.wide:
            notes.append("values too large for float16: every states block is stored as float32")
        if self.batches.halved:
            notes.append(f"out of memory: went on with batches of {self.batches.limit}")
        return tuple(notes)

    def _write_sidecar(self, started: float, content_id: str, reused: int) -> None:
        settings = {k: v for k, v in asdict(self.run).items() if k != "models"}
        record = {
            "content_id": content_id,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 3),
            "computed": self.computed,
            "reused": reused,
            "settings": settings,
            "threads": torch.get_num_threads(),
            "smallest_batch": self.batches.limit,
            "halved": self.batches.halved,
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


def missing(job: Job, present: Set[str], answers: AnswerIds) -> list[tuple[str, list[Unit]]]:
    """The units to compute, by model load.

    A unit whose answers are committed but whose token ids are lost is done again before another
    model can read them.
    """
    lost = {
        (unit.task.source, unit.pieces)
        for _, units in job.passes
        for unit in units
        if unit.task.kind == "reread"
        and not job.keys(unit) <= present
        and any(job.key(unit.task.source, piece) not in answers for piece in unit.pieces)
    }
    todo = []
    for quantisation, units in job.passes:
        wanted = [
            unit
            for unit in units
            if not job.keys(unit) <= present
            or (unit.task.kind == "generate" and (unit.task.source, unit.pieces) in lost)
        ]
        if wanted:
            todo.append((quantisation, wanted))
    return todo
