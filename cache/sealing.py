"""Sealing: all shards of an extraction become one file, and only then the shards go."""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from cache.blocks import Value, entry_digest
from cache.durable import storage_errors, sync_file, sync_folder
from cache.errors import (
    CacheFormatError,
    CacheMismatchError,
    MissingKnowledgeError,
    StorageError,
)
from cache.folder import Committed, ShardFolder
from cache.packing import Source
from cache.publishing import check_target, entry_sources, write_sealed
from cache.sealed import SealedFile, is_sealed
from cache.store import KnowledgeCache

OPEN_SHARDS = 64


class _Shards:
    """The most recently used shards, open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, SealedFile] = OrderedDict()

    def values(self, entry: Committed, kind: str) -> Mapping[str, Value]:
        """The array of one entry, after checking its digest."""
        if entry.shard not in self._open:
            self._open[entry.shard] = SealedFile(self.folder / entry.shard)
        self._open.move_to_end(entry.shard)
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        sealed = self._open[entry.shard]
        array = sealed.array(f"{entry.block}__values", check=False)
        found = {"values": array[entry.first : entry.last].copy()}  # what is digested is packed
        if entry_digest(kind, found) != entry.digest:
            what = f"an entry of block {entry.block} changed after it was committed"
            do = "Run the extraction again; only this shard is redone."
            raise CacheFormatError(what, where=sealed.path, do=do)
        return found

    def close(self) -> None:
        """Lets go of all of them."""
        for sealed in self._open.values():
            sealed.close()


def _block(
    folder: ShardFolder, shards: _Shards, name: str, entries: Sequence[Committed]
) -> dict[str, Source]:
    """The datasets of one block of the sealed file."""
    spec = folder.header.blocks[name]
    entries = sorted(entries, key=lambda e: (e.class_index, e.item))
    for before, after in pairwise(entries):
        if (before.class_index, before.item) == (after.class_index, after.item):
            class_id = folder.header.classes[after.class_index].id
            where = f"block {name}, class {class_id}, item {after.item}"
            what, do = "two entries from different texts", "Say which entries are expected."
            raise CacheMismatchError(what, where=where, do=do)
    rows = [(e.class_index, e.item, e.key, e.digest, e.source) for e in entries]

    def read(number: int) -> Mapping[str, Value]:
        entry = entries[number]
        if spec.dtype is None:
            return folder.entry(entry.key.hex()).values
        return shards.values(entry, spec.kind)

    return entry_sources(name, spec, rows, [e.last - e.first for e in entries], read)


def _chosen(
    folder: ShardFolder, expected: Collection[str] | None, *, partial: bool
) -> list[Committed]:
    present = folder.present()
    wanted = present if expected is None else frozenset(expected)
    missing = len(wanted - present)
    if missing and not partial:
        what = f"the extraction is not complete: {missing} of {len(wanted)} entries are missing"
        do = "Run the extraction again; what is there is kept."
        raise MissingKnowledgeError(what, where=folder.folder, do=do)
    return folder.committed(sorted(wanted))


def seal(
    folder: ShardFolder,
    target: Path,
    *,
    expected: Collection[str] | None = None,
    partial: bool = False,
    replace: bool = False,
) -> str:
    """Packs the shards of `folder` into one sealed file and returns its content id.

    The shards are deleted only after the file is verified and durable under its name. Sealing
    the same entries twice gives the same bytes.

    Args:
        folder: the extraction.
        target: the file to make.
        expected: keys of the entries the recipe asks for; None takes all that are there.
        partial: seal although expected entries are missing.
        replace: exchange a cache of another content that has this name; its readers keep the old.

    Raises:
        MissingKnowledgeError: expected entries are missing.
        CacheMismatchError: `target` is something else; or two entries for one place.
        StorageError: no space, no permission.
    """
    check_target(target)
    try:
        content_id = _seal(folder, target, expected, partial=partial, replace=replace)
    except (CacheFormatError, MissingKnowledgeError, StorageError):
        found = sealed_already(folder, target, expected)
        if found is None:
            raise
        content_id = found
    folder.clear()
    return content_id


def _seal(
    folder: ShardFolder,
    target: Path,
    expected: Collection[str] | None,
    *,
    partial: bool,
    replace: bool,
) -> str:
    chosen = _chosen(folder, expected, partial=partial)
    by_block: dict[str, list[Committed]] = {name: [] for name in folder.header.blocks}
    for entry in chosen:
        by_block[entry.block].append(entry)
    shards = _Shards(folder.folder)
    try:
        sources = folder.header.sources()
        for name, entries in by_block.items():
            sources |= _block(folder, shards, name, entries)
        content = folder.header.content("knowledge")
        return write_sealed(content, sources, target, replace=replace)
    finally:
        shards.close()


def sealed_already(
    folder: ShardFolder, target: Path, expected: Collection[str] | None
) -> str | None:
    """The content id of `target`, if another job sealed the expected entries of `folder` there.

    Of two jobs in one folder the faster one seals and removes the shards; the other then misses
    them, but nothing is lost. The same after a crash while the shards were removed.
    """
    if expected is None or not is_sealed(target):
        return None
    with KnowledgeCache.open(target, verify="full") as found:
        header, made = found.sealed.header, folder.header
        content = {k: v for k, v in header.content.items() if k != "datasets"}
        blocks = {name: {**block, "id": None} for name, block in content["blocks"].items()}
        wanted = made.content("knowledge")
        asked = {name: {**block, "id": None} for name, block in wanted["blocks"].items()}
        same = {**content, "blocks": blocks} == {**wanted, "blocks": asked}
        keys = frozenset().union(*(block.keys() for block in found.blocks.values()))
        if not same or keys != set(expected):
            return None
        with storage_errors(target):
            sync_file(target)  # the other job may not have come that far
            sync_folder(target.parent)
        return found.content_id
