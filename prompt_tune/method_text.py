"""What `compare` found, as text, Markdown, LaTeX, CSV and plain data."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from prompt_tune.report import duration, interval_of
from prompt_tune.statistics import LABELS
from prompt_tune.tables import TableStyle, csv_of, laid_out, plain, prose

BESIDE = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "ece")
"""Metrics shown as mean and deviation whatever the table is about."""


@dataclass(frozen=True)
class DatasetTable:
    """All methods on one data set, best first.

    Attributes:
        dataset: its id.
        split: the evaluated one, as its folder is named.
        rows: plain numbers of every method.
        note: on how many images, and what a constant answer scores.
        winner: the label of the method whose lead over every other holds, or None.
    """

    dataset: str
    split: str
    rows: tuple[dict[str, Any], ...]
    note: str
    winner: str | None


@dataclass(frozen=True)
class MethodTable:
    """What `compare` found.

    Attributes:
        metric: what methods are ranked by.
        tables: one for each data set.
        mean_ranks: of every method that was run on all data sets, among those; best first.
        left_out: the other methods.
    """

    metric: str
    tables: tuple[DatasetTable, ...]
    mean_ranks: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, None for NaN."""
        table = asdict(self)
        return plain({"datasets": table.pop("tables"), **table})

    def text(self, style: TableStyle = "text") -> str:
        """Every table with its note, and mean ranks over several data sets, in a style.

        CSV is one table of all data sets, with every number in a column of its own.
        """
        if style == "csv":
            return csv_of([_record(t, row, self.metric) for t in self.tables for row in t.rows])
        parts = []
        for table in self.tables:
            cells, bold = _cells(table, self.metric), set[tuple[int, int]]()
            for k, row in enumerate(table.rows, start=1):
                if row["method"] == table.winner:
                    bold |= {(k, 0), (k, 1)}
            head = prose(f"{table.dataset}, {table.split}", style)
            parts += [head, laid_out(cells, style, bold=bold), prose(table.note, style)]
        if len(self.tables) > 1:
            parts += _rank_parts(self, style)
        return "\n\n".join(parts)


def _rank_parts(found: MethodTable, style: TableStyle) -> list[str]:
    """Mean ranks over data sets, and which methods have none."""
    cells = [["method", "mean rank", *(t.dataset for t in found.tables)]]
    cells += [
        [row["method"], f"{row['mean_rank']:.2f}", *(f"{r:g}" for r in row["ranks"])]
        for row in found.mean_ranks
    ]
    note = (
        f"Ranks by {LABELS[found.metric]} (1 is best) among the methods that were run on all "
        f"{len(found.tables)} data sets."
    )
    if found.left_out:
        note += f" Left out: {'; '.join(found.left_out)}."
    head = prose("ranks over data sets", style)
    grid = [laid_out(cells, style)] if found.mean_ranks else []
    return [head, *grid, prose(note, style)]


def _record(table: DatasetTable, row: dict[str, Any], metric: str) -> dict[str, Any]:
    """A row as plain numbers, each in a column of its own."""
    _, low, high = interval_of(row["interval"])
    behind, behind_low, behind_high = row["behind"] or (None, None, None)
    beside: dict[str, float] = {}
    for name, (mean, deviation) in row["beside"].items():
        beside |= {name: mean, f"{name}_std": deviation}
    counted = ("scaled_ece", "trained", "steps", "images_seen", "step_seconds", "seconds")
    return {
        "dataset": table.dataset,
        "split": table.split,
        "method": row["method"],
        "metric": metric,
        "value": row["value"],
        "std": row["deviation"],
        "low": low,
        "high": high,
        "behind": behind,
        "behind_low": behind_low,
        "behind_high": behind_high,
        "p": row["p"],
        "winner": int(row["method"] == table.winner),
        "seeds": len(row["seeds"]),
        **beside,
        **{name: row[name] for name in counted},
    }


def _cells(table: DatasetTable, metric: str) -> list[list[str]]:
    beside = [name for name in BESIDE if name != metric]
    timed = any(row["seconds"] is not None for row in table.rows)
    head = ["method", f"{LABELS[metric]} [95 %]", *(LABELS[n] for n in beside), "ECE, scaled"]
    head += ["p", "seeds", "trained", "steps", "images seen", "step"]
    cells = [head + ["tuning"] * timed]
    for row in table.rows:
        value, low, high = interval_of(row["interval"])
        main = f"{plus(row['value'], row['deviation'])} [{low:z.3f}, {high:z.3f}]"
        counts = [row["trained"], row["steps"], row["images_seen"]]
        cells.append(
            [
                row["method"],
                "–" if math.isnan(value) else main,
                *(plus(*row["beside"][name]) for name in beside),
                plus(row["scaled_ece"], math.nan),
                "–" if row["p"] is None else f"{row['p']:.3f}",
                str(len(row["seeds"])),
                *("–" if n is None else f"{n:,}" for n in counts),
                duration(row["step_seconds"]),
                *[_elapsed(row["seconds"])] * timed,
            ]
        )
    return cells


def _elapsed(seconds: float | None) -> str:
    return duration(seconds) if seconds is None or seconds < 100 else f"{seconds:,.0f} s"


def plus(mean: float, deviation: float) -> str:
    """`0.812 ± 0.013`; a dash where undefined, no deviation of a single seed."""
    if math.isnan(mean):
        return "–"
    return f"{mean:z.3f}" if math.isnan(deviation) else f"{mean:z.3f} ± {deviation:.3f}"
