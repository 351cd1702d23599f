"""Texts and attributes made elsewhere, added to a sealed cache with their source and licence."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cache.blocks import BlockSpec, ClassRecord, Entry, Value, normal_text
from cache.combining.adding import add_entries, seal_entries
from cache.errors import MissingKnowledgeError, RecipeError, UnknownNameError, ValueRefusedError
from cache.extraction import ExtractionHeader
from cache.foreign.importing import slug
from cache.foreign.text_files import COLUMNS, Row, read_bytes, read_rows
from cache.inspect import verify
from cache.plain import is_token
from cache.recipe import digest_of
from cache.registry import suggest
from cache.sharing.licences import licence_of
from cache.store import KnowledgeCache

REVISION = 1  # of how texts become entries; part of every key


@dataclass(frozen=True)
class About:
    """What the user says about a file of texts; nothing of it can be seen in the file.

    Args:
        block: name of the block to make.
        source: who or what made the texts, in words.
        licence: of the texts, as an SPDX id or the tag of a hub; `unknown` if it is.
        kind: `texts` or `attributes`.

    Raises:
        RecipeError: no source or licence, or another kind.
    """

    block: str
    source: str
    licence: str
    kind: str = "texts"

    def __post_init__(self) -> None:
        for name in ("source", "licence"):
            if not getattr(self, name).strip():
                what, do = "texts need a source and a licence", "Say `unknown` if it is."
                raise RecipeError(what, where=name, found="nothing", do=do)
        if self.kind not in COLUMNS:
            what, wanted = "not a kind of texts", "texts or attributes"
            raise RecipeError(what, where="kind", found=repr(self.kind)[:80], wanted=wanted)


@dataclass(frozen=True)
class AddReport:
    """What was added.

    Args:
        content_id: of the sealed cache.
        path: of the sealed cache.
        block: the new block.
        kind: of the block.
        entries: of the new block, by class id.
        empty: texts that held nothing and were left out.
        duplicates: texts that stand more than once in their class; they are kept, because averages
            over texts count them.
        licence: of the texts, and what it is for `push`.
    """

    content_id: str
    path: Path
    block: str
    kind: str
    entries: Mapping[str, int]
    empty: int
    duplicates: int
    licence: str

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "path": str(self.path)}

    def describe(self) -> str:
        """The report as lines for a terminal."""
        counts = sorted(set(self.entries.values()))
        each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return "\n".join(
            [
                f"{self.path}  {self.content_id}",
                f"block {self.block}: {self.kind} of {len(self.entries)} classes, {each} each",
                f"empty, left out: {self.empty}; duplicates, kept: {self.duplicates}",
                f"licence of the texts: {self.licence}",
            ]
        )


def add_texts(
    into: Path, texts: Path, out: Path, about: About, *, replace: bool = False
) -> AddReport:
    """Makes a cache with everything another one has and one more block, of texts from a file.

    A class is named by its id or name, exactly or without regard to case, underscores and hyphens.
    Texts are stripped of outer white space and stored in Unicode normal form C, in the order of
    the file; attributes are sorted by their name and rank.

    Args:
        into: a sealed cache.
        texts: JSON, YAML or CSV; see `text_files.read_rows`.
        out: the sealed cache to make.
        about: what the file does not say.
        replace: exchange another cache that has the name `out`.

    Raises:
        CacheFormatError: `texts` is not such a file, or `into` no sound cache.
        MissingKnowledgeError: a class without texts.
        UnknownNameError: a name that no class, or more than one, answers to.
        ValueRefusedError: a text that may not go into a cache, or too many of them.
        CacheMismatchError: the cache has another block of this name, or `out` is something else.
        StorageError: no space, no permission.
    """
    raw = read_bytes(texts)
    rows = read_rows(raw, texts, about.kind)
    with KnowledgeCache.open(into, expect=verify(into).content_id) as opened:
        dataset, records = opened.dataset, opened.classes
    made = _Made(about, texts, raw, rows, records)
    header = made.header(dataset)
    return made.report(add_entries(into, header, made.entries, out, replace=replace), out)


def new_texts(
    texts: Path,
    out: Path,
    about: About,
    *,
    dataset: str,
    classes: Mapping[str, str] | None = None,
    modality: str = "",
    replace: bool = False,
) -> AddReport:
    """Makes a cache of nothing but the texts in a file.

    Args:
        texts: see `add_texts`.
        out: the sealed cache to make.
        about: what the file does not say.
        dataset: id of the data set.
        classes: name by class id; None makes a class of every name in the file.
        modality: of all classes.
        replace: exchange another cache that has the name `out`.

    Raises:
        CacheError: see `add_texts`.
        ValueRefusedError: no class id can be made of a name.
    """
    raw = read_bytes(texts)
    rows = read_rows(raw, texts, about.kind)
    if classes is None:
        classes = _classes_in(rows, texts)
    records = [ClassRecord(id_, name, modality) for id_, name in classes.items()]
    made = _Made(about, texts, raw, rows, records)
    header = made.header(dataset)
    return made.report(seal_entries(header, made.entries, out, replace=replace), out)


def _classes_in(rows: Sequence[Row], path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in dict.fromkeys(str(row["class"]) for row in rows):
        if not slug(name) or slug(name) in found:
            what, do = "no class id of its own can be made of a name", "Give a table of classes."
            raise ValueRefusedError(what, where=path, found=repr(name)[:80], do=do)
        found[slug(name)] = name
    return found


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", normal_text(name, "class").casefold())).strip()


def _matched(names: Sequence[str], records: Sequence[ClassRecord], path: Path) -> Mapping[str, str]:
    """The class id of every name in a file."""
    found: dict[str, str] = {}
    known = [text for record in records for text in (record.id, record.name)]
    for name in names:
        own = [r.id for r in records if normal_text(name, "class") in {r.id, r.name}]
        own = own or [r.id for r in records if _plain(name) in {_plain(r.id), _plain(r.name)}]
        if len(own) != 1:
            what = f"the name {name!r} is that of {len(own) or 'no'} classes"
            do = "Use class ids." if own else suggest(name, dict.fromkeys(known))
            raise UnknownNameError(what, where=path, do=do)
        if own[0] in found.values():
            what = f"two names are those of the class {own[0]!r}"
            twin = next(n for n, i in found.items() if i == own[0])
            raise UnknownNameError(what, where=path, found=f"{twin!r} and {name!r}")
        found[name] = own[0]
    return found


class _Made:
    """The block that a file becomes."""

    def __init__(
        self,
        about: About,
        path: Path,
        raw: bytes,
        rows: Sequence[Row],
        records: Sequence[ClassRecord],
    ) -> None:
        self.about, self.path, self.records = about, path, tuple(records)
        self.file = sha256(raw).hexdigest()
        ids = _matched(list(dict.fromkeys(str(row["class"]) for row in rows)), records, path)
        self.empty = 0
        by_class: dict[str, list[Row]] = {record.id: [] for record in records}
        for row in rows:
            clean = {k: _clean(v) for k, v in row.items() if k != "class"}
            if all(v != "" for k, v in clean.items() if k != "rank"):
                by_class[ids[str(row["class"])]].append(clean)
            else:
                self.empty += 1
        without = [record for record in records if not by_class[record.id]]
        if without:
            what = f"the class {without[0].id!r} ({without[0].name}) has no {about.kind}"
            near = suggest(without[0].name, ids) if ids else "The file names no class."
            raise MissingKnowledgeError(what, where=path, do=near)
        order = _texts if about.kind == "texts" else self._attributes
        columns = {class_id: order(own) for class_id, own in by_class.items()}
        self.counts = {class_id: len(own) for class_id, own in columns.items()}
        self.duplicates = sum(_repeated(own) for own in columns.values())
        self.entries = [
            Entry(about.block, class_id, item, values, digest_of(dict(values)))
            for class_id, own in columns.items()
            for item, values in enumerate(own)
        ]

    def _attributes(self, rows: Sequence[Row]) -> list[dict[str, Value]]:
        """Values by attribute and rank; where no rank is given, in the order of the file."""
        made: list[dict[str, Value]] = []
        seen: Counter[str] = Counter()
        for row in rows:
            attribute = str(row["attribute"])
            rank = row.get("rank")
            rank = seen[attribute] if rank is None or rank == "" else rank
            seen[attribute] += 1
            made.append({"attribute": attribute, "value": row["value"], "rank": rank})
        made.sort(key=lambda one: (str(one["attribute"]), int(one["rank"])))
        places = Counter((one["attribute"], one["rank"]) for one in made)
        if twice := next((place for place, n in places.items() if n > 1), None):
            what = "two values of an attribute have one rank"
            raise ValueRefusedError(what, where=self.path, found=f"{twice[0]}, rank {twice[1]}")
        return made

    def header(self, dataset: str) -> ExtractionHeader:
        """What the cache of this block alone is bound to."""
        about = self.about
        licence = about.licence.strip()
        spec = {
            "revision": REVISION,
            "source": "added",
            "file": self.file,
            "words": digest_of(about.source),
            "licence": licence if is_token(licence) else digest_of(licence),
        }
        added = {"block": about.block, "files": {self.path.name: self.file}}
        told = {f"{about.block}_source": about.source, f"{about.block}_licence": licence}
        return ExtractionHeader(
            dataset,
            self.records,
            {about.block: BlockSpec(about.kind, spec)},
            {"added": added},
            {**told, "tool": "vademecum"},
        )

    def report(self, content_id: str, out: Path) -> AddReport:
        """What was made."""
        licence = licence_of(self.about.licence)
        return AddReport(
            content_id,
            out,
            self.about.block,
            self.about.kind,
            self.counts,
            self.empty,
            self.duplicates,
            f"{licence.names[0]} ({licence.kind})",
        )


def _clean(value: Any) -> Any:
    return normal_text(value, "texts").strip() if isinstance(value, str) else value


def _texts(rows: Sequence[Row]) -> list[dict[str, Value]]:
    counts = {"prompt_tokens": 0, "text_tokens": 0}  # no model read them
    return [{"text": row["text"], "prompt": "", **counts} for row in rows]


def _repeated(rows: Sequence[Mapping[str, Value]]) -> int:
    told = [(row.get("text"), row.get("attribute"), row.get("value")) for row in rows]
    return len(told) - len(set(told))
