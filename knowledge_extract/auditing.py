"""An audit: random entries of a cache are computed again with the model it declares.

A digest shows that a file is the one that was sealed; only this shows that what was sealed is what
the model says. Of a cache in which a share `p` of the entries is false, `k` random entries find at
least one with probability `1 - (1 - p)^k`: 30 find one in ten with 0.96. In a 16-bit compute dtype
a near tie between two tokens may fall otherwise; neither that answer nor its states can be compared
then. Such entries are undecided, and an audit in which more than a third are does not pass.
"""

import json
import random
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache.blocks import Entry
from cache.combining.joining import recipes_of
from cache.errors import CacheMismatchError, ModelError
from cache.plain import first_difference
from cache.progress import track
from cache.recipe import validate
from cache.store import Block, KnowledgeCache
from knowledge_extract.answers import AnswerIds
from knowledge_extract.asking import per_question
from knowledge_extract.batches import Batches
from knowledge_extract.engine import Engine
from knowledge_extract.job import Job, prepare
from knowledge_extract.model import load_model
from knowledge_extract.recipe import ExtractRecipe, StatesBlock
from knowledge_extract.settings import RunSettings
from knowledge_extract.tolerance import ANSWERS_MAY_FALL_OTHERWISE, tolerance
from knowledge_extract.units import Piece, Unit

Place = tuple[str, str, int]  # block, class, item
MOST_UNDECIDED = 1 / 3  # 7 of 32 answers changed at most in a 16-bit compute dtype; see `generate`


@dataclass(frozen=True)
class Finding:
    """One entry that was computed again.

    Args:
        block: of the entry.
        class_id: of the entry.
        item: of the entry.
        verdict: `agrees`, `differs`, or `undecided` where the model's answer fell otherwise in a
            compute dtype in which it may.
        difference: largest difference of a row relative to its norm; None for texts.
        allowed: the largest that agrees; None for texts.
    """

    block: str
    class_id: str
    item: int
    verdict: str
    difference: float | None
    allowed: float | None


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Args:
        content_id: of the cache.
        seed: that chose the entries.
        entries: how many the cache holds that this can repeat.
        findings: one for each entry that was computed again.
        left_out: blocks the declared model did not make: texts from elsewhere, embeddings, and
            what another model put into gaps.
    """

    content_id: str
    seed: int
    entries: int
    findings: tuple[Finding, ...]
    left_out: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True if no entry differs, some agree, and no more are undecided than chance explains."""
        verdicts = [one.verdict for one in self.findings]
        few = verdicts.count("undecided") <= MOST_UNDECIDED * len(verdicts)
        return "differs" not in verdicts and "agrees" in verdicts and few

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "passed": self.passed}

    def describe(self) -> str:
        """The report as lines for a terminal."""
        verdicts = [one.verdict for one in self.findings]
        counts = ", ".join(
            f"{verdicts.count(v)} {text}"
            for v, text in (("agrees", "agree"), ("differs", "DIFFER"), ("undecided", "undecided"))
            if v in verdicts
        )
        lines = [f"{len(verdicts)} of {self.entries} entries computed again: {counts}"]
        for one in self.findings:
            if one.verdict == "agrees":
                continue
            note = "another text"
            if one.difference is not None:
                note = f"{one.difference:.3g} of its norm, {one.allowed:.3g} allowed"
            lines.append(
                f"{one.verdict}: block {one.block}, class {one.class_id}, item {one.item}: {note}"
            )
        worst = [one.difference for one in self.findings if one.difference is not None]
        if worst:
            lines.append(f"largest difference of a state: {max(worst):.3g} of its norm")
        if self.left_out:
            lines.append(f"made otherwise, not looked at: {', '.join(self.left_out)}")
        return "\n".join([*lines, f"seed {self.seed}"])


