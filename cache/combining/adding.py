"""A block more: entries made elsewhere, alone in a cache or beside the blocks of another."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from cache.blocks import Entry
from cache.combining.merging import merge
from cache.errors import CacheMismatchError
from cache.extraction import ExtractionHeader
from cache.folder import ShardFolder
from cache.publishing import check_target
from cache.sealing import seal
from cache.store import KnowledgeCache

AT_ONCE = 4096  # entries in one shard


def seal_entries(
    header: ExtractionHeader, entries: Sequence[Entry], out: Path, *, replace: bool = False
) -> str:
    """Makes a sealed cache of these entries alone; its content id.

    Raises:
        ValueRefusedError: an entry that may not go into a cache.
        CacheMismatchError: `out` is something else.
        StorageError: no space, no permission.
    """
    check_target(out)
    with tempfile.TemporaryDirectory(prefix="vademecum-") as place:
        folder = ShardFolder(Path(place) / "parts", header=header)
        for start in range(0, len(entries), AT_ONCE):
            part = entries[start : start + AT_ONCE]
            folder.commit(part, batch_shape=(len(part),))
        return seal(folder, out, replace=replace)


def add_entries(
    into: Path,
    header: ExtractionHeader,
    entries: Sequence[Entry],
    out: Path,
    *,
    replace: bool = False,
) -> str:
    """Makes a cache of another one and these entries, as if both were merged; its content id.

    Raises:
        CacheMismatchError: the cache has another block of this name.
        MergeConflictsError: the same block holds something else.
        CacheFormatError: `into` is missing, foreign or damaged.
        CacheError: see `seal_entries`.
    """
    check_target(out)
    with KnowledgeCache.open(into) as opened:
        specs = opened.sealed.header.specs
        for name, spec in header.blocks.items():
            if name in specs and specs[name].plain() != spec.plain():
                what, do = f"the cache has another block {name!r}", "Choose another name."
                raise CacheMismatchError(what, where=into, do=do)
    with tempfile.TemporaryDirectory(prefix="vademecum-") as place:
        more = Path(place) / "more.h5"
        seal_entries(header, entries, more)
        return merge([into, more], out, replace=replace).content_id
