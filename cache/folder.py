"""The working folder of an extraction: immutable shards, one per committed batch.

A shard is a sealed file of its own. It is named after the keys of its entries and linked without
replacing, so of two jobs that commit the same batch exactly one is first, without a lock.
"""

import errno
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.blocks import Entry, Value, checked_values, entry_digest, entry_key, raw_bytes
from cache.durable import (
    drafting,
    make_folder,
    refuse_source_folder,
    storage_errors,
    sweep,
    sync_folder,
)
from cache.errors import (
    CacheFormatError,
    CacheMismatchError,
    MissingKnowledgeError,
    StorageError,
    ValueRefusedError,
)
from cache.extraction import ExtractionHeader, stored_plain
from cache.header import FORMAT, HEX
from cache.packing import Source, pack
from cache.plain import first_difference
from cache.sealed import SealedFile
from cache.tables import BlockTable, block_sources

EXTRACTION = "extraction.h5"
_SHARD = re.compile(r"[0-9a-f]{32}\.h5")


@dataclass(frozen=True, slots=True)
class Committed:
    """Where an entry that was committed stands."""

    sequence: int
    shard: str
    block: str
    row: int
    class_index: int
    item: int
    key: bytes
    digest: bytes
    source: bytes
    first: int
    last: int

    @property
    def rank(self) -> tuple[int, str]:
        """Of two shards that hold one key, the one with the lower rank counts."""
        return self.sequence, self.shard