def audit(
    path: Path,
    *,
    k: int = 30,
    model: str | None = None,
    seed: int | None = None,
    allowed: float | None = None,
    run: RunSettings | None = None,
) -> AuditReport:
    """Computes `k` random entries again and compares them with those that are stored.

    Args:
        path: a sealed cache.
        k: entries, drawn without replacement; all of them where there are fewer.
        model: a folder or a GGUF file, for a cache whose model was one; a hub model or an asset is
            found by the name the cache holds.
        seed: that draws the entries; None draws one that nobody knew before.
        allowed: relative difference of a state that agrees; None takes the recorded one.
        run: where to compute; every entry is computed alone whatever its batch size.

    Raises:
        CacheFormatError: not a sound cache.
        CacheMismatchError: not made by `vademecum extract`, or by another model than the one given.
        ModelError: the model is not here.
    """
    run = replace(run or RunSettings(), batch_size=1)
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    with KnowledgeCache.open(path, verify="full") as found:
        own = {name: block for name, block in found.blocks.items() if _by_the_model(block)}
        places = [(n, e.class_id, e.item) for n, block in own.items() for e in block.entries()]
        drawn = sorted(random.Random(seed).sample(places, min(k, len(places))))  # noqa: S311
        if not places:
            what = "nothing in this cache was made by `vademecum extract`, so nothing is repeated"
            raise CacheMismatchError(what, where=path)
        again: dict[Place, Entry] = {}
        sources: dict[str, str] = {}
        for recipe in _recipes(found, model):
            sources |= {n: b.of for n, b in recipe.blocks.items() if isinstance(b, StatesBlock)}
            again |= _again(found, recipe, [p for p in drawn if p not in again], run)
        left = [place for place in drawn if place not in again]
        if left:
            what = "no recipe of this cache says how an entry was made"
            where = f"{path}, block {left[0][0]}, class {left[0][1]}"
            raise CacheMismatchError(what, where=where)
        findings = tuple(_compare(found, place, again, sources, allowed) for place in drawn)
    left_out = tuple(name for name in found.blocks if name not in own)
    return AuditReport(found.content_id, seed, len(places), findings, left_out)


def _by_the_model(block: Block) -> bool:
    """True unless a block, or what its draws are of, was made elsewhere or by another model."""
    filled = block.spec.get("ranked") == "by-probability"
    return not filled and block.spec.get("source") not in {"added", "embedded"}


def _recipes(found: KnowledgeCache, model: str | None) -> Iterator[ExtractRecipe]:
    """The recipes that made a cache, several if it was merged, pointed at their models."""
    stored = found.recipe
    for data in recipes_of(stored):
        if data.get("classes") == [] or set(data) in ({"added"}, {"embedded"}):
            continue  # a slice may leave a part of a merged recipe without classes
        identity = data.get("model")
        if not isinstance(identity, dict) or "source" not in identity:
            what = "this cache was not made by `vademecum extract`, so nothing can be repeated"
            raise CacheMismatchError(what, where=found.path)
        fields = {k: v for k, v in data.items() if k not in {"model", "resolved"}}
        fields["model"] = _model(identity, model)
        fields["blocks"] = _without_gaps(fields.get("blocks"))
        yield validate(ExtractRecipe, fields, where=f"{found.path}, recipe")


def _without_gaps(blocks: Any) -> Any:
    """The blocks of a stored recipe without those another model filled, and their draws."""
    if not isinstance(blocks, dict) or not all(isinstance(b, dict) for b in blocks.values()):
        return blocks
    gaps = {name for name, block in blocks.items() if block.get("by") == "cloze"}
    draws = {n for n, b in blocks.items() if b.get("kind") == "draws" and b.get("of") in gaps}
    return {name: block for name, block in blocks.items() if name not in gaps | draws}


def _model(identity: Mapping[str, Any], given: str | None) -> dict[str, Any]:
    name = identity.get("name")
    if given is not None:
        return {"gguf" if Path(given).is_file() else "folder": given}
    if identity["source"] == "hub":
        return {"hub": name, "revision": identity.get("commit", "main")}
    if identity["source"] == "asset":
        return {"asset": name}
    what = f"the model of this cache was a local {identity['source']} called {name!r}"
    raise ModelError(what, do="Say where it is: --model PATH.")


def _again(
    found: KnowledgeCache, recipe: ExtractRecipe, places: Sequence[Place], run: RunSettings
) -> dict[Place, Entry]:
    """The entries of these places that this recipe makes, computed again, and what they needed."""
    ids = {one.id for one in recipe.classes}
    mine = {p for p in places if p[0] in recipe.blocks and p[1] in ids}
    if not mine:
        return {}
    specs = found.sealed.header.specs
    stored = {specs[n].dtype for n, b in recipe.blocks.items() if b.kind == "states" and n in specs}
    wide = stored == {"f4"} and recipe.store_dtype == "float16"
    job = prepare(recipe, run, wide=wide)
    for name in sorted({place[0] for place in mine}):
        difference = first_difference(job.specs[name].plain(), specs[name].plain())
        if difference is not None:
            place, have, want = difference
            what = f"block {name} was made in another way: {place} differs"
            do = "Name the model it was made with; the same files, not only the same name."
            have, want = repr(have)[:80], repr(want)[:80]
            raise CacheMismatchError(what, where=found.path, found=have, wanted=want, do=do)
    made = {(e.block, e.class_id, e.item): e for e in job.given()}
    computed = {place for place in mine if place not in made}
    made |= _compute(job, computed, run) if computed else {}
    return made


