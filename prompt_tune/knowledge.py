"""Knowledge rows and hidden states from a sealed cache, and the controls that replace them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.errors import MissingKnowledgeError
from cache.recipe import digest_of
from cache.registry import suggest
from cache.store import Block, KnowledgeCache
from prompt_tune.backbone import Backbone
from prompt_tune.controls import derangement, gaussian_like
from prompt_tune.data.source import DataClass
from prompt_tune.method import KnowledgeRows, Need
from prompt_tune.recipe import KnowledgeSpec
from prompt_tune.texts import LoadedTexts, load_texts, text_block

USUAL_BLOCK = {
    "layers": "layers",
    "texts": "description_states",
    "attributes": "attribute_states",
    "tokens": "tokens",
}


@dataclass(frozen=True)
class LoadedKnowledge:
    """Rows of a run and what binds the run to them.

    Attributes:
        rows: the rows, in label order, None for the control `none`.
        content_id: of the whole cache.
        block_id: of the block the rows came from; unchanged when other blocks are added.
        block_made: digest of how that block was made: model, question and layers.
        unused: class ids the cache holds and the data does not.
        texts: texts, symptoms and attributes, and the ids of their blocks.
    """

    rows: KnowledgeRows | None
    content_id: str
    block: str | None
    block_id: str | None
    block_made: str | None
    unused: tuple[str, ...]
    texts: LoadedTexts


class LoadedRows(NamedTuple):
    """Rows, and name, id and making of the block they came from; None without rows."""

    rows: KnowledgeRows | None
    block: str | None
    block_id: str | None
    block_made: str | None


def _block(cache_file: KnowledgeCache, spec: KnowledgeSpec, path: Path | str) -> Block:
    name = spec.block or USUAL_BLOCK[spec.rows]
    states = sorted(n for n, b in cache_file.blocks.items() if b.kind == "states")
    if name not in states:
        what = f"the cache has no block {name!r} of hidden states"
        raise MissingKnowledgeError(what, where=path, do=suggest(name, states))
    return cache_file.blocks[name]


def _layer_index(block: Block, layer: int, path: Path | str) -> int:
    if layer < 0 and -layer <= len(block.layers):
        return len(block.layers) + layer
    if layer in block.layers:
        return block.layers.index(layer)
    what = f"block {block.name!r} does not hold layer {layer}"
    raise MissingKnowledgeError(
        what, where=path, found=f"layers {list(block.layers)}", do="Set knowledge.layer."
    )


def _keep(values: np.ndarray, keep: int | None, *, spaced: bool) -> np.ndarray:
    if keep is None or len(values) <= keep:
        return values
    if spaced:
        return values[np.linspace(0, len(values) - 1, keep).round().astype(int)]
    return values[:keep]


def class_rows(block: Block, class_id: str, spec: KnowledgeSpec, path: Path | str) -> np.ndarray:
    """The rows of one class, `[rows, width]`.

    `layers`: one row per stored layer of item 0. `texts` and `attributes`: the pooled state of each
    text at the chosen layer. `tokens`: the tokens of one text at the chosen layer.

    Raises:
        MissingKnowledgeError: no such item or layer, or the block is pooled otherwise.
    """
    count = block.items(class_id)
    item = spec.item if spec.rows == "tokens" else 0
    if count <= item:
        what = f"class {class_id!r} has no item {item} in block {block.name!r}"
        raise MissingKnowledgeError(what, where=path, found=f"{count} items")
    if spec.rows == "layers":
        states = block.array(class_id, 0)
        if states.shape[0] != 1:
            what = f"block {block.name!r} holds {states.shape[0]} rows per text; layers need one"
            raise MissingKnowledgeError(what, where=path, do="Use rows: tokens, or another block.")
        return _keep(states[0], spec.keep, spaced=True)
    layer = _layer_index(block, spec.layer, path)
    if spec.rows == "tokens":
        return _keep(block.array(class_id, item)[:, layer], spec.keep, spaced=False)
    items = [block.array(class_id, i) for i in range(count)]
    if any(s.shape[0] != 1 for s in items):
        what = f"block {block.name!r} is not pooled to one row per text"
        raise MissingKnowledgeError(what, where=path, do="Use rows: tokens, or another block.")
    return _keep(np.stack([s[0, layer] for s in items]), spec.keep, spaced=False)


def _scaled(rows: Tensor, spec: KnowledgeSpec) -> Tensor:
    if spec.scale == "raw":
        return rows
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)


def _controlled(rows: list[Tensor], spec: KnowledgeSpec, seed: int) -> list[Tensor]:
    if spec.control == "shuffled":
        return [rows[i] for i in derangement(len(rows), seed)]
    if spec.control == "random":
        return gaussian_like(rows, seed)
    return rows


def load_rows(
    opened: KnowledgeCache, spec: KnowledgeSpec, *, class_ids: Sequence[str], seed: int
) -> LoadedRows:
    """The knowledge rows a recipe asks for, in the order of the data's labels.

    Raises:
        MissingKnowledgeError: the cache lacks a block, layer or item.
    """
    block = _block(opened, spec, opened.path)
    rows = [
        _scaled(torch.from_numpy(class_rows(block, c, spec, opened.path).astype("f4")), spec)
        for c in class_ids
    ]
    used = None
    if spec.control != "none":
        used = KnowledgeRows(tuple(_controlled(rows, spec, seed)))
    made = digest_of([block.kind, dict(block.spec), block.layers, block.width])
    return LoadedRows(used, block.name, block.id, made)


def sizes(
    opened: KnowledgeCache,
    spec: KnowledgeSpec,
    *,
    dataset: str,
    classes: tuple[DataClass, ...],
    needs: frozenset[Need],
) -> list[int]:
    """How many rows, texts and symptoms the cache has of each class, before `spec.keep`.

    Args:
        opened: the cache.
        spec: which blocks.
        dataset: id of the data.
        classes: of the data.
        needs: what of them is counted; see `Method.needs`.

    Raises:
        CacheError: see `load_knowledge`.
    """
    opened.align(dataset, [(c.id, c.name, c.modality) for c in classes])
    found, whole = [], spec.model_copy(update={"keep": None})
    if "rows" in needs:
        block = _block(opened, spec, opened.path)
        found += [len(class_rows(block, c.id, whole, opened.path)) for c in classes]
    for need, name in {"texts": spec.texts, "symptoms": spec.symptoms}.items():
        if need in needs:
            block = text_block(opened, name, "texts")
            found += [block.items(c.id) for c in classes]
    return found


def load_knowledge(
    opened: KnowledgeCache,
    spec: KnowledgeSpec,
    *,
    dataset: str,
    classes: tuple[DataClass, ...],
    seed: int,
    needs: frozenset[Need] = frozenset({"rows"}),
    backbone: Backbone | None = None,
) -> LoadedKnowledge:
    """What a method needs of a cache, in the order of the data's labels.

    Args:
        opened: the cache.
        spec: which blocks, and the control.
        dataset: id of the data.
        classes: of the data, in label order.
        seed: of the control.
        needs: see `Method.needs`.
        backbone: embeds texts; only for methods that need them.

    Raises:
        CacheError: the cache is damaged, is another one, or lacks a class, block or layer.
    """
    alignment = opened.align(dataset, [(c.id, c.name, c.modality) for c in classes])
    ids = [c.id for c in classes]
    rows = LoadedRows(None, None, None, None)
    if "rows" in needs:
        rows = load_rows(opened, spec, class_ids=ids, seed=seed)
    texts = load_texts(opened, spec, needs, class_ids=ids, backbone=backbone, seed=seed)
    return LoadedKnowledge(
        rows.rows,
        opened.content_id,
        rows.block,
        rows.block_id,
        rows.block_made,
        tuple(c.id for c in alignment.unused),
        texts,
    )
