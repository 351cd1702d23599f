"""Merging: sealed caches of one data set become one, in any order with the same bytes."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.blocks import BlockSpec, ClassRecord
from cache.combining.gathering import OpenBlock, Row, gathered
from cache.combining.joining import join_provenance, join_recipes
from cache.errors import CacheMismatchError, RecipeError
from cache.extraction import ExtractionHeader
from cache.inspect import safe_text, verify
from cache.packing import Source
from cache.plain import first_difference
from cache.publishing import check_target, write_sealed
from cache.store import KnowledgeCache

FIRST = 3  # conflicts named in the message


@dataclass(frozen=True)
class Conflict:
    """One thing that two files say differently.

    Attributes:
        what: what differs.
        files: one file for every version.
        block: name of the block, for blocks and entries.
        class_id: the class, for classes and entries.
        item: number of the entry within its class.
        difference: the largest difference of a component, for arrays of one shape.
    """

    what: str
    files: tuple[str, ...]
    block: str | None = None
    class_id: str | None = None
    item: int | None = None
    difference: float | None = None

    def describe(self) -> str:
        """One line."""
        names = {"block": self.block, "class": self.class_id, "item": self.item}
        place = ", ".join(f"{name} {value}" for name, value in names.items() if value is not None)
        by = "" if self.difference is None else f" by up to {self.difference:.6g}"
        return f"{place}: {self.what}{by}"


class MergeConflictsError(CacheMismatchError):
    """Files that contradict each other; nothing was written.

    Attributes:
        conflicts: all of them.
    """

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        count = len(self.conflicts)
        first = "; ".join(conflict.describe() for conflict in self.conflicts[:FIRST])
        more = f"; and {count - FIRST} more" if count > FIRST else ""
        files = " and ".join(sorted({name for one in self.conflicts for name in one.files}))
        do = (
            "Nothing was written. Compare with `vademecum cache diff`; preferring one file decides "
        )
        do += "entries, not class tables and block specifications."
        what = f"{count} conflict{'s'[: count > 1]}: {first}{more}"
        super().__init__(what, where=files, do=do)

    def to_json(self) -> dict[str, Any]:
        """All conflicts as plain data."""
        return {"conflicts": [asdict(conflict) for conflict in self.conflicts]}


@dataclass(frozen=True)
class MergeReport:
    """What a merge made.

    Attributes:
        path: of the new file.
        content_id: of the new file.
        classes: how many it has.
        blocks: how many it has.
        entries: how many it has.
        deduplicated: entries that more files had alike.
        preferred: conflicts in which the entry of the preferred file was taken.
    """

    path: Path
    content_id: str
    classes: int
    blocks: int
    entries: int
    deduplicated: int
    preferred: int

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "path": str(self.path)}

    def describe(self) -> str:
        """The report as lines for a terminal."""
        counts = f"{self.classes} classes, {self.blocks} blocks, {self.entries} entries"
        notes = f"{self.deduplicated} entries stood in more than one file"
        if self.preferred:
            notes += f"; {self.preferred} conflicts decided by the preferred file"
        return f"{self.path}  {self.content_id}\n{counts}\n{notes}"


def merge(
    files: Sequence[Path], out: Path, *, prefer: Path | None = None, replace: bool = False
) -> MergeReport:
    """One cache with the classes, blocks and entries of all; says what it made.

    The order of the files does not matter, nor how they are grouped into several merges, nor
    whether one is given twice: the bytes are the same. All files are verified in full before any
    value is used. Arrays are read one entry at a time.

    Args:
        files: sealed caches of one data set; one alone is copied.
        out: the file to make.
        prefer: one of `files`; where others contradict it, its entry is taken.
        replace: exchange a cache of another content called `out`; its readers keep the old.

    Raises:
        MergeConflictsError: files that contradict each other; it lists every conflict.
        CacheMismatchError: another data set, or `out` is something else.
        CacheFormatError: a file that is missing, foreign or damaged.
        RecipeError: no files, or `prefer` is none of them.
        StorageError: no space, no permission.
    """
    if not files:
        what, do = "nothing to merge", "Name at least one cache."
        raise RecipeError(what, do=do)
    if prefer is not None and prefer not in files:
        what = "the preferred file is not one of those that are merged"
        raise RecipeError(what, where=prefer, wanted="one of " + ", ".join(map(str, files)))
    check_target(out)
    with ExitStack() as stack:
        opened = []
        for path in files:
            identity = verify(path).content_id
            opened.append(stack.enter_context(KnowledgeCache.open(path, expect=identity)))
        return _Merge(opened, prefer).write(out, replace=replace)


class _Merge:
    """Everything that was found in the files, and what contradicts each other."""

    def __init__(self, opened: Sequence[KnowledgeCache], prefer: Path | None) -> None:
        self.opened, self.prefer = opened, prefer
        self.conflicts: list[Conflict] = []
        self.deduplicated = self.preferred = 0
        self.dataset = self._dataset()
        self.classes = self._classes()
        self.specs = self._specs()

    def write(self, out: Path, *, replace: bool) -> MergeReport:
        """Joins everything and makes the file."""
        rows = {name: self._rows(name) for name in sorted(self.specs)}
        named = [(str(one.path), one.recipe) for one in self.opened]
        prefer = None if self.prefer is None else str(self.prefer)
        recipe, contested = join_recipes(named, prefer)
        what = "the recipes describe it differently"
        self.conflicts += [Conflict(what, by, class_id=safe_text(name)) for name, by in contested]
        if self.conflicts:
            raise MergeConflictsError(self.conflicts)
        provenance = join_provenance(one.provenance for one in self.opened)
        classes = tuple(self.classes.values())
        header = ExtractionHeader(self.dataset, classes, self.specs, recipe, provenance)
        sources: dict[str, Source] = header.sources()
        for name, chosen in rows.items():
            sources |= gathered(name, self.specs[name], chosen, header.class_index)
        content_id = write_sealed(header.content("knowledge"), sources, out, replace=replace)
        return MergeReport(
            path=out,
            content_id=content_id,
            classes=len(classes),
            blocks=len(rows),
            entries=sum(map(len, rows.values())),
            deduplicated=self.deduplicated,
            preferred=self.preferred,
        )

    def _dataset(self) -> str:
        first = self.opened[0]
        for other in self.opened[1:]:
            if other.dataset != first.dataset:
                what, do = "another data set than the first file", "Merge caches of one data set."
                found, wanted = other.dataset, first.dataset
                raise CacheMismatchError(what, where=other.path, found=found, wanted=wanted, do=do)
        return first.dataset

    def _classes(self) -> dict[str, ClassRecord]:
        found: dict[str, tuple[ClassRecord, KnowledgeCache]] = {}
        for one in self.opened:
            for record in one.classes:
                known, where = found.setdefault(record.id, (record, one))
                for field in ("name", "modality", "source"):
                    have, want = getattr(record, field), getattr(known, field)
                    if have != want:
                        what = f"another {field} ({_shown(want)}, {_shown(have)})"
                        self._conflict(what, (where, one), class_id=record.id)
        return {name: record for name, (record, _) in sorted(found.items())}

    def _specs(self) -> dict[str, BlockSpec]:
        found: dict[str, tuple[BlockSpec, KnowledgeCache]] = {}
        for one in self.opened:
            for name, spec in one.sealed.header.specs.items():
                known, where = found.setdefault(name, (spec, one))
                different = first_difference(known.plain(), spec.plain())
                if different is not None:
                    place, want, have = different
                    what = f"another {place} ({_shown(want)}, {_shown(have)})"
                    self._conflict(what, (where, one), block=name)
        return {name: spec for name, (spec, _) in found.items()}

    def _conflict(self, what: str, found: Sequence[KnowledgeCache], **place: Any) -> None:
        files = tuple(str(one.path) for one in found)
        self.conflicts.append(Conflict(what, files, **place))

    def _rows(self, name: str) -> list[Row]:
        """One entry for every place of a block."""
        places: dict[tuple[str, int], list[Row]] = {}
        for one in self.opened:
            # A block that is defined otherwise is a conflict already.
            if one.sealed.header.specs.get(name) == self.specs[name]:
                for row in OpenBlock(one, name).rows():
                    places.setdefault((row.class_id, row.item), []).append(row)
        return [self._one(rows) for _, rows in sorted(places.items())]

    def _one(self, rows: Sequence[Row]) -> Row:
        """The entry of one place; a conflict if the files do not agree."""
        versions = {(row.key, row.digest): row for row in reversed(rows)}
        if len(versions) == 1:
            self.deduplicated += len(rows) - 1
            return rows[0]
        winner = next((row for row in rows if row.block.path == self.prefer), None)
        if winner is not None:
            self.preferred += 1
            return winner
        different = list(versions.values())[::-1]
        keys = {row.key for row in different}
        what = "made from other texts" if len(keys) > 1 else "other values under the same key"
        first = different[0]
        conflict = Conflict(
            what,
            files=tuple(str(row.block.path) for row in different),
            block=first.block.name,
            class_id=first.class_id,
            item=first.item,
            difference=_largest_difference(different),
        )
        self.conflicts.append(conflict)
        return first


def _shown(value: object) -> str:
    return repr(safe_text(str(value)))


def _largest_difference(rows: Sequence[Row]) -> float | None:
    """Between the arrays of the first entry and the others; None without arrays of one shape."""
    arrays: list[np.ndarray] = [a for row in rows if (a := row.array()) is not None]
    if not arrays or any(a.shape != arrays[0].shape for a in arrays):
        return None
    first = arrays[0].astype(np.float64)
    return max(float(np.abs(other - first).max()) for other in arrays[1:])
