"""Reading a sealed knowledge cache."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np

from cache.blocks import KINDS, BlockSpec, ClassRecord, Entry, normal_text
from cache.errors import CacheFormatError, CacheMismatchError, MissingKnowledgeError
from cache.header import check_expected
from cache.plain import strict_json
from cache.registry import suggest
from cache.sealed import SealedFile
from cache.tables import BlockTable, read_classes


@dataclass(frozen=True)
class Alignment:
    """Where the classes of a data set stand in a cache, in the order of the data's labels."""

    positions: tuple[int, ...]
    ids: tuple[str, ...]
    unused: tuple[ClassRecord, ...]


class Block:
    """One typed block of an open cache.

    Attributes:
        name: of the block.
        kind: `states`, `texts`, `attributes` or `embeddings`.
        id: SHA-256 of its specification and data, whatever else the file holds.
        spec: what defines its values.
        layers: the decoder layers that are stored, in the order of the array's second axis.
        width: length of the array's last axis, or None.
    """

    def __init__(self, owner: "KnowledgeCache", sealed: SealedFile, name: str) -> None:
        self._owner, self._sealed = owner, sealed
        block_spec: BlockSpec = sealed.header.specs[name]
        self.name, self.kind = name, block_spec.kind
        self.id = str(sealed.header.content["blocks"][name]["id"])
        self.spec: Mapping[str, Any] = MappingProxyType(dict(block_spec.spec))
        self.layers, self.width = block_spec.layers, block_spec.width
        self.dtype = block_spec.dtype

    @cached_property
    def _table(self) -> BlockTable:
        return BlockTable(self._sealed, self.name, len(self._owner.classes))

    def __len__(self) -> int:
        """Number of entries of all classes together."""
        return len(self._table)

    def items(self, class_id: str) -> int:
        """How many items a class has here; they are numbered from 0.

        Raises:
            MissingKnowledgeError: no such class in the cache.
        """
        index = self._owner.position(class_id)
        kind, item = self._table.index
        first, last = np.searchsorted(kind, [index, index + 1])
        return int(item[last - 1]) + 1 if last > first else 0

    def _row(self, class_id: str, item: int) -> int:
        row = self._table.find(self._owner.position(class_id), item)
        if row is None:
            where = f"{self._sealed.path}, block {self.name}, class {class_id}"
            what = f"no item {item}"
            do = "Extract it: add it to the recipe and run `vademecum extract` again."
            found = f"{self.items(class_id)} items"
            raise MissingKnowledgeError(what, where=where, found=found, do=do)
        return row

    def array(self, class_id: str, item: int = 0) -> np.ndarray:
        """The array of one entry, a read-only view of the file without a copy.

        `[rows, layers, width]` for `states`, `[rows, width]` for `embeddings`.

        Raises:
            MissingKnowledgeError: no such class or item, or a block without arrays.
            CacheFormatError: the block's bytes are damaged.
        """
        self._arrays()
        values = self._table.values(self._row(class_id, item))["values"]
        if not isinstance(values, np.ndarray):
            what = "not an array"
            raise CacheFormatError(what, where=self._sealed.path)
        return values

    def text(self, class_id: str, item: int = 0) -> dict[str, str | int]:
        """The text and integer columns of one entry.

        Raises:
            MissingKnowledgeError: no such class or item.
            CacheFormatError: the block's bytes are damaged.
        """
        if self.dtype is not None:
            what = f"a block of {self.kind} holds no texts"
            raise MissingKnowledgeError(what, where=f"{self._sealed.path}, block {self.name}")
        values = self._table.values(self._row(class_id, item))
        return {name: value for name, value in values.items() if isinstance(value, str | int)}

    def keys(self) -> tuple[str, ...]:
        """The key of every entry, in file order; see `cache.blocks.entry_key`."""
        return tuple(row.tobytes().hex() for row in self._table.column("keys"))

    def entries(self) -> Iterator[Entry]:
        """Every entry, in file order, ready to be committed elsewhere."""
        kind, item = self._table.index
        sources = self._table.column("sources")
        for row in range(len(self._table)):
            class_id = self._owner.classes[int(kind[row])].id
            source = sources[row].tobytes().hex()
            yield Entry(self.name, class_id, int(item[row]), self._table.values(row), source)

    def digests(self) -> np.ndarray:
        """SHA-256 of every entry's values, `[entries, 32]` bytes, in file order."""
        return self._table.column("digests")

    def column_names(self) -> tuple[str, ...]:
        """The columns of every entry."""
        return tuple(KINDS[self.kind].columns)

    def _arrays(self) -> str:
        """The dataset that holds the arrays."""
        if self.dtype is None:
            what = f"a block of {self.kind} holds no arrays"
            raise MissingKnowledgeError(what, where=f"{self._sealed.path}, block {self.name}")
        return f"{self.name}__values"

    def values(self) -> np.ndarray:
        """The rows of all entries one after the other, a read-only view; `offsets` splits them.

        Raises:
            MissingKnowledgeError: a block without arrays.
            CacheFormatError: the block's bytes are damaged.
        """
        return self._sealed.array(self._arrays())

    def offsets(self) -> np.ndarray:
        """The first row of each entry in `values`, in file order, and the end."""
        self._arrays()
        return self._table.offsets

    def layer(self, number: int) -> np.ndarray:
        """Decoder layer `number` of all entries, `[rows, width]`, a read-only view.

        Raises:
            MissingKnowledgeError: a layer that is not stored, or a block without layers.
        """
        if number not in self.layers:
            what, found = f"no layer {number}", f"layers {list(self.layers)}"
            where = f"{self._sealed.path}, block {self.name}"
            raise MissingKnowledgeError(what, where=where, found=found)
        return self.values()[:, self.layers.index(number)]

    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """What `values` shows, copied into memory of its own; see `SealedFile.read`."""
        return self._sealed.read(self._arrays(), out)


