"""A recipe resolved against its model: what will be computed, under which keys, from which texts.

Needs the configuration and the tokenizer of the model, never its weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cache.blocks import BlockSpec, ClassRecord, Entry, entry_key
from cache.errors import ModelError
from cache.recipe import digest_of
from cache.shards import ExtractionHeader
from knowledge_extract import source as sources
from knowledge_extract.asked import ASKED, ClozeBlock, DrawsBlock
from knowledge_extract.asking import per_question, questions, sampling_spec
from knowledge_extract.cloze import Gap, cloze_spec, gaps
from knowledge_extract.prompts import Prompter, end_tokens, load_configs, load_prompter
from knowledge_extract.recipe import (
    GIVEN,
    AnswersBlock,
    AttributesBlock,
    ClassRecipe,
    ExtractRecipe,
    TextsBlock,
    resolve_layers,
    room_for_answer,
)
from knowledge_extract.settings import RunSettings
from knowledge_extract.source import ModelSource
from knowledge_extract.tolerance import recorded
from knowledge_extract.units import Piece, Unit, quantisation_of, work

REVISION = 1  # of the meaning of stored values; part of every key
DTYPES = {"float16": "f2", "float32": "f4"}


@dataclass(frozen=True)
class Job:
    """Everything that is known before a weight is loaded.

    Args:
        recipe: as written.
        source: the model that was found.
        prompter: its tokenizer.
        config: its configuration.
        end: the end token.
        stops: tokens at which an answer ends.
        pieces: what the model reads, by source.
        specs: the blocks.
        passes: units by model load.
        fillers: the fill-mask model of each block that has one.
    """

    recipe: ExtractRecipe
    source: ModelSource
    prompter: Prompter
    config: Any
    end: int
    stops: frozenset[int]
    pieces: dict[str, tuple[Piece, ...]]
    specs: dict[str, BlockSpec]
    passes: list[tuple[str, list[Unit]]]
    fillers: dict[str, ModelSource] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def header(self) -> ExtractionHeader:
        """What the working folder and the sealed file are bound to."""
        records = (ClassRecord(c.id, c.name, c.modality, c.source) for c in self.recipe.classes)
        model = self.recipe.model
        provenance = {"tool": "vademecum", "model": self.source.label, **recorded(self.specs)}
        provenance["model_licence"] = model.licence or "unknown"
        if model.gated is not None:
            provenance["model_gated"] = "yes" if model.gated else "no"
        for name, block in self.recipe.blocks.items():
            if isinstance(block, ClozeBlock):
                provenance[f"{name}_model"] = self.fillers[name].label
                provenance[f"{name}_licence"] = block.model.licence or "unknown"
        return ExtractionHeader(
            dataset=self.recipe.dataset,
            classes=tuple(records),
            blocks=self.specs,
            recipe=self.resolved(),
            provenance=provenance,
        )

    def resolved(self) -> dict[str, Any]:
        """The recipe without paths, with what the model decided."""
        data = self.recipe.model_dump(mode="json", exclude={"model"})
        data["model"] = self.source.identity
        for name, filler in self.fillers.items():
            data["blocks"][name]["model"] = filler.identity
        data["resolved"] = {"chat": self.prompter.chat, "end_token": self.end, "depth": self.depth}
        return data

    @property
    def units(self) -> list[Unit]:
        """Every unit, in the order of the plan."""
        return [unit for _, units in self.passes for unit in units]

    def key(self, block: str, piece: Piece) -> str:
        """The key of one entry."""
        return entry_key(self.specs[block], piece.class_id, piece.item, piece.reading.digest)

    def entry_key(self, entry: Entry) -> str:
        """The key of an entry that was made."""
        return entry_key(self.specs[entry.block], entry.class_id, entry.item, entry.source_digest)

    def items(self, block: str, piece: Piece) -> range:
        """The items of a block that a piece yields."""
        count = per_question(self.recipe.blocks[block])
        return range(piece.item * count, (piece.item + 1) * count)

    def keys(self, unit: Unit) -> frozenset[str]:
        """The keys of every entry a unit yields."""
        return frozenset(
            entry_key(self.specs[block], piece.class_id, item, piece.reading.digest)
            for block in unit.task.blocks
            for piece in unit.pieces
            for item in self.items(block, piece)
        )

    def all_keys(self) -> frozenset[str]:
        """The keys of every entry the recipe asks for."""
        computed = frozenset().union(*(self.keys(unit) for unit in self.units))
        gaps = (gap for name in self.fillers for gap in self.gaps(name))
        filled = {key for gap in gaps for key in gap.keys(self.specs)}
        return computed | filled | {self.entry_key(entry) for entry in self.given()}

    def gaps(self, name: str) -> tuple[Gap, ...]:
        """What the fill-mask model of a block is asked."""
        return gaps(self.recipe, name)

    def given(self) -> Iterator[Entry]:
        """The entries that need no model: the texts and attributes of the recipe."""
        for name, block in self.recipe.blocks.items():
            if isinstance(block, TextsBlock):
                for piece in self.pieces["descriptions"]:
                    reading = piece.reading
                    values = {"text": reading.text, "prompt": ""}
                    counts = {"prompt_tokens": 0, "text_tokens": len(reading.ids)}
                    yield self.entry(name, piece, {**values, **counts})
            elif isinstance(block, AttributesBlock):
                rows = {c.id: list(attribute_rows(c)) for c in self.recipe.classes}
                for piece in self.pieces["attributes"]:
                    attribute, value, rank = rows[piece.class_id][piece.item]
                    row = {"attribute": attribute, "value": value, "rank": rank}
                    yield self.entry(name, piece, row)

    def entry(self, block: str, piece: Piece, values: dict[str, Any]) -> Entry:
        """An entry of a block made from a piece."""
        return Entry(block, piece.class_id, piece.item, values, piece.reading.digest)


def attribute_rows(one: ClassRecipe) -> Iterator[tuple[str, str, int]]:
    """Attribute, value and rank of a class: attributes by name, values as they are listed."""
    for attribute in sorted(one.attributes):
        for rank, value in enumerate(one.attributes[attribute]):
            yield attribute, value, rank


def _texts(recipe: ExtractRecipe, source: str) -> Iterator[tuple[str, int, str]]:
    templates = recipe.templates
    for one in recipe.classes:
        known = {"name": one.name, "modality": one.modality}
        if source == "descriptions":
            filled = [templates.description.format(text=t, **known) for t in one.descriptions]
        elif source == "attributes":
            filled = [
                templates.attribute.format(attribute=a, value=v, **known)
                for a, v, _ in attribute_rows(one)
            ]
        else:
            filled = [templates.question.format(**known)]
        yield from ((one.id, number, text) for number, text in enumerate(filled))


def _pieces(recipe: ExtractRecipe, source: str, prompter: Prompter) -> tuple[Piece, ...]:
    block = recipe.blocks.get(source)
    if isinstance(block, ASKED):
        asked = questions(recipe, block)
        return tuple(Piece(c, n, prompter.question(t, begin)) for c, n, t, begin in asked)
    asks = source not in GIVEN
    encode = prompter.question if asks else prompter.plain
    return tuple(Piece(c, n, encode(text)) for c, n, text in _texts(recipe, source))


def _spec(job: dict[str, Any], name: str, *, wide: bool) -> BlockSpec:
    """The definition of a block's values; `job` holds what all blocks share."""
    recipe: ExtractRecipe = job["recipe"]
    block, templates = recipe.blocks[name], recipe.templates.model_dump()
    shared = {"revision": REVISION, "tokenizer": job["source"].tokenizer_digest}
    if isinstance(block, AttributesBlock):
        return BlockSpec("attributes", {"revision": REVISION, "source": "attributes"})
    if isinstance(block, TextsBlock):
        template = digest_of(templates["description"])
        return BlockSpec("texts", {**shared, "source": "descriptions", "template": template})
    if isinstance(block, DrawsBlock):
        return BlockSpec("texts", {**_spec(job, block.of, wide=wide).spec, "source": "draws"})
    if isinstance(block, ClozeBlock):
        return cloze_spec(block, job["fillers"][name], REVISION)
    shared |= {
        "model": job["source"].model_digest,
        "quantisation": quantisation_of(recipe, name),
        "compute_dtype": recipe.compute_dtype,
    }
    if isinstance(block, AnswersBlock):
        return BlockSpec("texts", {**shared, **_asked(job, block)})
    if isinstance(block, ASKED):
        kind = "texts" if block.kind == "generated" else "attributes"
        return BlockSpec(kind, {**shared, **_chat(job), **sampling_spec(block)})
    if block.of in {"descriptions", "attributes"}:
        key = block.of.removesuffix("s")
        shared |= {"source": block.of, "template": digest_of(templates[key])}
        shared |= {"added_tokens": "left-out"}
    else:
        answers = recipe.blocks[block.of]
        assert isinstance(answers, AnswersBlock)  # noqa: S101 - the recipe was validated
        asked = {"quantisation": quantisation_of(recipe, block.of), **_asked(job, answers)}
        shared |= {"source": "answers", "answers": asked}
    shared |= {"pooling": block.pooling, "last_row": recipe.last_row}
    config = job["config"].get_text_config()
    layers = resolve_layers(block.layers, int(config.num_hidden_layers), name)
    dtype = "f4" if wide else DTYPES[recipe.store_dtype]
    return BlockSpec("states", shared, dtype, layers, int(config.hidden_size))


