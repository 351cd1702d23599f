"""`compare --base-to-novel`: accuracy on base and novel classes and their harmonic mean."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cache.durable import storage_errors, write_atomic
from cache.errors import RunError
from prompt_tune.data.protocols import mean_harmonic
from prompt_tune.method_groups import Group, find_runs, grouped
from prompt_tune.method_text import plus
from prompt_tune.statistics import mean_over_seeds
from prompt_tune.tables import FILES, TableStyle, csv_of, laid_out, plain, prose
from prompt_tune.transfer import BaseToNovel, base_to_novel_of

COLUMNS = ("base", "novel", "harmonic")
NOTE = (
    "Accuracy, mean ± standard deviation over seeds. Harmonic: of each seed's two accuracies, then "
    "averaged; not the harmonic mean of the two columns beside it."
)


@dataclass(frozen=True)
class BaseNovelTable:
    """Base-to-novel accuracies of methods, best harmonic mean first.

    Attributes:
        split: the evaluated one, and its part if any.
        rows: plain numbers of every method on every data set.
        averages: over data sets, of the methods that were run on all; none for one data set.
        left_out: the other methods.
    """

    split: str
    rows: tuple[dict[str, Any], ...]
    averages: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, None for NaN."""
        return plain(asdict(self))

    def text(self, style: TableStyle = "text") -> str:
        """One table of all data sets with its note; in CSV every number has its own column."""
        if style == "csv":
            return csv_of([_record(self.split, row) for row in (*self.rows, *self.averages)])
        cells = [["data set", "method", *COLUMNS, "seeds"]]
        for row in (*self.rows, *self.averages):
            values = [plus(*row[name]) for name in COLUMNS]
            seeds = str(len(row["seeds"])) if row["seeds"] else "–"
            cells.append([row["dataset"], row["method"], *values, seeds])
        note = NOTE
        if self.left_out:
            note += f" Not run on every data set, so in no average: {'; '.join(self.left_out)}."
        head = prose(f"base-to-novel, {self.split}", style)
        return "\n\n".join([head, laid_out(cells, style, left=(0, 1)), prose(note, style)])


def compare_base_to_novel(
    folders: Iterable[Path], *, split: str = "test", out: Path | None = None
) -> BaseNovelTable:
    """Base, novel and harmonic accuracy of methods; leaves `base-to-novel.md`, `.tex` and `.csv`.

    Args:
        folders: runs tuned on base classes and evaluated on both halves, or folders of such runs.
        split: the evaluated split; `test-120` where that was a part of 120 images.
        out: a folder for the tables.

    Raises:
        RunError: no runs, one that was not evaluated on both halves, or on other images than
            another, or two of one method with the same seed.
    """
    part = re.fullmatch(r"(.+)-(\d+)", split)
    name, images = (part[1], int(part[2])) if part else (split, None)
    seen: dict[str, tuple[tuple[str, str], Path]] = {}
    rows = []
    for group in grouped(find_runs(folders)):
        found = [base_to_novel_of(folder, split=name, part=images) for folder in group.folders]
        for one, folder in zip(found, group.folders, strict=True):
            known, where = seen.setdefault(group.dataset, (one.images, folder))
            if known != one.images:
                what = "the runs were evaluated on different images"
                raise RunError(what, where=group.dataset, found=f"{where} and {folder}")
        rows.append(_row(group, found))
    datasets = list(seen)
    rows.sort(key=lambda row: (datasets.index(row["dataset"]), -row["harmonic"][0]))
    table = BaseNovelTable(split, tuple(rows), *_averages(rows, len(datasets)))
    if out is not None:
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        for suffix, style in FILES.items():
            write_atomic(out / f"base-to-novel.{suffix}", (table.text(style) + "\n").encode())
    return table


def _row(group: Group, found: Sequence[BaseToNovel]) -> dict[str, Any]:
    _, spread = mean_over_seeds([one.harmonic for one in found])
    return {
        "dataset": group.dataset,
        "method": group.label,
        "seeds": list(group.seeds),
        "base": list(mean_over_seeds([one.base for one in found])),
        "novel": list(mean_over_seeds([one.novel for one in found])),
        "harmonic": [mean_harmonic([(one.base, one.novel) for one in found]), spread],
    }


def _averages(
    rows: Sequence[dict[str, Any]], datasets: int
) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """The mean over data sets of every column, and the methods that lack a data set."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    made: list[dict[str, Any]] = [
        {
            "dataset": f"mean of {datasets} data sets",
            "method": method,
            "seeds": [],
            **{name: [fmean(row[name][0] for row in own), math.nan] for name in COLUMNS},
        }
        for method, own in methods.items()
        if len(own) == datasets > 1
    ]
    made.sort(key=lambda row: -row["harmonic"][0])
    left_out = sorted(method for method, own in methods.items() if len(own) < datasets)
    return tuple(made), tuple(left_out)


def _record(split: str, row: dict[str, Any]) -> dict[str, Any]:
    numbers: dict[str, float] = {}
    for name in COLUMNS:
        mean, deviation = row[name]
        numbers |= {name: mean, f"{name}_std": deviation}
    seeds = len(row["seeds"]) or None
    told = {"dataset": row["dataset"], "split": split, "method": row["method"]}
    return {**told, "seeds": seeds, **numbers}
