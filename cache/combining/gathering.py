"""Entries of sealed caches, as merging and slicing put them into a new one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cache.blocks import BlockSpec, Value, entry_digest
from cache.errors import CacheFormatError
from cache.packing import Source
from cache.publishing import entry_sources
from cache.store import KnowledgeCache
from cache.tables import BlockTable


class OpenBlock:
    """One block of an open cache, row by row.

    Args:
        opened: the cache.
        name: of the block.
    """

    def __init__(self, opened: KnowledgeCache, name: str) -> None:
        self.path, self.name = opened.path, name
        self.table = BlockTable(opened.sealed, name, len(opened.classes))
        self.ids = [record.id for record in opened.classes]
        self._sealed = opened.sealed

    def rows(self) -> Iterator["Row"]:
        """Every entry, in file order."""
        kind, item = self.table.index
        keys, digests, sources = (self.table.column(c) for c in ("keys", "digests", "sources"))
        for n in range(len(self.table)):
            hashes = keys[n].tobytes(), digests[n].tobytes(), sources[n].tobytes()
            yield Row(self, n, self.ids[kind[n]], int(item[n]), *hashes)

    def length(self, row: int) -> int:
        """How many rows of the array an entry has."""
        return int(self.table.offsets[row + 1] - self.table.offsets[row])

    def values(self, row: int, digest: bytes) -> Mapping[str, Value]:
        """The values of an entry in memory of their own, after checking their digest.

        Raises:
            CacheFormatError: they are not those that were sealed.
        """
        found = self._values(row)
        if entry_digest(self.table.spec.kind, found) != digest:
            what = f"an entry of block {self.name} changed while it was read"
            raise CacheFormatError(what, where=self.path, do="Fetch the file again.")
        return found

    def _values(self, row: int) -> Mapping[str, Value]:
        if self.table.spec.dtype is None:
            return self.table.values(row)
        array = self._sealed.array(f"{self.name}__values", check=False)
        return {"values": array[self.table.offsets[row] : self.table.offsets[row + 1]].copy()}


@dataclass(frozen=True, slots=True)
class Row:
    """One entry of an open block; its place in a cache is `(class_id, item)`."""

    block: OpenBlock
    number: int
    class_id: str
    item: int
    key: bytes
    digest: bytes
    source: bytes

    def values(self) -> Mapping[str, Value]:
        """See `OpenBlock.values`."""
        return self.block.values(self.number, self.digest)

    def array(self) -> np.ndarray | None:
        """The array of the entry, if its kind has one."""
        found = self.values().get("values")
        return found if isinstance(found, np.ndarray) else None


def gathered(
    name: str, spec: BlockSpec, rows: Sequence[Row], class_index: Mapping[str, int]
) -> dict[str, Source]:
    """The datasets of a block made of entries in file order; read while they are packed."""
    columns = [(class_index[r.class_id], r.item, r.key, r.digest, r.source) for r in rows]
    counts = [] if spec.dtype is None else [r.block.length(r.number) for r in rows]
    return entry_sources(name, spec, columns, counts, lambda n: rows[n].values())