def _asked(job: dict[str, Any], block: AnswersBlock) -> dict[str, Any]:
    """How an answers block asks and stops."""
    return {
        **_chat(job),
        "source": "answers",
        "template": digest_of(job["recipe"].templates.question),
        "max_new_tokens": block.max_new_tokens,
        "decoding": "greedy",
    }


def _chat(job: dict[str, Any]) -> dict[str, Any]:
    """How a question is put, and where an answer ends."""
    return {
        "chat": job["prompter"].chat,
        "chat_template": job["prompter"].template_digest,
        "end_token": job["end"],
        "stops": sorted(job["stops"]),
    }


def _check_lengths(job: Job) -> None:
    limit = getattr(job.config.get_text_config(), "max_position_embeddings", None)
    if not limit:
        return
    for source, pieces in job.pieces.items():
        more = room_for_answer(job.recipe.blocks.get(source))
        for piece in pieces:
            if len(piece.reading.ids) + more > limit:
                what = "a text is longer than the model's context"
                where = f"{source}, class {piece.class_id}, item {piece.item}"
                found = f"{len(piece.reading.ids) + more} tokens"
                do = "Shorten it, or lower max_new_tokens."
                raise ModelError(what, where=where, found=found, wanted=f"at most {limit}", do=do)


def prepare(
    recipe: ExtractRecipe,
    run: RunSettings,
    *,
    wide: bool = False,
    source: ModelSource | None = None,
) -> Job:
    """A recipe resolved against its model; loads no weights.

    Args:
        recipe: validated.
        run: where to look.
        wide: store every states block as float32, whatever the recipe says.
        source: the model, where it was found before.

    Raises:
        ModelError: the model, its tokenizer or its end token is missing, or a text too long.
        RecipeError: a layer the model does not have, or a text without a token.
    """
    source = source or sources.find(recipe.model, run)
    prompter = load_prompter(source, recipe.chat_template)
    config, generation = load_configs(source)
    end, stops = end_tokens(generation, config, prompter.tokenizer)
    filled = {n: b for n, b in recipe.blocks.items() if isinstance(b, ClozeBlock)}
    used = {getattr(block, "of", name) for name, block in recipe.blocks.items()} - set(filled)
    pieces = {name: _pieces(recipe, name, prompter) for name in sorted(used)}
    shared = {
        "recipe": recipe,
        "source": source,
        "prompter": prompter,
        "config": config,
        "end": end,
        "stops": stops,
        "fillers": {name: sources.find(block.model, run) for name, block in filled.items()},
    }
    specs = {name: _spec(shared, name, wide=wide) for name in recipe.blocks}
    job = Job(**shared, pieces=pieces, specs=specs, passes=work(recipe, pieces, run.batch_size))
    _check_lengths(job)
    return job
