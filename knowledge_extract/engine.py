"""One loaded model working through units."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch

from cache.blocks import Entry
from knowledge_extract.answers import AnswerIds
from knowledge_extract.batches import Batches
from knowledge_extract.capture import Capture
from knowledge_extract.drawing import draw
from knowledge_extract.generate import generate, pad_right, read
from knowledge_extract.job import Job
from knowledge_extract.model import LanguageModel
from knowledge_extract.pooling import reader_for, split_rows
from knowledge_extract.quiet import quiet
from knowledge_extract.recipe import AnswersBlock, StatesBlock, room_for_answer
from knowledge_extract.units import Piece, Task, Unit

Row = dict[str, Any]  # block name -> states; "" -> ids of the answer


class Fp16OverflowError(Exception):
    """A finite value that float16 cannot hold, where the recipe asks for float32 instead."""


class Engine:
    """A context in which units become entries.

    Args:
        job: what is to be done.
        language: the model, loaded under the quantisation of the units it will be given.
        answers: token ids of answers, read and written.
        batches: how many rows fit.
    """

    def __init__(
        self, job: Job, language: LanguageModel, answers: AnswerIds, batches: Batches
    ) -> None:
        self.job, self.language, self.answers, self.batches = job, language, answers, batches
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(quiet())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def entries(self, unit: Unit) -> tuple[list[Entry], tuple[int, int]]:
        """Every entry of a unit, computed anew, and the shape of the largest batch.

        Raises:
            SystemRefusedError: one row alone does not fit into memory.
            ModelError: a question got no sound answer.
            Fp16OverflowError: see there.
        """
        task = unit.task
        if task.kind == "sample":
            made, largest = draw(self.job, self.language, task, unit.pieces, self.batches)
            return made, (largest, max(self._tokens(task, piece) for piece in unit.pieces))
        layers = {name: self.job.specs[name].layers for name in task.states}
        with Capture(self.language, layers, self.job.recipe.last_row) as capture:
            tokens = max(self._tokens(task, piece) for piece in unit.pieces)
            compute = self._worker(task, capture)
            most = self.language.batch_limit(tokens)
            rows, largest = self.batches.run(unit.pieces, compute, most)
        if task.kind == "generate":
            keys = [self.job.key(task.source, piece) for piece in unit.pieces]
            self.answers.add({k: row[""] for k, row in zip(keys, rows, strict=True)})
        pairs = list(zip(unit.pieces, rows, strict=True))
        entries = [self._states(name, piece, row) for name in task.states for piece, row in pairs]
        if task.kind == "generate":
            entries += [self._text(task.source, piece, row) for piece, row in pairs]
        return entries, (largest, tokens)

    def _worker(self, task: Task, capture: Capture) -> Callable[[Sequence[Piece]], list[Row]]:
        if task.kind == "generate":
            return lambda pieces: self._generate(task, pieces, capture)
        if task.kind == "reread":
            return lambda pieces: self._reread(task, pieces, capture)
        return lambda pieces: self._read(task, pieces, capture)

    def _tokens(self, task: Task, piece: Piece) -> int:
        return len(piece.reading.ids) + room_for_answer(self.job.recipe.blocks.get(task.source))

    def _generate(self, task: Task, pieces: Sequence[Piece], capture: Capture) -> list[Row]:
        block = self.job.recipe.blocks[task.source]
        most = block.max_new_tokens if isinstance(block, AnswersBlock) else 0
        if most == 0:
            sequences = [[*p.reading.ids, self.job.end] for p in pieces]
            rows = self._last(task, sequences, capture) if task.states else [{} for _ in pieces]
            return [{**row, "": []} for row in rows]
        made = generate(
            self.language,
            [piece.reading.ids for piece in pieces],
            end=self.job.end,
            stops=self.job.stops,
            max_new_tokens=most,
            capture=capture if task.states else None,
            blocks=task.states,
        )
        return [
            {"": answer} | {name: made.states[name][number][None] for name in task.states}
            for number, answer in enumerate(made.answers)
        ]

    def _reread(self, task: Task, pieces: Sequence[Piece], capture: Capture) -> list[Row]:
        keys = [self.job.key(task.source, piece) for piece in pieces]
        sequences = [
            [*piece.reading.ids, *self.answers[key], self.job.end]
            for key, piece in zip(keys, pieces, strict=True)
        ]
        return self._last(task, sequences, capture)

    def _last(self, task: Task, sequences: Sequence[Sequence[int]], capture: Capture) -> list[Row]:
        """States of the last token of each sequence."""
        _, mask = pad_right(sequences, self.language.pad)
        readers = dict.fromkeys(task.states, reader_for("last_token", mask))
        found = read(self.language, sequences, capture, readers)
        return [{name: found[name][n][None] for name in task.states} for n in range(len(sequences))]

    def _read(self, task: Task, pieces: Sequence[Piece], capture: Capture) -> list[Row]:
        content, _ = pad_right([[int(c) for c in p.reading.content] for p in pieces], 0)
        mask = content.bool()
        poolings = {name: self._pooling(name) for name in task.states}
        readers = {name: reader_for(pooling, mask) for name, pooling in poolings.items()}
        sequences = [piece.reading.ids for piece in pieces]
        found = read(self.language, sequences, capture, readers)
        parts = {name: split_rows(poolings[name], found[name], mask) for name in task.states}
        return [{name: parts[name][n] for name in task.states} for n in range(len(pieces))]

    def _pooling(self, name: str) -> str:
        block = self.job.recipe.blocks[name]
        return block.pooling if isinstance(block, StatesBlock) else "last_token"

    def _states(self, name: str, piece: Piece, row: Mapping[str, torch.Tensor]) -> Entry:
        values = row[name].numpy()
        # Only here can "too large" still be answered by another type; the cache refuses the rest.
        if self.job.specs[name].dtype == "f2" and self.job.recipe.on_overflow == "float32":
            with np.errstate(over="ignore"):
                lost = np.isinf(values.astype(np.float16)) & np.isfinite(values)
            if lost.any():
                raise Fp16OverflowError(name)
        return self.job.entry(name, piece, {"values": values})

    def _text(self, name: str, piece: Piece, row: Row) -> Entry:
        ids, reading = row[""], piece.reading
        text = {"text": self.job.prompter.decode(ids), "prompt": reading.text}
        counts = {"prompt_tokens": len(reading.ids), "text_tokens": len(ids)}
        return self.job.entry(name, piece, {**text, **counts})
