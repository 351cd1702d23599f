"""What `vademecum cache inspect` and `vademecum cache verify` say."""

import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.blocks import KINDS, all_finite, entry_digest, entry_key
from cache.errors import CacheFormatError, ValueRefusedError
from cache.extraction import ExtractionHeader
from cache.plain import redact
from cache.recipe import canonical_json
from cache.store import Block, KnowledgeCache

VERIFY = "vademecum cache verify"
SHOWN = 60  # characters of a foreign text


def safe_text(text: str, length: int = SHOWN) -> str:
    """`text` for a terminal: no control, escape or direction characters, at most `length` long."""
    hidden = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}
    shown = "".join("�" if unicodedata.category(c) in hidden else c for c in text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def inspect(path: Path) -> dict[str, Any]:
    """What a cache holds and what made it, as plain data. Not every byte is read; see `verify`.

    Raises:
        CacheFormatError: not a cache, or damaged where it was read.
    """
    with KnowledgeCache.open(path) as found:
        return {
            "content_id": found.content_id,
            "verified": False,
            "size": found.size,
            "dataset": found.dataset,
            "classes": [asdict(record) for record in found.classes],
            "blocks": {name: _block_facts(found, block) for name, block in found.blocks.items()},
            "recipe": found.recipe,
            "provenance": found.provenance,
        }


def _block_facts(found: KnowledgeCache, block: Block) -> dict[str, Any]:
    return {
        "id": block.id,
        "kind": block.kind,
        "dtype": block.dtype,
        "layers": list(block.layers),
        "width": block.width,
        "entries": len(block),
        "items": {record.id: block.items(record.id) for record in found.classes},
        "spec": dict(block.spec),
    }


def describe(path: Path) -> str:
    """The same as `inspect`, as lines for a terminal.

    Raises:
        CacheFormatError: not a cache, or damaged where it was read.
    """
    facts = inspect(path)
    lines = [
        f"content id  {facts['content_id']} (not verified: {VERIFY} checks every byte)",
        f"data set    {facts['dataset']}, {len(facts['classes'])} classes",
        f"size        {facts['size'] / 1e6:.2f} MB",
    ]
    for record in facts["classes"]:
        note = f"  ({safe_text(record['modality'])})" if record["modality"] else ""
        lines.append(f"  {record['id']:<24} {safe_text(record['name'])}{note}")
    for name, block in facts["blocks"].items():
        what = f"{block['entries']} entries of {block['kind']}"
        if block["dtype"]:
            layers = f"{len(block['layers'])} layers of " if block["layers"] else ""
            what += f", {layers}width {block['width']}, {block['dtype']}"
        lines.append(f"block {name}: {what}")
        lines.append(f"  id {block['id']}")
        lines += [f"  {key}: {_short(value)}" for key, value in sorted(block["spec"].items())]
    for key, value in sorted(facts["provenance"].items()):
        lines.append(f"{safe_text(key)}: {safe_text(str(value))}")
    return "\n".join(lines)


def _short(value: object) -> str:
    return safe_text(value if isinstance(value, str) else canonical_json(value).decode("ascii"))


@dataclass(frozen=True)
class VerifyReport:
    """What was checked in a file that passed."""

    path: Path
    content_id: str
    size: int
    datasets: int
    entries: int
    blocks: dict[str, str]
    checks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "path": str(self.path), "checks": list(self.checks)}

    def describe(self) -> str:
        """The report as lines for a terminal."""
        lines = [
            f"{self.path}: sound",
            f"content id  {self.content_id}",
            f"{self.size} bytes, {self.datasets} datasets, {self.entries} entries",
        ]
        lines += [f"block {name}  {identity}" for name, identity in self.blocks.items()]
        return "\n".join([*lines, "checked: " + ", ".join(self.checks)])


def verify(path: Path, expect: str | None = None) -> VerifyReport:
    """The report on a file in which every byte, the structure and every value was checked.

    Args:
        path: the cache.
        expect: the content id it must have (or at least 12 digits of its start).

    Raises:
        CacheFormatError: the first fault: what and where.
        CacheMismatchError: sound, but not the one expected.
    """
    with KnowledgeCache.open(path, expect=expect, verify="full") as found:
        _check_tables(found)
        entries = 0
        for block in found.blocks.values():
            entries += _check_block(found, block)
        return VerifyReport(
            path=path,
            content_id=found.content_id,
            size=found.size,
            datasets=len(found.sealed.header.extents),
            entries=entries,
            blocks={name: block.id for name, block in found.blocks.items()},
            checks=("header", "every byte", "structure", "class table", "recipe", "entries"),
        )


def _check_tables(found: KnowledgeCache) -> None:
    """The class table, recipe and provenance hold what a writer could have put there."""
    sealed, header = found.sealed, found.sealed.header
    try:
        made = ExtractionHeader(
            found.dataset, found.classes, header.specs, found.recipe, found.provenance
        )
    except ValueRefusedError as error:
        what = f"refused: {error}"
        raise CacheFormatError(what, where=found.path) from error
    for name, value in (("recipe", found.recipe), ("provenance", found.provenance)):
        if canonical_json(value) != sealed.array(name).tobytes():
            what = f"dataset {name} is not in canonical form"
            raise CacheFormatError(what, where=found.path)
    if canonical_json(redact(made.recipe)) != canonical_json(header.content["recipe"]):
        what = "the recipe in the header is not the recipe of the file"
        raise CacheFormatError(what, where=found.path)


def _check_block(found: KnowledgeCache, block: Block) -> int:
    spec = found.sealed.header.specs[block.name]
    keys, digests = block.keys(), block.digests()
    rows = 0
    extents = found.sealed.header.extents
    columns = [f"{block.name}__{column}" for column in KINDS[block.kind].columns]
    if not len(block) and any(extents[column].nbytes for column in columns):
        what = "values that belong to no entry"
        raise CacheFormatError(what, where=f"{found.path}, block {block.name}")
    for row, entry in enumerate(block.entries()):
        where = f"{found.path}, block {block.name}, class {entry.class_id}, item {entry.item}"
        if entry_key(spec, entry.class_id, entry.item, entry.source_digest) != keys[row]:
            what = "the key of an entry is not the digest of what determines it"
            raise CacheFormatError(what, where=where)
        if entry_digest(block.kind, entry.values) != digests[row].tobytes():
            what = "the digest of an entry is not that of its values"
            raise CacheFormatError(what, where=where)
        for name, kind in KINDS[block.kind].columns.items():
            value = entry.values[name]
            if isinstance(value, str) and not unicodedata.is_normalized("NFC", value):
                what = f"{name} is not in Unicode normal form C"
                raise CacheFormatError(what, where=where)
            if kind == "array" and isinstance(value, np.ndarray):
                _check_array(value, where)
        rows += 1
    return rows


def _check_array(value: np.ndarray, where: str) -> None:
    if not len(value):
        what = "an entry without rows"
        raise CacheFormatError(what, where=where)
    if not all_finite(value):
        what = "a value is not finite"
        raise CacheFormatError(what, where=where)
