"""Texts, symptom phrases and attributes from a sealed cache, and the controls that replace them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cache.errors import MissingKnowledgeError
from cache.registry import suggest
from cache.store import Block, KnowledgeCache
from prompt_tune.backbone import Backbone
from prompt_tune.controls import derangement, gaussian_like, resampled_words
from prompt_tune.method import ClassTexts, Need
from prompt_tune.recipe import KnowledgeSpec

Phrases = tuple[tuple[str, ...], ...]
Attributes = tuple[Mapping[str, tuple[str, ...]], ...]
EMBEDDED_BY = "text_tower"
"""The field of an embeddings block's spec that holds `Backbone.text_fingerprint`."""


@dataclass(frozen=True)
class LoadedTexts:
    """What a run reads of the texts in a cache.

    Attributes:
        blocks: id of every block that was read, by name.
    """

    texts: ClassTexts | None = None
    symptoms: Phrases | None = None
    attributes: Attributes | None = None
    blocks: dict[str, str] = field(default_factory=dict)


def text_block(opened: KnowledgeCache, name: str, kind: str) -> Block:
    """The block of that name and kind.

    Raises:
        MissingKnowledgeError: there is none; the nearest is named.
    """
    known = sorted(n for n, b in opened.blocks.items() if b.kind == kind)
    if name not in known:
        what = f"the cache has no block {name!r} of {kind}"
        raise MissingKnowledgeError(what, where=opened.path, do=suggest(name, known))
    return opened.blocks[name]


def _phrases(block: Block, class_id: str, keep: int | None, path: object) -> tuple[str, ...]:
    count = min(block.items(class_id), keep or block.items(class_id))
    found = tuple(str(block.text(class_id, i)["text"]) for i in range(count))
    if not found:
        what = f"block {block.name!r} has no text for class {class_id!r}"
        raise MissingKnowledgeError(what, where=path)
    return found


def _attributes(block: Block, class_id: str) -> dict[str, tuple[str, ...]]:
    entries = [block.text(class_id, i) for i in range(block.items(class_id))]
    entries.sort(key=lambda e: (str(e["attribute"]), int(e["rank"])))
    found: dict[str, tuple[str, ...]] = {}
    for e in entries:
        found[str(e["attribute"])] = (*found.get(str(e["attribute"]), ()), str(e["value"]))
    return found


def _stored_embeddings(
    opened: KnowledgeCache, of: Block, backbone: Backbone, class_id: str, most: int
) -> Tensor | None:
    """What the cache holds of this text tower for the first of these very texts, or None."""
    for block in opened.blocks.values():
        made_of = (block.spec.get("of"), block.spec.get(EMBEDDED_BY))
        if block.kind == "embeddings" and made_of == (of.id, backbone.text_fingerprint):
            count = block.items(class_id)
            return torch.from_numpy(
                np.concatenate([block.array(class_id, i) for i in range(count)])[:most].astype("f4")
            )
    return None


def _embedded(
    opened: KnowledgeCache,
    block: Block,
    ids: Sequence[str],
    strings: Phrases,
    backbone: Backbone | None,
) -> tuple[Tensor, ...]:
    if backbone is None:
        what = "texts are embedded by a backbone"
        raise ValueError(what)
    made = []
    for class_id, texts in zip(ids, strings, strict=True):
        stored = _stored_embeddings(opened, block, backbone, class_id, len(texts))
        made.append(backbone.text.encode_texts(texts).float().cpu() if stored is None else stored)
    return tuple(made)


def load_texts(
    opened: KnowledgeCache,
    spec: KnowledgeSpec,
    needs: frozenset[Need],
    *,
    class_ids: Sequence[str],
    backbone: Backbone | None,
    seed: int,
) -> LoadedTexts:
    """What `needs` names of texts, symptoms and attributes, in label order, under the control.

    Embeddings of texts come from the cache where a block of it was made by this text tower from
    these texts (see `vademecum cache embed`), and are computed otherwise. `shuffled` gives every
    class the texts of another, the same other for all three; `random` gives texts Gaussian
    embeddings of each one's mean and variance, and phrases and values of as many words drawn from
    those of all classes; `none` gives nothing. `spec.keep` leaves the first so many texts and
    symptoms of each class.

    Raises:
        MissingKnowledgeError: the cache lacks a block, or a block a class.
    """
    blocks: dict[str, str] = {}
    order = derangement(len(class_ids), seed) if spec.control == "shuffled" else None
    ids = list(class_ids) if order is None else [class_ids[i] for i in order]
    texts, symptoms, attributes = None, None, None
    if "texts" in needs:
        block = text_block(opened, spec.texts, "texts")
        blocks[block.name] = block.id
        strings = tuple(_phrases(block, c, spec.keep, opened.path) for c in ids)
        if spec.control != "none":
            texts = ClassTexts(strings, _embedded(opened, block, ids, strings, backbone))
        if texts is not None and spec.control == "random":
            empty: Phrases = ((),) * len(ids)
            texts = ClassTexts(empty, tuple(gaussian_like(list(texts.embeddings), seed)))
    if "symptoms" in needs:
        block = text_block(opened, spec.symptoms, "texts")
        blocks[block.name] = block.id
        found = tuple(_phrases(block, c, spec.keep, opened.path) for c in ids)
        symptoms = {"none": None, "random": resampled_words(found, seed)}.get(spec.control, found)
    if "attributes" in needs:
        block = text_block(opened, spec.attributes, "attributes")
        blocks[block.name] = block.id
        every = tuple(_attributes(block, c) for c in ids)
        if spec.control != "none":
            attributes = _redrawn(every, seed) if spec.control == "random" else every
    return LoadedTexts(texts, symptoms, attributes, blocks)


def _redrawn(every: tuple[dict[str, tuple[str, ...]], ...], seed: int) -> Attributes:
    """Values of words drawn from those of the same attribute in all classes."""
    names = sorted({name for one in every for name in one})
    made: list[dict[str, tuple[str, ...]]] = [{} for _ in every]
    for k, name in enumerate(names):
        drawn = resampled_words(tuple(one.get(name, ()) for one in every), seed + k)
        for one, values in zip(made, drawn, strict=True):
            if values:
                one[name] = values
    return tuple(made)
