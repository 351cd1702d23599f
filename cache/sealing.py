"""Sealing: all shards of an extraction become one file, and only then the shards go."""

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from cache.blocks import KINDS, entry_digest, raw_bytes
from cache.durable import Draft, drafting, free_space, refuse_source_folder, storage_errors, sweep
from cache.errors import (
    CacheFormatError,
    CacheMismatchError,
    MissingKnowledgeError,
    StorageError,
)
from cache.folder import Committed, ShardFolder
from cache.packing import Buffer, Source, pack, packed_size
from cache.sealed import SealedFile, is_sealed
from cache.tables import block_sources

OPEN_SHARDS = 64


class _Shards:
    """The most recently used shards, open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, SealedFile] = OrderedDict()

    def array(self, entry: Committed, kind: str) -> np.ndarray:
        """The array of one entry, after checking its digest."""
        if entry.shard not in self._open:
            self._open[entry.shard] = SealedFile(self.folder / entry.shard)
        self._open.move_to_end(entry.shard)
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        sealed = self._open[entry.shard]
        found = sealed.array(f"{entry.block}__values", check=False)[entry.first : entry.last]
        if entry_digest(kind, {"values": found}) != entry.digest:
            what = f"an entry of block {entry.block} changed after it was committed"
            do = "Run the extraction again; only this shard is redone."
            raise CacheFormatError(what, where=sealed.path, do=do)
        return found

    def close(self) -> None:
        """Lets go of all of them."""
        for sealed in self._open.values():
            sealed.close()


def _stream(shards: _Shards, kind: str, entries: Sequence[Committed]) -> Iterator[Buffer]:
    for entry in entries:
        yield raw_bytes(shards.array(entry, kind))


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
    if spec.dtype is not None:
        counts = [e.last - e.first for e in entries]
        streams = {"values": (counts, _stream(shards, spec.kind, entries))}
        return block_sources(name, spec, rows, {}, streams)
    found = [folder.entry(e.key.hex()).values for e in entries]
    columns = {column: [values[column] for values in found] for column in KINDS[spec.kind].columns}
    return block_sources(name, spec, rows, columns, {})


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


def _check_target(target: Path) -> None:
    refuse_source_folder(target)
    if target.is_dir():
        what = "is a folder"
        raise StorageError(what, where=target, do="Name a file.")
    if os.path.lexists(target) and not is_sealed(target):
        what, do = "this file exists and is not a knowledge cache", "Choose another name."
        raise CacheMismatchError(what, where=target, do=do)


def _publish(draft: Draft, target: Path, content_id: str, *, replace: bool) -> None:
    """Verifies the packed file and gives it its name."""
    with SealedFile(draft.path) as sealed:
        sealed.verify_bytes()
        sealed.verify_structure()
        if sealed.header.content_id != content_id:
            what = "what was written does not read back"
            raise CacheFormatError(what, where=target)
    if draft.publish(target, replace=replace):
        return
    with SealedFile(target) as sealed:
        if sealed.header.content_id != content_id:
            what = "another knowledge cache has this name"
            do = "Choose another name, or replace it on purpose."
            found = sealed.header.content_id
            raise CacheMismatchError(what, where=target, found=found, wanted=content_id, do=do)
        sealed.verify_bytes()


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
    _check_target(target)
    chosen = _chosen(folder, expected, partial=partial)
    by_block: dict[str, list[Committed]] = {name: [] for name in folder.header.blocks}
    for entry in chosen:
        by_block[entry.block].append(entry)
    shards = _Shards(folder.folder)
    try:
        sources = folder.header.sources()
        for name, entries in by_block.items():
            sources |= _block(folder, shards, name, entries)
        with storage_errors(target.parent):
            sweep(target.parent)
        free_space(target.parent, packed_size(sources))
        with drafting(target.parent) as draft:
            content_id = pack(draft, folder.header.content("knowledge"), sources)
            draft.sync()
            _publish(draft, target, content_id, replace=replace)
    finally:
        shards.close()
    folder.clear()
    return content_id
