"""Generated texts and attributes: answers are drawn until the rules take enough of them.

Every attempt of every question has random numbers of its own, so the texts do not depend on which
questions share a batch, nor on where a run was interrupted.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cache.blocks import Entry
from cache.errors import ModelError
from cache.recipe import canonical_json
from knowledge_extract.asked import AskedBlock, ModelAttributesBlock
from knowledge_extract.asking import questions
from knowledge_extract.batches import Batches
from knowledge_extract.generate import Decoding, generate
from knowledge_extract.job import Job
from knowledge_extract.model import LanguageModel
from knowledge_extract.phrasing import Rules, fault, is_enough, kept
from knowledge_extract.sampling import Sampler, draw_seed
from knowledge_extract.units import Piece, Task


class Drawn:
    """The answers to one question.

    Args:
        block: what is asked for.
        piece: the question as the model reads it.
        name: of the class.
        asked: the question without the chat template, and what the answer begins with.
    """

    def __init__(self, block: AskedBlock, piece: Piece, name: str, asked: tuple[str, str]) -> None:
        self.piece, self._block, self._name = piece, block, name
        self._question, begin = asked
        self._begin = begin if block.form == "sentence" else ""
        self._rules = Rules(block.form, block.max_words, block.avoid_name)
        self.taken: list[tuple[str, int]] = []
        self.record: list[tuple[int, str, str]] = []
        self.attempts, self.tokens = 0, 0

    def next_attempts(self) -> range:
        """The attempts that are needed at least; none if it is done.

        Raises:
            ModelError: there were too many already.
        """
        wanted = 1 - len(self.taken)
        if isinstance(self._block, ModelAttributesBlock):
            fresh = self._block.values - len({text for text, _ in self.taken})
            wanted = max(self._block.samples - len(self.taken), fresh)
        if wanted > 0 and self.attempts + wanted > self._block.attempts:
            what = f"the model gave no sound answer in {self.attempts} attempts"
            reasons = Counter(reason for _, reason, _ in self.record if reason).most_common(3)
            found = ", ".join(f"{n} times {reason}" for reason, n in reasons) or "too few different"
            do = "Ask otherwise, or raise max_new_tokens or attempts."
            where = f"class {self.piece.class_id}, item {self.piece.item}"
            raise ModelError(what, where=where, found=found, do=do)
        return range(self.attempts, self.attempts + max(wanted, 0))

    def seed(self, attempt: int) -> int:
        """The seed of an attempt."""
        return draw_seed(self._block.seed, self.piece.class_id, self.piece.item, attempt)

    def is_enough(self, answer: str) -> bool:
        """True if no more tokens of an answer are needed."""
        return is_enough(self._begin + answer, self._rules)

    def take(self, attempt: int, answer: str, tokens: int) -> None:
        """Keeps or refuses an answer; attempts come in their order."""
        self.attempts, self.tokens = attempt + 1, self.tokens + tokens
        cut_off = tokens >= self._block.max_new_tokens and not self.is_enough(answer)
        text = kept(self._begin + answer, self._rules)
        reason = fault(text, self._name, self._question, self._rules, cut_off=cut_off)
        attribute = isinstance(self._block, ModelAttributesBlock)
        if reason or attribute:
            self.record.append((attempt, reason, answer))
        if not reason:
            self.taken.append((text.lower() if attribute else text, tokens))

    def ranked(self) -> list[str]:
        """The values by how often they were named; equals in the order of their first naming."""
        return [value for value, _ in Counter(text for text, _ in self.taken).most_common()]


def draw(
    job: Job, language: LanguageModel, task: Task, pieces: Sequence[Piece], batches: Batches
) -> tuple[list[Entry], int]:
    """The entries of a unit of questions, and the rows of the largest batch.

    Raises:
        ModelError: a question got no sound answer.
        SystemRefusedError: one row alone does not fit into memory.
    """
    block: Any = job.recipe.blocks[task.source]
    names = {one.id: one.name for one in job.recipe.classes}
    asked = {(c, n): (text, begin) for c, n, text, begin in questions(job.recipe, block)}
    drawn = [Drawn(block, p, names[p.class_id], asked[p.class_id, p.item]) for p in pieces]
    longest = max(len(piece.reading.ids) for piece in pieces) + block.max_new_tokens + 1
    most, largest = language.batch_limit(longest), 0
    while rows := [(one, attempt) for one in drawn for attempt in one.next_attempts()]:
        answers, size = batches.run(rows, lambda part: _answers(job, language, block, part), most)
        largest = max(largest, size)
        for (one, attempt), ids in zip(rows, answers, strict=True):
            one.take(attempt, job.prompter.decode(ids, strip=False), len(ids))
    return [entry for one in drawn for entry in _entries(job, task, block, one)], largest


def _answers(
    job: Job, language: LanguageModel, block: AskedBlock, rows: Sequence[tuple[Drawn, int]]
) -> list[list[int]]:
    sampler = Sampler([one.seed(n) for one, n in rows], block.temperature, block.top_p)

    def enough(number: int, ids: Sequence[int]) -> bool:
        return rows[number][0].is_enough(job.prompter.decode(ids, strip=False))

    made = generate(
        language,
        [one.piece.reading.ids for one, _ in rows],
        end=job.end,
        stops=job.stops,
        max_new_tokens=block.max_new_tokens,
        decoding=Decoding(sampler, enough),
    )
    return made.answers


def _entries(job: Job, task: Task, block: AskedBlock, one: Drawn) -> Iterator[Entry]:
    piece = one.piece
    if isinstance(block, ModelAttributesBlock):
        attribute = block.names[piece.item]
        for rank, (item, value) in enumerate(
            zip(job.items(task.source, piece), one.ranked(), strict=False)
        ):
            row: Mapping[str, Any] = {"attribute": attribute, "value": value, "rank": rank}
            yield Entry(task.source, piece.class_id, item, row, piece.reading.digest)
    else:
        text, tokens = one.taken[0]
        yield job.entry(task.source, piece, _text(piece, text, tokens))
    record = canonical_json(one.record).decode("ascii")
    for name in task.draws:
        yield job.entry(name, piece, _text(piece, record, one.tokens))


def _text(piece: Piece, text: str, tokens: int) -> dict[str, Any]:
    counts = {"prompt_tokens": len(piece.reading.ids), "text_tokens": tokens}
    return {"text": text, "prompt": piece.reading.text, **counts}
