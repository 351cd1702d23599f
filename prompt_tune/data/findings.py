"""What `data check` found, as text and as plain data."""

from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["fault", "warning"]
SHOWN = 10  # of each finding but broken files, which are all shown
IN_FULL = ("missing", "unreadable")


@dataclass(frozen=True)
class Finding:
    """Something about the data that somebody should know.

    Attributes:
        level: a `fault` makes the check fail; a `warning` does not.
        kind: one word or two.
        text: what it is.
        items: every file, case, pair or patient it is about.
    """

    level: Level
    kind: str
    text: str
    items: tuple[str, ...] = ()

    def describe(self) -> str:
        """A line, and below it what it is about."""
        shown = self.items if self.kind in IN_FULL else self.items[:SHOWN]
        rest = len(self.items) - len(shown)
        more = [f"  ... and {rest} more; --json lists all"] if rest else []
        return "\n".join([f"{self.level}: {self.text}", *(f"  {i}" for i in shown), *more])


@dataclass(frozen=True)
class SplitFacts:
    """What one split holds; `majority` is the accuracy of always answering its commonest class."""

    images: int
    classes: dict[str, int]
    majority: float
    commonest: str
    sizes: dict[str, int]
    modes: dict[str, int]
    patients: int | None


@dataclass(frozen=True)
class DataReport:
    """Counts and findings.

    The check fails on: a file that is missing or cannot be read; a label that is no class; a split
    that is missing or empty; a class without a training image; a file listed twice; the same
    pixels or the same patient in two splits, unless the declaration says `overlap: allow`; the
    same pixels under two classes; and, with `expected: {strict: true}`, counts or a file digest
    other than expected. Everything else is a warning.
    """

    dataset: str
    facts: dict[str, Any]
    splits: dict[str, SplitFacts]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there is no fault."""
        return all(f.level != "fault" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; every finding with all its items."""
        return {
            "dataset": self.dataset,
            "passed": self.passed,
            **self.facts,
            "splits": {name: vars(split) for name, split in self.splits.items()},
            "findings": [vars(f) | {"items": list(f.items)} for f in self.findings],
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        """A table of counts, then what was found."""
        lines = [f"{self.dataset}: " + ", ".join(f"{k} {v}" for k, v in self._known())]
        lines += self._table()
        for name, split in self.splits.items():
            sizes = ", ".join(f"{size} ({n})" for size, n in list(split.sizes.items())[:3])
            sizes += f" and {len(split.sizes) - 3} other sizes" if len(split.sizes) > 3 else ""
            modes = ", ".join(f"{mode} ({n})" for mode, n in split.modes.items())
            lines.append(f"{name}: {sizes or 'no readable image'}; {modes}".rstrip("; "))
            lines.append(
                f"{name}: always answering {split.commonest!r} is right in {split.majority:.1%}"
            )
        for name in ("counts_as_expected", "file_as_expected"):
            if self.facts[name]:
                lines.append(name.replace("_", " "))
        lines += [f.describe() for f in self.findings]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "passed" if self.passed else "failed"])

    def _known(self) -> list[tuple[str, Any]]:
        keys = ("source", "licence", "modality", "organ")
        return [(k, self.facts[k]) for k in keys if self.facts[k]]

    def _table(self) -> list[str]:
        names = list(self.splits)
        ids = list(next(iter(self.splits.values())).classes) if names else []
        width = max(map(len, [*ids, "images"]), default=6)
        rows = [("", names)]
        rows += [(c, [str(self.splits[n].classes[c]) for n in names]) for c in ids]
        rows.append(("images", [str(self.splits[n].images) for n in names]))
        return [f"{label:{width}}" + "".join(f"{v:>9}" for v in values) for label, values in rows]