def _compute(job: Job, places: set[Place], run: RunSettings) -> dict[Place, Entry]:
    """Entries by place, each piece alone; answers another model reads are generated first."""
    read = {name: getattr(block, "of", name) for name, block in job.recipe.blocks.items()}
    counts = {name: per_question(block) for name, block in job.recipe.blocks.items()}
    wanted = {(read[b], class_id, item // counts[b]) for b, class_id, item in places}
    made: dict[Place, Entry] = {}
    with tempfile.TemporaryDirectory(prefix="vademecum-") as folder:
        answers = AnswerIds(Path(folder))
        for quantisation, units in _alone(job, wanted, places):
            language = load_model(job.source, quantisation, job.recipe.compute_dtype, job.end, run)
            engine = Engine(job, language, answers, Batches(1))
            with engine, track(f"auditing ({quantisation})", len(units)) as progress:
                for unit in units:
                    entries, _ = engine.entries(unit)
                    made |= {(e.block, e.class_id, e.item): e for e in entries}
                    progress.advance()
    return made


def _alone(
    job: Job, wanted: set[tuple[str, str, int]], places: set[Place]
) -> list[tuple[str, list[Unit]]]:
    """The units of one piece each that give what is wanted, by model load."""

    def of(unit: Unit) -> Iterator[Piece]:
        for piece in unit.pieces:
            source = (unit.task.source, piece.class_id, piece.item)
            fills = any(
                (block, piece.class_id, item) in places
                for block in unit.task.blocks
                for item in job.items(block, piece)
            )
            if source in wanted and (fills or unit.task.kind == "generate"):
                yield piece

    passes = [
        (quantisation, [Unit(unit.task, (piece,)) for unit in units for piece in of(unit)])
        for quantisation, units in job.passes
    ]
    return [(quantisation, units) for quantisation, units in passes if units]


def _compare(
    found: KnowledgeCache,
    place: Place,
    again: Mapping[Place, Entry],
    sources: Mapping[str, str],
    allowed: float | None,
) -> Finding:
    name, class_id, item = place
    block, values = found.blocks[name], again[place].values
    if block.dtype is None:
        same = block.text(class_id, item) == dict(values)
        verdict = "agrees" if same else "undecided" if _may_fall_otherwise(block) else "differs"
        return Finding(*place, verdict, None, None)
    limit = _recorded(found, name) if allowed is None else allowed
    stored, computed = block.array(class_id, item), np.asarray(values["values"])
    difference = float("inf")
    if stored.shape == computed.shape:
        with np.errstate(over="ignore"):
            computed = computed.astype(stored.dtype)  # rounded as the stored one was
        x, y = stored.astype(np.float64), computed.astype(np.float64)
        norms = np.maximum(np.linalg.norm(y, axis=-1), np.finfo(np.float64).tiny)
        difference = float((np.linalg.norm(x - y, axis=-1) / norms).max())
    verdict = "agrees" if difference <= limit else "differs"
    answer = again.get((sources.get(name, ""), class_id, item))
    if verdict == "differs" and answer is not None and _fell_otherwise(found, answer):
        verdict = "undecided"
    return Finding(*place, verdict, difference, limit)


def _may_fall_otherwise(block: Block) -> bool:
    """True for answers in a compute dtype in which near ties between tokens happen."""
    loose = block.spec.get("compute_dtype") in ANSWERS_MAY_FALL_OTHERWISE
    return loose and block.spec.get("source") in {"answers", "generated", "draws"}


def _fell_otherwise(found: KnowledgeCache, again: Entry) -> bool:
    """True if this is an answer that is allowed to be another text today, and is."""
    if again.block not in found.blocks:
        return False
    block = found.blocks[again.block]
    if block.dtype is not None or not _may_fall_otherwise(block):
        return False
    return block.text(again.class_id, again.item) != dict(again.values)


def _recorded(found: KnowledgeCache, name: str) -> float:
    """The tolerance a cache records for a block, never more than this program would record."""
    own = tolerance(found.sealed.header.specs[name]) or 0.0
    text = str(found.provenance.get(f"tolerance.{name}", own))
    try:
        recorded = [float(one) for one in json.loads(text)] if text[:1] == "[" else [float(text)]
    except (ValueError, TypeError):
        recorded = [own]
    return min(own, *recorded)