class _Blocks(Mapping[str, Block]):
    """Blocks by name; a missing one is an error that names the nearest."""

    def __init__(self, owner: "KnowledgeCache", sealed: SealedFile) -> None:
        self._sealed = sealed
        self._blocks = {name: Block(owner, sealed, name) for name in sorted(sealed.header.specs)}

    def __getitem__(self, name: str) -> Block:
        if name not in self._blocks:
            what, do = f"no block {name!r}", suggest(str(name), self._blocks)
            raise MissingKnowledgeError(what, where=self._sealed.path, do=do)
        return self._blocks[name]

    def __contains__(self, name: object) -> bool:
        return name in self._blocks

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


class KnowledgeCache:
    """An open knowledge cache; a context manager. Made by `open`.

    Attributes:
        path: of the file.
        size: of the file in bytes.
        sealed: the file underneath.
        content_id: SHA-256 of the content; what to cite and to pin.
        dataset: id of the data set its classes belong to.
        blocks: by name; a missing one is a MissingKnowledgeError.
    """

    def __init__(self, sealed: SealedFile) -> None:
        self.sealed = sealed
        self.path = sealed.path
        self.size = sealed.header.size
        self.content_id = sealed.header.content_id
        self.dataset = str(sealed.header.content["dataset"])
        self.blocks: Mapping[str, Block] = _Blocks(self, sealed)

    @classmethod
    def open(
        cls, path: Path, *, expect: str | None = None, verify: Literal["lazy", "full"] = "lazy"
    ) -> Self:
        """An open cache.

        Args:
            path: the file.
            expect: the content id it must have (or at least 12 digits of its start).
            verify: `lazy` digests every dataset when it is first touched; `full` all at once,
                with the structure.

        Raises:
            CacheFormatError: missing, foreign, damaged, incomplete or of a newer version.
            CacheMismatchError: sound, but not the one expected.
            StorageError: the operating system refused to read it.
        """
        sealed = SealedFile(path)
        try:
            check_kind(sealed)
            check_expected(sealed.header.content_id, expect, path)
            if verify == "full":
                sealed.verify_bytes()
                sealed.verify_structure()
            return cls(sealed)
        except BaseException:
            sealed.close()
            raise

    def close(self) -> None:
        """Lets go of the file; arrays that were given out stay readable."""
        self.sealed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def classes(self) -> tuple[ClassRecord, ...]:
        """The classes, sorted by id."""
        return read_classes(self.sealed)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {record.id: index for index, record in enumerate(self.classes)}

    def position(self, class_id: str) -> int:
        """Where a class stands in `classes`.

        Raises:
            MissingKnowledgeError: nowhere.
        """
        if class_id not in self._positions:
            what, do = f"no class {class_id!r}", suggest(class_id, self._positions)
            raise MissingKnowledgeError(what, where=self.path, do=do)
        return self._positions[class_id]

    def _table(self, name: str) -> dict[str, Any]:
        try:
            found = strict_json(self.sealed.array(name).tobytes())
        except ValueError as error:
            what = f"dataset {name} is not JSON"
            raise CacheFormatError(what, where=self.path) from error
        if not isinstance(found, dict):
            what = f"dataset {name} is not a table"
            raise CacheFormatError(what, where=self.path)
        return found

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe with its texts; numbers that are no integers are decimal strings."""
        return self._table("recipe")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Where the content comes from: licences, notices, versions."""
        return self._table("provenance")

    def align(self, dataset: str, classes: Sequence[tuple[str, str, str | None]]) -> Alignment:
        """Where the classes of a data set stand here, in the order given.

        Args:
            dataset: id of the data set.
            classes: `(id, name, modality)` in the order of the data's labels; modality None if
                the data does not say. An empty modality of the cache fits every one.

        Raises:
            CacheMismatchError: another data set, or one id under another name or modality.
            MissingKnowledgeError: a class the cache does not hold; it is named.
        """
        if dataset != self.dataset:
            what, do = "the cache was made for another data set", "Use the one made for it."
            found, wanted = self.dataset, dataset
            raise CacheMismatchError(what, where=self.path, found=found, wanted=wanted, do=do)
        positions = []
        for class_id, name, modality in classes:
            self._check_class(class_id, name, modality)
            positions.append(self.position(class_id))
        ids = tuple(class_id for class_id, _, _ in classes)
        twice = next((i for i in ids if ids.count(i) > 1), None)
        if twice is not None:
            what = f"the data has the class {twice!r} twice"
            raise CacheMismatchError(what, where=self.path)
        unused = tuple(record for record in self.classes if record.id not in ids)
        return Alignment(tuple(positions), ids, unused)

    def _check_class(self, class_id: str, name: str, modality: str | None) -> None:
        if class_id not in self._positions:
            what = f"the class {class_id!r} ({name}) of the data is not in the cache"
            do = "Add it to the recipe and extract again, or leave it out with `classes:`."
            listing = ", ".join(list(self._positions)[:20])
            raise MissingKnowledgeError(what, where=self.path, found=listing, do=do)
        record = self.classes[self._positions[class_id]]
        given = {"name": name, "modality": record.modality if modality is None else modality}
        for field, wanted in given.items():
            have = getattr(record, field)
            if field == "modality" and not have:
                continue  # the cache does not say
            if normal_text(wanted, f"class {class_id}, {field}") != have:
                what = f"the class {class_id!r} has another {field} in the cache than in the data"
                option = {"name": "--classes names.yaml", "modality": "--modality"}[field]
                do = "They may be different classes; correct one of the two. A cache of texts or "
                do += f"states made elsewhere takes it from {option}."
                raise CacheMismatchError(
                    what, where=self.path, found=repr(have), wanted=repr(wanted), do=do
                )


def check_kind(sealed: SealedFile) -> None:
    """Nothing, if a file is a whole cache.

    Raises:
        CacheFormatError: a part of an unfinished extraction.
    """
    if sealed.header.kind != "knowledge":
        what = "a part of an unfinished extraction, not a knowledge cache"
        do = "Run the extraction to its end."
        raise CacheFormatError(what, where=sealed.path, do=do)