class ShardFolder:
    """The working folder of one extraction; any number of jobs may write into it.

    Args:
        folder: made if missing, unless `create` is off.
        header: what is extracted; a folder of another extraction is refused.
        create: off to look only: nothing is written, moved or removed.

    Attributes:
        damaged: one line per file that was found damaged and moved aside; its work is redone.

    Raises:
        CacheMismatchError: the folder belongs to another recipe; the message names the first field.
        StorageError: the operating system refused something.
    """

    def __init__(self, folder: Path, *, header: ExtractionHeader, create: bool = True) -> None:
        self.folder, self.header, self._create = folder, header, create
        self.damaged: list[str] = []
        self._entries: dict[str, Committed] = {}
        self._shards: dict[str, int] = {}
        self._ignored: set[str] = set()
        refuse_source_folder(folder)
        if create:
            with storage_errors(folder):
                make_folder(folder)
                sweep(folder)
        with storage_errors(folder):
            self._extraction = self._open_header()
        self._refresh()

    def _open_header(self) -> str | None:
        """The id of this extraction, after comparing it with the one the folder was made for."""
        path = self.folder / EXTRACTION
        if not path.exists():
            if not self._create:
                return None
            with drafting(self.folder) as draft:
                pack(draft, self.header.content("extraction"), self.header.sources())
                draft.sync()
                draft.publish(path, replace=False)
        try:
            with SealedFile(path) as sealed:
                sealed.verify_bytes()
                found = stored_plain(sealed)
                identity = sealed.header.content_id
        except CacheFormatError as error:
            if not self._create:
                return None
            self._set_aside(path, error)
            return self._open_header()
        difference = first_difference(found, self.header.plain())
        if difference is not None:
            place, have, want = difference
            what = f"this folder belongs to another recipe: {place} differs"
            do = "Extract into another file, or remove the folder to start again."
            have, want = repr(have)[:80], repr(want)[:80]
            raise CacheMismatchError(what, where=self.folder, found=have, wanted=want, do=do)
        return identity

    def _set_aside(self, path: Path, error: CacheFormatError) -> None:
        with storage_errors(path):
            number, aside = 0, path.with_name(path.name + ".damaged")
            while aside.exists():
                number += 1
                aside = path.with_name(f"{path.name}.{number}.damaged")
            try:
                path.rename(aside)
            except FileNotFoundError:
                return  # another job was faster
            sync_folder(self.folder)
        self.damaged.append(f"{error}; moved to {aside.name}, its work is done again")

    def _refresh(self) -> None:
        """Takes note of shards that appeared since the last look."""
        if self._extraction is None:
            return
        with storage_errors(self.folder):
            names = sorted(path.name for path in self.folder.iterdir())
        for name in names:
            if _SHARD.fullmatch(name) and name not in self._shards and name not in self._ignored:
                self._load(self.folder / name)

    def _load(self, path: Path) -> None:
        try:
            with SealedFile(path) as sealed:
                sealed.verify_bytes()
                sequence, entries = self._read_shard(sealed)
        except CacheFormatError as error:
            if self._create:
                self._set_aside(path, error)
            else:
                self._ignored.add(path.name)
            return
        self._shards[path.name] = sequence
        for entry in entries:
            key = entry.key.hex()
            if key not in self._entries or entry.rank < self._entries[key].rank:
                self._entries[key] = entry

    def _read_shard(self, sealed: SealedFile) -> tuple[int, list[Committed]]:
        content, entries = sealed.header.content, []
        if sealed.header.kind != "shard" or content["extraction"] != self._extraction:
            what, do = "a file of another extraction lies in this folder", "Move it elsewhere."
            raise CacheMismatchError(what, where=sealed.path, do=do)
        sequence = int(content["sequence"])
        for name, spec in sealed.header.specs.items():
            if name not in self.header.blocks or spec.plain() != self.header.blocks[name].plain():
                what = f"block {name} is not the one of its extraction"
                raise CacheFormatError(what, where=sealed.path)
            table = BlockTable(sealed, name, len(self.header.classes))
            kind, item = table.index
            lists = [table.column(column) for column in ("keys", "digests", "sources")]
            bounds = table.offsets if spec.dtype else np.zeros(len(table) + 1, "<i8")
            for row in range(len(table)):
                key, digest, source = (column[row].tobytes() for column in lists)
                entry = Committed(
                    sequence=sequence,
                    shard=Path(sealed.path).name,
                    block=name,
                    row=row,
                    class_index=int(kind[row]),
                    item=int(item[row]),
                    key=key,
                    digest=digest,
                    source=source,
                    first=int(bounds[row]),
                    last=int(bounds[row + 1]),
                )
                entries.append(entry)
        return sequence, entries

    def present(self) -> frozenset[str]:
        """Keys of all entries that are committed, by any job, and sound."""
        self._refresh()
        return frozenset(self._entries)

    def committed(self, keys: Iterable[str]) -> list[Committed]:
        """Where these entries stand; keys that are not committed are left out."""
        return [self._entries[key] for key in keys if key in self._entries]

    def batch_shapes(self) -> dict[str, tuple[int, ...]]:
        """The batch shape of every shard, by file name."""
        shapes = {}
        for name in sorted(self._shards):
            with SealedFile(self.folder / name) as sealed:
                shapes[name] = tuple(sealed.header.content["batch"])
        return shapes

    def entry(self, key: str) -> Entry:
        """An entry that was committed.

        Raises:
            MissingKnowledgeError: no such entry.
            CacheFormatError: its bytes changed since.
        """
        if key not in self._entries:
            what = "no such entry was committed"
            raise MissingKnowledgeError(what, where=self.folder, found=key)
        place = self._entries[key]
        with SealedFile(self.folder / place.shard) as sealed:
            table = BlockTable(sealed, place.block, len(self.header.classes))
            values = table.values(place.row)
            if entry_digest(table.spec.kind, values) != place.digest:
                what = f"an entry of block {place.block} changed after it was committed"
                raise CacheFormatError(what, where=sealed.path)
        class_id = self.header.classes[place.class_index].id
        return Entry(place.block, class_id, place.item, values, place.source.hex())

    def commit(self, entries: Sequence[Entry], *, batch_shape: tuple[int, ...]) -> None:
        """Stores entries durably; when this returns they survive a crash and a power cut.

        Entries whose key is committed already, by this or another job, are dropped: the first wins.

        Args:
            entries: one finished unit of work.
            batch_shape: of the forward pass that made them; recorded in the shard.

        Raises:
            ValueRefusedError: an entry that does not fit; nothing of the call is stored.
            StorageError: the operating system refused; nothing of the call is acknowledged.
        """
        checked = self._checked(entries)
        self._refresh()
        known = bool(checked)
        for _ in range(3):
            todo = {key: made for key, made in checked.items() if key not in self._entries}
            if not todo:
                if known:  # another job's, perhaps killed before its name was durable
                    with storage_errors(self.folder):
                        sync_folder(self.folder)
                return
            known = False
            self._write(todo, batch_shape)
            self._refresh()
        what, do = "what was written does not read back", "Check the disk."
        raise StorageError(what, where=self.folder, do=do)

    def _checked(self, entries: Sequence[Entry]) -> dict[str, tuple[Entry, dict[str, Value]]]:
        checked: dict[str, tuple[Entry, dict[str, Value]]] = {}
        places = set()
        for entry in entries:
            where = f"block {entry.block}, class {entry.class_id}, item {entry.item}"
            if entry.block not in self.header.blocks:
                known = ", ".join(sorted(self.header.blocks))
                what = "no such block"
                raise ValueRefusedError(what, where=where, wanted=f"one of {known}")
            if entry.class_id not in self.header.class_index:
                what = "no such class in this extraction"
                raise ValueRefusedError(what, where=where)
            if type(entry.item) is not int or not 0 <= entry.item < 1 << 40:
                what = "items are numbered from 0"
                raise ValueRefusedError(what, where=where)
            if HEX.fullmatch(str(entry.source_digest)) is None:
                what = "the source digest is no SHA-256"
                raise ValueRefusedError(what, where=where)
            place = (entry.block, entry.class_id, entry.item)
            if place in places:
                what = "an entry stands twice in one commit"
                raise ValueRefusedError(what, where=where)
            places.add(place)
            spec = self.header.blocks[entry.block]
            key = entry_key(spec, entry.class_id, entry.item, entry.source_digest)
            checked[key] = (entry, checked_values(spec, entry))
        return checked

    def _write(
        self, todo: Mapping[str, tuple[Entry, dict[str, Value]]], batch_shape: tuple[int, ...]
    ) -> None:
        """One shard with these entries, unless one of the same name is there."""
        by_block: dict[
            str, list[tuple[tuple[int, int, bytes, bytes, bytes], dict[str, Value]]]
        ] = {}
        for key, (entry, values) in todo.items():
            digest = entry_digest(self.header.blocks[entry.block].kind, values)
            hashes = (bytes.fromhex(key), digest, bytes.fromhex(entry.source_digest))
            row = (self.header.class_index[entry.class_id], entry.item, *hashes)
            by_block.setdefault(entry.block, []).append((row, values))
        sources: dict[str, Source] = {}
        for name, made in by_block.items():
            made.sort(key=lambda pair: pair[0][:2])
            columns = {column: [values[column] for _, values in made] for column in made[0][1]}
            arrays = {c: [v for v in vs if isinstance(v, np.ndarray)] for c, vs in columns.items()}
            streams = {
                c: ([len(a) for a in vs], [raw_bytes(a) for a in vs]) for c, vs in arrays.items()
            }
            rows = [row for row, _ in made]
            sources |= block_sources(name, self.header.blocks[name], rows, columns, streams)
        content = {
            "batch": [int(n) for n in batch_shape],
            "blocks": {name: self.header.blocks[name].plain() for name in by_block},
            "extraction": self._extraction,
            "format": FORMAT,
            "kind": "shard",
            "sequence": 1 + max(self._shards.values(), default=0),
        }
        named = hashlib.sha256("".join(sorted(todo)).encode("ascii")).hexdigest()[:32]
        with drafting(self.folder) as draft:
            pack(draft, content, sources)
            draft.sync()
            draft.publish(self.folder / f"{named}.h5", replace=False)

    def clear(self) -> None:
        """Removes the shards seen so far, and the folder if nothing else is in it.

        Damaged files stay, and what another job committed since the last look.
        """
        with storage_errors(self.folder), suppress(FileNotFoundError):
            for name in sorted(self._shards):
                (self.folder / name).unlink(missing_ok=True)
            sync_folder(self.folder)
            left = {path.name for path in self.folder.iterdir()}
            if any(_SHARD.fullmatch(name) for name in left):
                return
            (self.folder / EXTRACTION).unlink(missing_ok=True)
            sweep(self.folder)
            if not any(self.folder.iterdir()):
                _remove_folder(self.folder)


def _remove_folder(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another job was about to write
            raise
    else:
        sync_folder(folder.parent)
