"""Attributes by cloze: what a fill-mask model puts into the gap of a sentence about a class."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cache.blocks import BlockSpec, Entry, Value, entry_key
from cache.errors import ModelError
from cache.recipe import canonical_json, digest_of
from knowledge_extract.asked import ClozeBlock
from knowledge_extract.asking import draws_of, questions
from knowledge_extract.model import check_complete, pick_device
from knowledge_extract.phrasing import names_class, words
from knowledge_extract.quiet import quiet
from knowledge_extract.recipe import ExtractRecipe
from knowledge_extract.settings import RunSettings
from knowledge_extract.source import ModelSource

MOST_PASSED_OVER = 1000  # tokens, before a gap counts as one the model cannot fill


@dataclass(frozen=True)
class Gap:
    """One sentence with a gap, and the entries its filling gives.

    Args:
        block: of the attributes.
        draws: the block that keeps what was passed over.
        class_id: of the class.
        class_name: of the class.
        number: of the attribute within the class.
        attribute: its name.
        text: the sentence, with `{mask}` where the gap is.
        values: how many tokens are wanted.
    """

    block: str
    draws: str
    class_id: str
    class_name: str
    number: int
    attribute: str
    text: str
    values: int

    @property
    def source(self) -> str:
        """SHA-256 of what the model reads."""
        return digest_of({"text": self.text})

    def places(self) -> list[tuple[str, int]]:
        """Block and item of every entry."""
        items = range(self.number * self.values, (self.number + 1) * self.values)
        return [*((self.block, item) for item in items), (self.draws, self.number)]

    def keys(self, specs: Mapping[str, BlockSpec]) -> list[str]:
        """The key of every entry."""
        source = self.source
        return [entry_key(specs[b], self.class_id, item, source) for b, item in self.places()]


def gaps(recipe: ExtractRecipe, name: str) -> tuple[Gap, ...]:
    """Every gap of a cloze block."""
    block = recipe.blocks[name]
    assert isinstance(block, ClozeBlock)  # noqa: S101 - callers look
    names = {one.id: one.name for one in recipe.classes}
    draws = draws_of(recipe, name)
    return tuple(
        Gap(name, draws, c, names[c], n, block.names[n], text, block.values)
        for c, n, text, _ in questions(recipe, block)
    )


def cloze_spec(block: ClozeBlock, source: ModelSource, revision: int) -> BlockSpec:
    """The definition of a cloze block's values."""
    spec = {
        "revision": revision,
        "source": "cloze",
        "model": source.model_digest,
        "tokenizer": source.tokenizer_digest,
        "template": digest_of({"template": block.template, "templates": block.templates}),
        "values": block.values,
        "ranked": "by-probability",
    }
    return BlockSpec("attributes", spec)


class Filler:
    """A fill-mask model in evaluation mode, in float32; every sentence is read alone.

    Raises:
        ModelError: it cannot be loaded, or fills no gaps.
    """

    def __init__(self, source: ModelSource, run: RunSettings) -> None:
        from safetensors import SafetensorError
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self._label, options = source.label, source.hub_options()
        self._device = pick_device(run.device)
        try:
            with quiet():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(source.texts(), **options)
                model, report = AutoModelForMaskedLM.from_pretrained(
                    source.weights(), **options, dtype=torch.float32, output_loading_info=True
                )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            what = "the fill-mask model cannot be loaded"
            raise ModelError(what, where=source.label, found=str(error)[:300]) from error
        check_complete(report, source)
        if self._tokenizer.mask_token is None:
            what, do = "the tokenizer has no mask token", "Name a fill-mask model, such as a BERT."
            raise ModelError(what, where=source.label, do=do)
        self._model: Any = model.eval().to(self._device)
        vocabulary = self._tokenizer.get_vocab()
        self._tokens = {number: token for token, number in vocabulary.items()}
        self._marked = any(token[:1] in "Ġ▁" for token in vocabulary if token)

    @torch.inference_mode()
    def _chances(self, text: str) -> torch.Tensor:
        sentence = text.replace("{mask}", self._tokenizer.mask_token)
        ids = self._tokenizer(sentence, return_tensors="pt")["input_ids"].to(self._device)
        at = (ids[0] == self._tokenizer.mask_token_id).nonzero()
        if len(at) != 1:
            what = "a sentence does not have one gap"
            raise ModelError(what, where=self._label, found=repr(sentence))
        logits = self._model(input_ids=ids).logits[0, int(at[0, 0])]
        chances: torch.Tensor = logits.double().softmax(dim=-1).cpu()
        return chances

    def _word(self, number: int, gap: Gap) -> tuple[str, str]:
        """A token as a word, and why it is passed over."""
        token = self._tokens.get(number, "")
        text = str(self._tokenizer.decode([number])).strip().removeprefix("##").lower()
        part = token.startswith("##") or (self._marked and token[:1] not in "Ġ▁")
        if number in self._tokenizer.all_special_ids or not any(c.isalpha() for c in text):
            return text, "no word"
        if part:
            return text, "part of a word"
        if names_class(text, gap.class_name) or words(text) == words(gap.attribute):
            return text, "names what was asked"
        return text, ""

    def entries(self, gap: Gap) -> list[Entry]:
        """The values of one attribute of one class by rank, and what was passed over."""
        chances = self._chances(gap.text)
        best, numbers = chances.sort(descending=True, stable=True)
        found: list[str] = []
        record = []
        for place, number in enumerate(numbers[:MOST_PASSED_OVER].tolist()):
            text, reason = self._word(number, gap)
            if not reason and text in found:
                reason = "stands already"
            record.append([place, reason, text, f"{float(best[place]):.3g}"])
            found += [] if reason else [text]
            if len(found) == gap.values:
                return [*self._values(gap, found), self._draws(gap, record)]
        what = "the fill-mask model puts no words into a gap"
        raise ModelError(what, where=self._label, found=repr(gap.text), wanted=gap.values)

    def _values(self, gap: Gap, found: list[str]) -> Iterator[Entry]:
        for rank, ((block, item), value) in enumerate(zip(gap.places(), found, strict=False)):
            row: dict[str, Value] = {"attribute": gap.attribute, "value": value, "rank": rank}
            yield Entry(block, gap.class_id, item, row, gap.source)

    def _draws(self, gap: Gap, record: list[list[Any]]) -> Entry:
        text = canonical_json(record).decode("ascii")
        row: dict[str, Value] = {"text": text, "prompt": gap.text}
        row |= {"prompt_tokens": 0, "text_tokens": len(record)}
        return Entry(gap.draws, gap.class_id, gap.number, row, gap.source)
