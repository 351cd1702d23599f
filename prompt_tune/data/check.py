"""`data check`: everything that is wrong with images, labels and splits, all of it at once."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import DataError
from cache.progress import track
from prompt_tune.data.classes import class_table, renumbered
from prompt_tune.data.declaration import DataDeclaration
from prompt_tune.data.duplicates import (
    difference_hash,
    equal_groups,
    near_pairs,
    thumbnail,
)
from prompt_tune.data.expected import unexpected_counts, unexpected_file
from prompt_tune.data.findings import DataReport, Finding, Level, SplitFacts
from prompt_tune.data.images import ImageSplit, image_digest
from prompt_tune.data.protocols import base_to_novel
from prompt_tune.data.source import Opened, open_data
from prompt_tune.data.splits import SPLITS, Piece, pieces_of, split_of


@dataclass
class _Seen:
    """What reading the images gave, over all splits."""

    ids: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    thumbnails: list[Any] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _read(split: ImageSplit, seen: _Seen, missing: set[str], advance: Callable[[], None]) -> Any:
    """Reads every image of a split once; returns its sizes and modes."""
    sizes, modes = [], []
    for k in range(len(split)):
        advance()
        if split.files[k] in missing:
            continue
        try:
            image, mode = split.image_and_mode(k)
        except DataError as error:
            seen.broken.append(str(error))
            continue
        sizes.append(f"{image.width}x{image.height}")
        modes.append(mode)
        seen.ids.append(split.ids[k])
        seen.splits.append(split.name)
        seen.labels.append(int(split.labels[k]))
        seen.digests.append(image_digest(image))
        grey = image.convert("L")
        seen.hashes.append(difference_hash(grey))
        seen.thumbnails.append(thumbnail(grey))
    return _counted(sizes), _counted(modes)


def _pieces(opened: Opened) -> tuple[dict[str, Piece], tuple[str, ...], list[Finding]]:
    """Our splits, or those of the files where ours cannot be had."""
    try:
        pieces, notes = pieces_of(opened.found, opened.declaration, opened.place)
    except DataError as error:
        found = {
            n or "all": Piece(p, [*range(len(p.labels))]) for n, p in opened.found.parts.items()
        }
        return found, (), [Finding("fault", "splits", str(error))]
    return {name: pieces[name] for name in SPLITS if name in pieces}, notes, []


def _known_labels(
    pieces: dict[str, Piece], numbers: dict[str, int]
) -> tuple[dict[str, Piece], list[Finding]]:
    """The rows whose label is a class, and the other labels."""
    unknown = Counter(
        f"{label!r} in {name}"
        for name, piece in pieces.items()
        for label in piece.pick(piece.part.labels)
        if label not in numbers
    )
    kept = {
        name: Piece(piece.part, [i for i in piece.at if piece.part.labels[i] in numbers])
        for name, piece in pieces.items()
    }
    items = tuple(f"{label}: {n} images" for label, n in unknown.items())
    text = f"{len(items)} labels are none of the classes {', '.join(numbers)}"
    return kept, [Finding("fault", "label", text, items)] if items else []


def _files(pieces: dict[str, Piece], missing: set[str], broken: list[str]) -> list[Finding]:
    found = []
    if missing:
        text = f"{len(missing)} listed files are missing"
        found.append(Finding("fault", "missing", text, tuple(sorted(missing))))
    if broken:
        text = f"{len(broken)} images cannot be read"
        found.append(Finding("fault", "unreadable", text, tuple(broken)))
    for name, piece in pieces.items():
        twice = tuple(f for f, n in Counter(piece.pick(piece.part.files)).items() if n > 1)
        if twice:
            text = f"{len(twice)} files are listed more than once in {name}"
            found.append(Finding("fault", "listed twice", text, twice))
    return found


def _gaps(splits: dict[str, SplitFacts]) -> list[Finding]:
    found = [
        Finding("fault", "empty", f"the split {name!r} is empty")
        for name, split in splits.items()
        if not split.images
    ]
    for name, split in splits.items():
        none = tuple(c for c, n in split.classes.items() if not n)
        if none and split.images:
            text = f"{len(none)} classes have no image in {name}"
            found.append(Finding("fault" if name == "train" else "warning", "no image", text, none))
    return found


def _patients(splits: dict[str, ImageSplit], level: Level) -> list[Finding]:
    found = []
    for one, other in combinations(splits.values(), 2):
        shared = {p for p in one.patients if p} & {p for p in other.patients if p}
        if shared:
            text = f"{len(shared)} patients stand in both {one.name} and {other.name}"
            found.append(Finding(level, "patients", text, tuple(sorted(shared))))
    named = sum(p is not None for s in splits.values() for p in s.patients)
    total = sum(map(len, splits.values()))
    if 0 < named < total:
        text = f"{total - named} of {total} images name no patient"
        found.append(Finding("warning", "no patient", text))
    return found


def _three_lists() -> tuple[list[str], list[str], list[str]]:
    return [], [], []


def _equal(seen: _Seen, class_ids: Sequence[str], level: Level) -> list[Finding]:
    within, across, conflicts = _three_lists()
    for group in equal_groups(seen.digests):
        line = " = ".join(f"{seen.ids[k]} ({class_ids[seen.labels[k]]})" for k in group)
        if len({seen.labels[k] for k in group}) > 1:
            conflicts.append(line)
        (across if len({seen.splits[k] for k in group}) > 1 else within).append(line)
    found: tuple[tuple[Level, str, str, list[str]], ...] = (
        (level, "equal across splits", "images stand in more than one split", across),
        ("fault", "equal, two classes", "images stand under more than one class", conflicts),
        ("warning", "equal within a split", "images stand more than once in a split", within),
    )
    return [
        Finding(how, kind, f"{len(lines)} {text}", tuple(lines))
        for how, kind, text, lines in found
        if lines
    ]


def _near(seen: _Seen, class_ids: Sequence[str]) -> list[Finding]:
    if not seen.hashes:
        return []
    hashes = np.array(seen.hashes, dtype=np.uint64)
    near = near_pairs(hashes, np.stack(seen.thumbnails), seen.digests)
    within, across, conflicts = _three_lists()
    for a, b, bits in near.pairs:
        one, other = (f"{seen.ids[k]} ({class_ids[seen.labels[k]]})" for k in (a, b))
        line = f"{one} ~ {other}, {bits} of 64 bits differ"
        if seen.labels[a] != seen.labels[b]:
            conflicts.append(line)
        (across if seen.splits[a] != seen.splits[b] else within).append(line)
    found = [
        Finding("warning", kind, f"{len(lines)} {text}", tuple(lines))
        for kind, text, lines in (
            ("near across splits", "pairs look nearly the same across splits", across),
            ("near, two classes", "pairs look nearly the same under two classes", conflicts),
            ("near within a split", "pairs look nearly the same within a split", within),
        )
        if lines
    ]
    if near.crowded:
        text = f"{near.crowded} images share so much of their hash that not all were compared"
        found.append(Finding("warning", "not compared", text))
    return found


def _expected(
    opened: Opened, splits: dict[str, SplitFacts]
) -> tuple[list[Finding], dict[str, Any]]:
    declaration = opened.declaration
    counts = {name: tuple(split.classes.values()) for name, split in splits.items()}
    lines = unexpected_counts(declaration, counts)
    digest, wrong = unexpected_file(declaration, opened.place)
    known = declaration.expected.images
    facts = {
        "counts_as_expected": not lines if known else None,
        "file_as_expected": wrong is None if digest else None,
    }
    lines += [wrong] if wrong else []
    level: Level = "fault" if declaration.expected.strict else "warning"
    return [Finding(level, "expected", line) for line in lines], facts


def _facts(split: ImageSplit, sizes: dict[str, int], modes: dict[str, int]) -> SplitFacts:
    counts = split.counts()
    most = int(np.argmax(counts))
    patients = {p for p in split.patients if p}
    return SplitFacts(
        images=len(split),
        classes={c.id: n for c, n in zip(split.classes, counts, strict=True)},
        majority=counts[most] / max(len(split), 1),
        commonest=split.classes[most].id,
        sizes=sizes,
        modes=modes,
        patients=len(patients) or None,
    )


def _about(declaration: DataDeclaration, class_ids: Sequence[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        name: getattr(declaration, name) for name in ("source", "licence", "modality", "organ")
    }
    facts["base"], facts["novel"] = None, None
    with suppress(DataError):
        halves = base_to_novel(class_ids)
        facts["base"], facts["novel"] = list(halves.base), list(halves.novel)
    return facts


def check_data(spec: str | Path) -> DataReport:
    """Reads every image of the data at `spec` once and says all that is wrong; writes nothing.

    Args:
        spec: see `load_data`.

    Raises:
        RecipeError: the declaration is wrong.
        DataError: there are no data, or their listing cannot be read.
    """
    opened = open_data(spec)
    declaration, place = opened.declaration, opened.place
    level: Level = "fault" if declaration.overlap == "refuse" else "warning"
    classes, numbers = class_table(opened.found, declaration, place)
    ids = [c.id for c in classes]
    pieces, notes, findings = _pieces(opened)
    pieces, unknown = _known_labels(pieces, numbers)
    splits = {n: split_of(n, piece, classes, numbers, place) for n, piece in pieces.items()}
    missing = {path for part in opened.found.parts.values() for path in part.missing}
    seen, facts = _Seen(), {}
    with track("check", sum(map(len, splits.values()))) as progress:
        for name, split in splits.items():
            facts[name] = _facts(split, *_read(split, seen, missing, progress.advance))
    expected, matched = _expected(opened, facts)
    order = renumbered(opened.found, classes, numbers)
    findings += [
        *unknown,
        *(Finding("warning", "class order", note) for note in order),
        *_files(pieces, missing, seen.broken),
        *_gaps(facts),
        *_patients(splits, level),
        *_equal(seen, ids, level),
        *_near(seen, ids),
        *expected,
    ]
    return DataReport(
        dataset=declaration.dataset,
        facts=_about(declaration, ids) | matched,
        splits=facts,
        findings=tuple(findings),
        notes=(*notes, *declaration.notes),
    )
