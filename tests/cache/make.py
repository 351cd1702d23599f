"""Builders of small headers, entries and caches."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cache import BlockSpec, ClassRecord, Entry, ExtractionHeader, ShardFolder, entry_key, seal
from cache.header import MAGIC, PREFIX, block_id
from cache.recipe import canonical_json

CLASSES = (
    ClassRecord("basophil", "basophil", "blood smear", "https://example.org/basophil"),
    ClassRecord("ig", "immature granulocyte", "blood smear"),
    ClassRecord("a-b.c", "Ångström näme", ""),
)
BLOCKS = {
    "layers": BlockSpec("states", {"model": "org/name", "bits": 4}, "f2", (1, 2, 30), 5),
    "embedded": BlockSpec("embeddings", {"model": "org/name"}, "f4", (), 7),
    "answers": BlockSpec("texts", {"model": "org/name", "max_new_tokens": 8}),
    "attributes": BlockSpec("attributes", {"source": "recipe"}),
}
RECIPE: dict[str, Any] = {
    "dataset": "toy",
    "model": {"hub": "org/name", "files": {"model.safetensors": "ab" * 32}},
    "temperature": 0.25,
    "templates": {"question": "What does {name} look like?"},
    "classes": [{"id": "basophil", "descriptions": ["A long text about /usr/share things."]}],
}
PROVENANCE = {"licence": "Apache-2.0", "notice": "Made from a model with a licence."}


def header(**changes: Any) -> ExtractionHeader:
    """What the toy extraction is bound to."""
    fields = {
        "dataset": "toy",
        "classes": CLASSES,
        "blocks": BLOCKS,
        "recipe": RECIPE,
        "provenance": PROVENANCE,
    }
    return ExtractionHeader(**{**fields, **changes})


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def entry(block: str, class_id: str, item: int = 0, seed: int = 0, rows: int = 2) -> Entry:
    """A deterministic entry; another seed gives another value under the same key."""
    start = int(digest(block, class_id, item, seed)[:6], 16)

    def numbers(*shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        return (((np.arange(count) * 7919 + start) % 2048 - 1024) / 64).astype("f4").reshape(shape)

    values: dict[str, Any] = {
        "layers": {"values": numbers(rows, 3, 5)},
        "embedded": {"values": numbers(rows, 7)},
        "answers": {
            "text": f"{class_id} säys {start}",
            "prompt": f"What is {class_id}?",
            "prompt_tokens": 12 + item,
            "text_tokens": start,
        },
        "attributes": {"attribute": "nucleus shape", "value": f"bilobed {start}", "rank": item},
    }[block]
    return Entry(block, class_id, item, values, digest(block, class_id, item))


def entries(blocks: dict[str, BlockSpec] = BLOCKS, seed: int = 0) -> list[Entry]:
    """Two items of every block for every class."""
    return [
        entry(block, record.id, item, seed, rows=1 + (item + len(record.id)) % 3)
        for block in blocks
        for record in CLASSES
        for item in range(2)
    ]


def key(one: Entry) -> str:
    return entry_key(BLOCKS[one.block], one.class_id, one.item, one.source_digest)


def cache_at(path: Path, **changes: Any) -> str:
    """A sealed cache at `path`; returns its content id."""
    made = header(**changes)
    folder = ShardFolder(path.with_name(path.name + ".parts"), header=made)
    for one in entries(dict(made.blocks)):
        folder.commit([one], batch_shape=(1,))
    return seal(folder, path)


def tiny_cache_at(path: Path) -> str:
    """The smallest cache: one block, two entries."""
    blocks = {"embedded": BLOCKS["embedded"]}
    folder = ShardFolder(
        path.with_name("tiny.parts"),
        header=header(blocks=blocks, recipe={}, classes=CLASSES[:2], provenance={}),
    )
    folder.commit(
        [entry("embedded", "basophil"), entry("embedded", "ig")],
        batch_shape=(2, 3),
    )
    return seal(folder, path)


def body_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    body: dict[str, Any] = json.loads(raw[PREFIX : PREFIX + length])
    return body


def put_header(path: Path, text: bytes, userblock: int) -> None:
    """Any bytes as the header, with a correct length and digest."""
    raw = bytearray(path.read_bytes())
    prefix = MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest()
    block = (prefix + text).ljust(userblock, b"\0")
    raw[:userblock] = block
    path.write_bytes(raw)


def reforge(path: Path, edit: Callable[[dict[str, Any]], Any], *, ids: bool = True) -> None:
    """What a careful attacker does: change the header and make every digest in it right."""
    body = body_of(path)
    userblock = body["userblock"]
    body = edit(body) or body
    if ids:
        try:
            for name, block in body["content"]["blocks"].items():
                block["id"] = block_id(body["content"], name)
        except (KeyError, TypeError, AttributeError):
            pass  # the edit broke more than that
    put_header(path, canonical_json(body), userblock)


def rewrite(path: Path, name: str, data: np.ndarray) -> None:
    """Other data in a dataset, with every digest made right."""
    body = body_of(path)
    raw = np.ascontiguousarray(data).tobytes()
    with path.open("r+b") as file:
        file.seek(body["layout"][name])
        file.write(raw)

    def edit(found: dict[str, Any]) -> None:
        found["content"]["datasets"][name]["sha256"] = hashlib.sha256(raw).hexdigest()

    reforge(path, edit)
