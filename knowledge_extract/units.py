"""The fixed plan of work: passes over the model, and in them units of a few sequences.

Derived from the recipe and the batch size alone, never from what is missing, so that a resumed
unit meets the same neighbours and the same padding as before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from knowledge_extract.asked import ASKED, DrawsBlock
from knowledge_extract.prompts import Reading
from knowledge_extract.recipe import AnswersBlock, ExtractRecipe, StatesBlock

TaskKind = Literal["generate", "reread", "read", "sample"]


@dataclass(frozen=True)
class Piece:
    """One text the model reads: a question, a description, or an attribute prompt."""

    class_id: str
    item: int
    reading: Reading


@dataclass(frozen=True)
class Task:
    """What one model does with all pieces of one source.

    Args:
        kind: `generate` answers (and read their end token in the same pass), `reread` answers
            another model wrote, `read` given texts, or `sample` texts and attributes.
        quantisation: of the model.
        source: the block of answers, generated texts or attributes; `descriptions` or `attributes`
            for `read`.
        states: the states blocks it fills.
        draws: the block that keeps what `sample` refuses.
    """

    kind: TaskKind
    quantisation: str
    source: str
    states: tuple[str, ...]
    draws: tuple[str, ...] = ()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Every block it fills; `generate` and `sample` also fill the block that is asked for."""
        own = (self.source,) if self.kind in {"generate", "sample"} else ()
        return (*own, *self.states, *self.draws)


@dataclass(frozen=True)
class Unit:
    """Pieces that share a batch."""

    task: Task
    pieces: tuple[Piece, ...]


def quantisation_of(recipe: ExtractRecipe, block: str) -> str:
    """The quantisation under which a block is computed."""
    own = getattr(recipe.blocks[block], "quantisation", None)
    return own or recipe.quantisation


def _tasks(recipe: ExtractRecipe) -> list[Task]:
    """Every task of a recipe: answers first, then texts, in the recipe's order."""
    readers: dict[tuple[str, str], list[str]] = {}
    for name, block in recipe.blocks.items():
        if isinstance(block, StatesBlock):
            readers.setdefault((block.of, quantisation_of(recipe, name)), []).append(name)
    tasks = []
    for name, block in recipe.blocks.items():
        if isinstance(block, AnswersBlock):
            own = quantisation_of(recipe, name)
            tasks.append(Task("generate", own, name, tuple(readers.pop((name, own), ()))))
        elif isinstance(block, ASKED):
            draws = (n for n, b in recipe.blocks.items() if isinstance(b, DrawsBlock))
            kept = tuple(n for n in draws if getattr(recipe.blocks[n], "of", "") == name)
            tasks.append(Task("sample", quantisation_of(recipe, name), name, (), kept))
    for (source, quantisation), names in readers.items():
        kind: TaskKind = "read" if source in {"descriptions", "attributes"} else "reread"
        tasks.append(Task(kind, quantisation, source, tuple(names)))
    return tasks


def passes(recipe: ExtractRecipe) -> list[tuple[str, list[Task]]]:
    """Tasks by model load, each after the answers it needs; as few loads as that allows."""
    tasks = _tasks(recipe)
    first = [t for t in tasks if t.kind != "reread"]
    order = list(dict.fromkeys(t.quantisation for t in [*first, *tasks]))
    grouped = [(q, [t for t in first if t.quantisation == q]) for q in order]
    later: dict[str, list[Task]] = {}
    for task in tasks:
        if task.kind != "reread":
            continue
        at, made = order.index(task.quantisation), quantisation_of(recipe, task.source)
        home = grouped[at][1] if at > order.index(made) else later.setdefault(order[at], [])
        home.append(task)
    return [(q, own) for q, own in [*grouped, *later.items()] if own]


def units_of(task: Task, pieces: Sequence[Piece], batch_size: int) -> list[Unit]:
    """The pieces in batches of like length; equal lengths keep the recipe's order."""
    ordered = sorted(pieces, key=lambda piece: len(piece.reading.ids))
    starts = range(0, len(ordered), batch_size)
    return [Unit(task, tuple(ordered[at : at + batch_size])) for at in starts]


def work(
    recipe: ExtractRecipe, pieces: Mapping[str, Sequence[Piece]], batch_size: int
) -> list[tuple[str, list[Unit]]]:
    """The units of every pass; `pieces` by source."""
    return [
        (q, [u for task in tasks for u in units_of(task, pieces[task.source], batch_size)])
        for q, tasks in passes(recipe)
    ]
