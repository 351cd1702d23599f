"""Embeddings of a cache's texts by a backbone's text tower, kept in the cache."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.blocks import BlockSpec, Entry
from cache.combining.adding import add_entries
from cache.errors import MissingKnowledgeError
from cache.extraction import ExtractionHeader
from cache.inspect import verify
from cache.plain import is_token
from cache.recipe import digest_of, read_yaml, validate
from cache.registry import suggest
from cache.store import Block, KnowledgeCache
from prompt_tune.backbone import Backbone, BackboneSpec
from prompt_tune.recipe import preset_path
from prompt_tune.texts import EMBEDDED_BY

REVISION = 1  # of how texts become embeddings; part of every key


@dataclass(frozen=True)
class EmbedReport:
    """What was added.

    Args:
        content_id: of the sealed cache.
        path: of the sealed cache.
        block: the new block.
        of: the block of texts.
        texts: how many were embedded.
        width: of an embedding.
        backbone: its name.
    """

    content_id: str
    path: Path
    block: str
    of: str
    texts: int
    width: int
    backbone: str

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "path": str(self.path)}

    def describe(self) -> str:
        """The report as lines for a terminal."""
        made = f"block {self.block}: {self.texts} texts of block {self.of} by {self.backbone}"
        return f"{self.path}  {self.content_id}\n{made}, width {self.width}"


def backbone_spec(place: str) -> BackboneSpec:
    """The backbone of a tuning recipe (a file, or a preset by its name), or of a file of its own.

    Raises:
        RecipeError: no such file, or it names no backbone.
    """
    path = preset_path(place)
    data = read_yaml(path)
    own = data.get("backbone", data) if isinstance(data, dict) else data
    return validate(BackboneSpec, own, where=f"{path}, backbone")


def embed(
    path: Path,
    backbone: Backbone,
    *,
    block: str = "descriptions",
    name: str | None = None,
    licence: str = "unknown",
    out: Path | None = None,
    replace: bool = False,
) -> EmbedReport:
    """Adds what a text tower makes of every text of a block, un-normalised, one entry per text.

    Stage two takes these in place of its own embeddings wherever texts and tower are the same; the
    tower reads the texts of one class together, as it would there, so the numbers are too.

    Args:
        path: a sealed cache.
        backbone: whose text tower reads.
        block: of texts.
        name: of the new block; None is that of the texts and eight digits of the tower's digest.
        licence: of the backbone, for `push`.
        out: the cache to make; None replaces `path` itself.
        replace: exchange another cache that has the name `out`.

    Raises:
        MissingKnowledgeError: no such block of texts.
        PromptOverflowError: a text is longer than the tower's context.
        MergeConflictsError: another block has the name, or these texts under it are otherwise.
        CacheFormatError: not a sound cache.
        StorageError: no space, no permission.
    """
    name = name or f"{block}_{backbone.text_fingerprint[:8]}"
    with KnowledgeCache.open(path, expect=verify(path).content_id) as opened:
        known = [n for n, b in opened.blocks.items() if b.kind == "texts"]
        if block not in known:
            what = f"the cache has no block {block!r} of texts"
            raise MissingKnowledgeError(what, where=path, do=suggest(block, known))
        texts = opened.blocks[block]
        ids = [record.id for record in opened.classes]
        entries = [entry for one in ids for entry in _entries(texts, one, backbone, name)]
        header = _header(opened, texts, backbone, name, licence)
    content_id = add_entries(path, header, entries, out or path, replace=replace or out is None)
    where = (out or path, name, block)
    return EmbedReport(content_id, *where, len(entries), backbone.embed_dim, backbone.name)


def _entries(texts: Block, class_id: str, backbone: Backbone, name: str) -> Iterator[Entry]:
    strings = [str(texts.text(class_id, n)["text"]) for n in range(texts.items(class_id))]
    if not strings:
        return
    made = backbone.text.encode_texts(strings).float().cpu().numpy().astype(np.float32)
    for item, text in enumerate(strings):
        source = digest_of({"text": text})
        yield Entry(name, class_id, item, {"values": made[item : item + 1]}, source)


def _header(
    opened: KnowledgeCache, texts: Block, backbone: Backbone, name: str, licence: str
) -> ExtractionHeader:
    spec = {
        "revision": REVISION,
        "source": "embedded",
        "of": texts.id,
        EMBEDDED_BY: backbone.text_fingerprint,
        "backbone": backbone.name if is_token(backbone.name) else digest_of(backbone.name),
    }
    told = {"tool": "vademecum", f"{name}_model": backbone.name, f"{name}_licence": licence}
    return ExtractionHeader(
        opened.dataset,
        opened.classes,
        {name: BlockSpec("embeddings", spec, "f4", (), backbone.embed_dim)},
        {"embedded": {"block": name, "of": texts.id, EMBEDDED_BY: backbone.text_fingerprint}},
        told,
    )
