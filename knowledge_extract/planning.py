"""What an extraction will cost, said before a weight is loaded."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.blocks import BlockSpec
from cache.shards import ShardFolder
from knowledge_extract.answers import AnswerIds
from knowledge_extract.extraction import finished, parts_folder
from knowledge_extract.job import Job, prepare
from knowledge_extract.memory import peak_bytes
from knowledge_extract.model import pick_device
from knowledge_extract.recipe import ExtractRecipe, StatesBlock, room_for_answer
from knowledge_extract.settings import RunSettings
from knowledge_extract.todo import missing
from knowledge_extract.units import Piece, Unit

TEXT_BYTES_PER_TOKEN = 5  # English, generously; texts are small beside states
ENTRY_BYTES = 112  # three digests and two integers in the tables


@dataclass(frozen=True)
class Step:
    """One task of the plan.

    Args:
        quantisation: of the model that does it.
        task: `generate`, `reread`, `read` or `sample`.
        source: what is read.
        units: work units, and how many of them are still to do.
        tokens: read and generated at most, by the units to do; refused answers not counted.
    """

    quantisation: str
    task: str
    source: str
    units: int
    to_do: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Args:
        steps: in the order they are done; one model load per run of equal quantisations.
        entries: of the finished cache.
        cached: entries that are there already.
        size: bytes of the finished cache, answers taken as long as allowed.
        memory: predicted peak bytes by quantisation, for those that will be loaded.
        sealed: the cache is finished.
    """

    steps: tuple[Step, ...]
    entries: int
    cached: int
    size: int
    memory: dict[str, int]
    sealed: bool

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self)

    def describe(self) -> str:
        """The plan as a table of text."""
        if self.sealed:
            return f"finished: all {self.cached} entries are there, no model will be loaded"
        lines = [f"{'model':<6} {'task':<9} {'of':<14} {'units':>6} {'to do':>6} {'tokens':>9}"]
        for step in self.steps:
            names = f"{step.quantisation:<6} {step.task:<9} {step.source:<14}"
            lines.append(f"{names} {step.units:>6} {step.to_do:>6} {step.tokens:>9}")
        lines.append(f"entries: {self.entries}, of which {self.cached} are there")
        lines.append(f"size of the cache: at most {self.size / 1e6:.1f} MB")
        for quantisation, size in self.memory.items():
            lines.append(f"predicted peak memory ({quantisation}): {size / 1e9:.2f} GB")
        return "\n".join(lines)


def _tokens(job: Job, unit: Unit) -> int:
    block = job.recipe.blocks.get(unit.task.source)
    more, answers = room_for_answer(block), getattr(block, "samples", 1)
    return sum(len(piece.reading.ids) + more for piece in unit.pieces) * answers


def _rows(job: Job, name: str, piece: Piece) -> int:
    block = job.recipe.blocks[name]
    every = isinstance(block, StatesBlock) and block.pooling == "all_tokens"
    return sum(piece.reading.content) if every else 1


def _size(job: Job) -> int:
    """Bytes of the finished cache."""
    total = 0
    for name, spec in job.specs.items():
        source = getattr(job.recipe.blocks[name], "of", name)
        for piece in job.pieces.get(source, ()):
            total += (ENTRY_BYTES + _values(job, name, spec, piece)) * len(job.items(name, piece))
    return total


def _values(job: Job, name: str, spec: BlockSpec, piece: Piece) -> int:
    if spec.dtype is None:
        more = max(room_for_answer(job.recipe.blocks[name]) - 1, 0)
        return TEXT_BYTES_PER_TOKEN * more + len(piece.reading.text.encode())
    per_row = len(spec.layers) * int(spec.width or 0) * (2 if spec.dtype == "f2" else 4)
    return _rows(job, name, piece) * per_row


def plan(
    recipe: ExtractRecipe, out: Path, run: RunSettings | None = None, *, overwrite: bool = False
) -> Plan:
    """What `extract` would do now; reads configuration and tokenizer, writes nothing to `out`.

    Raises:
        CacheMismatchError: `out`, or the work beside it, belongs to another recipe.
        ModelError: the model cannot be found.
    """
    run = run or RunSettings()
    wide = parts_folder(out, wide=True).is_dir()
    job = prepare(recipe, run, wide=wide)
    entries = len(job.all_keys())
    done = finished(job, out, overwrite=overwrite)
    folder = parts_folder(out, wide=wide)
    present: frozenset[str] = frozenset()
    if done is None and folder.is_dir():
        present = ShardFolder(folder, header=job.header, create=False).present()
    todo = [] if done else missing(job, present, AnswerIds(folder))
    waiting = {id(unit) for _, units in todo for unit in units}
    steps = []
    for quantisation, units in job.passes:
        for task in dict.fromkeys(unit.task for unit in units):
            own = [unit for unit in units if unit.task == task]
            left = [unit for unit in own if id(unit) in waiting]
            tokens = sum(_tokens(job, unit) for unit in left)
            names = (quantisation, task.kind, task.source)
            steps.append(Step(*names, units=len(own), to_do=len(left), tokens=tokens))
    device = pick_device(run.device)
    memory = {q: peak_bytes(job, q, units, device) for q, units in todo}
    cached = entries if done else len(present & job.all_keys())
    return Plan(tuple(steps), entries, cached, _size(job), memory, sealed=done is not None)
