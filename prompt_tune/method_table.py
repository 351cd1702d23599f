"""`compare`: methods over seeds and data sets, with paired tests and average ranks."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache.durable import storage_errors, write_atomic
from cache.errors import DataError, RunError
from prompt_tune import figures
from prompt_tune.checkpoint import RUN, read_run
from prompt_tune.compare import evaluated, run_label
from prompt_tune.metrics import constant_guess
from prompt_tune.paired import Score, difference, holm, p_value, ranks, score
from prompt_tune.predictions import Predictions, load_predictions
from prompt_tune.report import duration, interval_of
from prompt_tune.run_folder import PREDICTIONS, is_of
from prompt_tune.statistics import LABELS, MEASURES, mean_over_seeds
from prompt_tune.tables import TableStyle, laid_out

ALPHA = 0.05
LOWER_IS_BETTER = frozenset({"ece", "brier", "nll"})
BESIDE = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "ece")
"""Metrics shown as mean and deviation whatever the table is about."""


@dataclass(frozen=True)
class Seeded:
    """The evaluated runs of one method on one data set, one for each seed."""

    label: str
    runs: tuple[dict[str, Any], ...]
    results: tuple[dict[str, Any], ...]
    predictions: tuple[Predictions, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the runs, in their order."""
        return tuple(int(run["recipe"]["seed"]) for run in self.runs)

    def mean(self, metric: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds of a reported metric."""
        return mean_over_seeds(
            [interval_of(r["intervals"]["metrics"][metric]).value for r in self.results]
        )

    def scaled_ece(self) -> float:
        """Mean expected calibration error after temperature scaling; NaN without validation."""
        values = [float(r["scaled"]["ece"]) for r in self.results if r.get("scaled")]
        return sum(values) / len(values) if len(values) == len(self.results) else math.nan

    def budget(self) -> dict[str, float | int | None]:
        """Trained numbers, steps, images seen and seconds, of the first run."""
        training, spec = self.runs[0].get("training", {}), self.runs[0]["recipe"]["train"]
        steps = training.get("steps")
        seen = training.get("images_seen")
        if seen is None and steps is not None:
            seen = int(steps) * int(spec["batch_size"])
        step = training.get("step_seconds")
        return {
            "trained": int(self.runs[0]["parameters"]["scalars"]),
            "steps": None if steps is None else int(steps),
            "images_seen": None if seen is None else int(seen),
            "step_seconds": None if step is None else float(step),
        }


@dataclass(frozen=True)
class DatasetTable:
    """All methods on one data set, best first.

    Attributes:
        dataset: its id, and the split.
        rows: plain numbers of every method.
        note: on how many images, and what a constant answer scores.
        winner: the label of the method whose lead over every other holds, or None.
    """

    dataset: str
    rows: tuple[dict[str, Any], ...]
    note: str
    winner: str | None


@dataclass(frozen=True)
class MethodTable:
    """What `compare` found.

    Attributes:
        metric: what methods are ranked by.
        tables: one for each data set.
        mean_ranks: of every method over the data sets it was run on, best first.
    """

    metric: str
    tables: tuple[DatasetTable, ...]
    mean_ranks: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        tables = [
            {"dataset": t.dataset, "rows": t.rows, "note": t.note, "winner": t.winner}
            for t in self.tables
        ]
        return {"metric": self.metric, "datasets": tables, "mean_ranks": self.mean_ranks}

    def text(self, style: TableStyle = "text") -> str:
        """Every table with its note, in a style."""
        parts = []
        for table in self.tables:
            cells, bold = _cells(table, self.metric), set[tuple[int, int]]()
            for k, row in enumerate(table.rows, start=1):
                if row["method"] == table.winner:
                    bold |= {(k, 0), (k, 1)}
            grid = laid_out(cells, style, bold=bold)
            parts += [grid] if style == "csv" else [table.dataset, grid, table.note]
        return "\n\n".join(parts)


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The run folders among some folders and what lies up to three levels below them.

    Raises:
        RunError: a folder holds no run.
    """
    found: list[Path] = []
    for folder in folders:
        depths = (RUN, f"*/{RUN}", f"*/*/{RUN}", f"*/*/*/{RUN}")
        runs = sorted(p.parent for d in depths for p in folder.glob(d))
        if not runs:
            what = "no run here"
            raise RunError(what, where=folder, do="Name run folders, or a folder of run folders.")
        found += runs
    return list(dict.fromkeys(found))


def compare_methods(
    folders: Iterable[Path],
    *,
    split: str,
    metric: str = "accuracy",
    out: Path | None = None,
) -> MethodTable:
    """Methods over seeds and data sets; leaves `methods.md`, `.tex`, `.csv` and `ranks.png`.

    Runs that differ in nothing but their seed are one method. On every data set all runs must have
    been evaluated on the same images. A method is the winner where its lead over each other method
    has a Holm-adjusted p-value below 0.05, corrected over those comparisons.

    Args:
        folders: run folders, or folders of run folders.
        split: the evaluated split, as its folder is named.
        metric: what to rank by.
        out: a folder for tables and figure.

    Raises:
        DataError: no such metric.
        RunError: no runs, or one that was not evaluated so, or on other images.
    """
    if metric not in MEASURES:
        what = f"no metric {metric!r}"
        raise DataError(what, wanted=", ".join(MEASURES))
    by_dataset: dict[str, list[Seeded]] = {}
    for (dataset, _), seeded in _grouped(find_runs(folders), split).items():
        by_dataset.setdefault(dataset, []).append(seeded)
    tables = tuple(
        _table(f"{dataset}, {split}", methods, metric) for dataset, methods in by_dataset.items()
    )
    found = MethodTable(metric, tables, _mean_ranks(tables, metric))
    if out is not None:
        _written(found, out)
    return found


def _grouped(folders: Sequence[Path], split: str) -> dict[tuple[str, str], Seeded]:
    """Runs by data set and by their recipe without seeds, labelled so that no two are alike."""
    groups: dict[tuple[str, str], list[Path]] = {}
    runs, recipes = {}, {}
    for folder in folders:
        run = runs[folder] = read_run(folder)
        plain = {k: v for k, v in run["recipe"].items() if k != "backbone"}
        # Where alignment sees a run's own images, every seed has a backbone, named after it.
        tower = re.sub(rf"(?<!\d){run['recipe']['seed']}(?!\d)", "{seed}", run["backbone"]["name"])
        recipes[folder] = {"backbone": tower, **_without_seeds(plain)}
        key = (str(run["bindings"]["dataset"]), repr(sorted(recipes[folder].items())))
        groups.setdefault(key, []).append(folder)
    labels = _labels([(runs[g[0]], recipes[g[0]]) for g in groups.values()])
    images: dict[str, tuple[str, Path]] = {}
    made = {}
    for ((dataset, _), members), label in zip(groups.items(), labels, strict=True):
        results, predictions = [], []
        for folder in members:
            result = evaluated(folder, split)
            if not is_of(result, runs[folder]):
                what = f"eval/{split} is of an earlier run or of other weights"
                raise RunError(what, where=folder, do="Run `vademecum eval` again.")
            known, where = images.setdefault(dataset, (str(result["data"]), folder))
            if known != result["data"]:
                what = "the runs were evaluated on different images"
                raise RunError(what, where=dataset, found=f"{where} and {folder}")
            results.append(result)
            predictions.append(load_predictions(folder / "eval" / split / PREDICTIONS))
        made[dataset, label] = Seeded(
            label, tuple(runs[f] for f in members), tuple(results), tuple(predictions)
        )
    return made


def _without_seeds(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as one flat table, without what a seed changes."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{k}": v for k, v in _without_seeds(value).items()}
        elif key != "seed":
            flat[key] = value
    return flat


def _labels(groups: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """What each recipe did, with the settings that tell it from others of the same words."""
    short = [(str(run["bindings"]["dataset"]), run_label(run)) for run, _ in groups]
    labels = []
    for k, (_, recipe) in enumerate(groups):
        twins = [groups[j][1] for j in range(len(groups)) if short[j] == short[k]]
        differs = sorted(key for key in recipe if any(t.get(key) != recipe[key] for t in twins))
        told = ", ".join(f"{key}={recipe[key]}" for key in differs)
        labels.append(f"{short[k][1]} ({told})" if told else short[k][1])
    return labels


def _table(dataset: str, methods: Sequence[Seeded], metric: str) -> DatasetTable:
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    scores: dict[str, Score] = {m.label: score(m.predictions, metric) for m in methods}

    def rank(method: Seeded) -> float:
        value = sign * scores[method.label].value
        return math.inf if math.isnan(value) else -value

    ordered = sorted(methods, key=rank)
    best, others = ordered[0], ordered[1:]
    adjusted = holm([p_value(scores[best.label], scores[m.label]) for m in others])
    rows = [_row(best, scores[best.label], None, None)]
    for other, p in zip(others, adjusted, strict=True):
        behind = difference(scores[other.label], scores[best.label])
        rows.append(_row(other, scores[other.label], behind.to_json(), p))
    holds = bool(others) and all(p < ALPHA for p in adjusted)
    predictions = best.predictions[0]
    guess = constant_guess(predictions.labels, predictions.class_names)
    drawn = best.results[0]["intervals"]["drawn"]
    note = (
        f"{len(predictions.labels)} images; mean ± standard deviation over seeds; 95 % bootstrap "
        f"intervals over {drawn} of the mean over seeds; p: paired bootstrap against the first "
        f"row, Holm-corrected; the best constant answer has accuracy {guess.accuracy:.3f}, "
        f"balanced accuracy {guess.balanced_accuracy:.3f}, macro F1 {guess.macro_f1:.3f}."
    )
    return DatasetTable(dataset, tuple(rows), note, best.label if holds else None)


def _row(
    method: Seeded, found: Score, behind: list[float | None] | None, p: float | None
) -> dict[str, Any]:
    beside = {name: list(method.mean(name)) for name in BESIDE}
    return {
        "method": method.label,
        "seeds": list(method.seeds),
        "value": found.value,
        "deviation": found.deviation,
        "interval": found.interval.to_json(),
        "behind": behind,
        "p": p,
        "beside": beside,
        "scaled_ece": method.scaled_ece(),
        **method.budget(),
        "smoke": any(run.get("smoke") for run in method.runs),
    }


def _mean_ranks(tables: Sequence[DatasetTable], metric: str) -> tuple[dict[str, Any], ...]:
    """Rank of every method on each data set, and their mean."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    found: dict[str, list[float]] = {}
    for table in tables:
        own = ranks([sign * row["value"] for row in table.rows])
        for row, rank in zip(table.rows, own, strict=True):
            found.setdefault(row["method"], []).append(rank)
    rows = [{"method": name, "mean_rank": sum(r) / len(r), "ranks": r} for name, r in found.items()]
    return tuple(sorted(rows, key=lambda row: row["mean_rank"]))


def _cells(table: DatasetTable, metric: str) -> list[list[str]]:
    beside = [name for name in BESIDE if name != metric]
    head = ["method", f"{LABELS[metric]} [95 %]", *(LABELS[n] for n in beside), "ECE, scaled"]
    cells = [[*head, "p", "seeds", "trained", "steps", "images seen", "step"]]
    for row in table.rows:
        value, low, high = interval_of(row["interval"])
        main = f"{_plus(row['value'], row['deviation'])} [{low:.3f}, {high:.3f}]"
        others = [_plus(*row["beside"][name]) for name in beside]
        p = "–" if row["p"] is None else f"{row['p']:.3f}"
        counts = [row["trained"], row["steps"], row["images_seen"]]
        name = row["method"] + (" (smoke run)" if row["smoke"] else "")
        cells.append(
            [
                name,
                "–" if math.isnan(value) else main,
                *others,
                _plus(row["scaled_ece"], math.nan),
                p,
                str(len(row["seeds"])),
                *("–" if n is None else f"{n:,}" for n in counts),
                duration(row["step_seconds"]),
            ]
        )
    return cells


def _plus(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f}" if math.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def _written(found: MethodTable, out: Path) -> None:
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    styles: dict[str, Literal["markdown", "latex", "csv"]]
    styles = {"methods.md": "markdown", "methods.tex": "latex", "methods.csv": "csv"}
    for name, style in styles.items():
        write_atomic(out / name, (found.text(style) + "\n").encode())
    rows = [(row["method"], row["ranks"]) for row in found.mean_ranks]
    figures.average_ranks(rows, out / "ranks.png", measure=found.metric)
