"""`compare`: methods over seeds and data sets, with paired tests and average ranks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.durable import storage_errors, write_atomic
from cache.errors import RecipeError, RunError
from prompt_tune import figures
from prompt_tune.compare import evaluated
from prompt_tune.method_groups import Group, find_runs, grouped
from prompt_tune.method_text import BESIDE, DatasetTable, MethodTable
from prompt_tune.metrics import constant_guess
from prompt_tune.paired import Score, difference, holm, p_value, ranks, score
from prompt_tune.predictions import Predictions, load_predictions
from prompt_tune.report import interval_of
from prompt_tune.run_folder import PREDICTIONS, is_of
from prompt_tune.statistics import MEASURES, mean_over_seeds
from prompt_tune.tables import FILES

ALPHA = 0.05
LOWER_IS_BETTER = frozenset({"ece", "brier", "nll"})


@dataclass(frozen=True)
class Seeded:
    """The evaluated runs of one method on one data set, one for each seed."""

    group: Group
    results: tuple[dict[str, Any], ...]
    predictions: tuple[Predictions, ...]

    @property
    def label(self) -> str:
        """Of the method."""
        return self.group.label

    def mean(self, metric: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds of a reported metric."""
        return mean_over_seeds(
            [interval_of(r["intervals"]["metrics"][metric]).value for r in self.results]
        )

    def scaled_ece(self) -> float:
        """Mean expected calibration error after temperature scaling; NaN without validation."""
        values = [float(r["scaled"]["ece"]) for r in self.results if r.get("scaled")]
        return sum(values) / len(values) if len(values) == len(self.results) else math.nan


def compare_methods(
    folders: Iterable[Path],
    *,
    split: str,
    metric: str = "accuracy",
    out: Path | None = None,
) -> MethodTable:
    """Methods over seeds and data sets; leaves `methods.md`, `.tex`, `.csv` and `ranks.png`.

    Runs that differ in nothing but their seed are one method; `method_groups` says what else may
    differ. On every data set all runs must have been evaluated on the same images. A method is the
    winner where its lead over each other method has a Holm-adjusted p-value below 0.05, corrected
    over those comparisons. Mean ranks are of the methods that were run on every data set.

    Args:
        folders: run folders, or folders of run folders.
        split: the evaluated split, as its folder is named.
        metric: what to rank by.
        out: a folder for tables and figure.

    Raises:
        RecipeError: no such metric.
        RunError: no runs, or one that was not evaluated so, or on other images, or two of one
            method with the same seed.
    """
    if metric not in MEASURES:
        what = f"no metric {metric!r}"
        raise RecipeError(what, wanted=", ".join(MEASURES))
    by_dataset: dict[str, list[Seeded]] = {}
    images: dict[str, tuple[str, Path]] = {}
    for group in grouped(find_runs(folders)):
        by_dataset.setdefault(group.dataset, []).append(_seeded(group, split, images))
    tables = tuple(
        _table(dataset, split, methods, metric) for dataset, methods in by_dataset.items()
    )
    found = MethodTable(metric, tables, *_mean_ranks(tables, metric))
    if out is not None:
        _written(found, out)
    return found


def _seeded(group: Group, split: str, images: dict[str, tuple[str, Path]]) -> Seeded:
    """A group with its results; `images` keeps which ones every data set was evaluated on."""
    results, predictions = [], []
    for folder, run in zip(group.folders, group.runs, strict=True):
        result = evaluated(folder, split)
        if not is_of(result, run):
            what = f"eval/{split} is of an earlier run or of other weights"
            raise RunError(what, where=folder, do="Run `vademecum eval` again.")
        known, where = images.setdefault(group.dataset, (str(result["data"]), folder))
        if known != result["data"]:
            what = "the runs were evaluated on different images"
            raise RunError(what, where=group.dataset, found=f"{where} and {folder}")
        results.append(result)
        predictions.append(load_predictions(folder / "eval" / split / PREDICTIONS))
    return Seeded(group, tuple(results), tuple(predictions))


def _table(dataset: str, split: str, methods: Sequence[Seeded], metric: str) -> DatasetTable:
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
    others_seeds = [
        f"{m.label} ({_listed(m.group.seeds)})"
        for m in others
        if sorted(m.group.seeds) != sorted(best.group.seeds)
    ]
    if others_seeds:
        note += (
            f" The first row has the seeds {_listed(best.group.seeds)}; p compares with means over "
            f"other seeds in {', '.join(others_seeds)}."
        )
    return DatasetTable(dataset, split, tuple(rows), note, best.label if holds else None)


def _row(
    method: Seeded, found: Score, behind: list[float | None] | None, p: float | None
) -> dict[str, Any]:
    beside = {name: list(method.mean(name)) for name in BESIDE}
    return {
        "method": method.label,
        "seeds": list(method.group.seeds),
        "value": found.value,
        "deviation": found.deviation,
        "interval": found.interval.to_json(),
        "behind": behind,
        "p": p,
        "beside": beside,
        "scaled_ece": method.scaled_ece(),
        **method.group.budget(),
        "smoke": any(run.get("smoke") for run in method.group.runs),
    }


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _mean_ranks(
    tables: Sequence[DatasetTable], metric: str
) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """Ranks on each data set among the methods run on all, with their mean; and the others."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    names = [{row["method"] for row in table.rows} for table in tables]
    everywhere = set.intersection(*names)
    found: dict[str, list[float]] = {}
    for table in tables:
        rows = [row for row in table.rows if row["method"] in everywhere]
        own = ranks([sign * row["value"] for row in rows])
        for row, rank in zip(rows, own, strict=True):
            found.setdefault(row["method"], []).append(rank)
    means = [
        {"method": name, "mean_rank": sum(r) / len(r), "ranks": r} for name, r in found.items()
    ]
    left_out = tuple(sorted(set.union(*names) - everywhere))
    return tuple(sorted(means, key=lambda row: row["mean_rank"])), left_out


def _written(found: MethodTable, out: Path) -> None:
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for suffix, style in FILES.items():
        write_atomic(out / f"methods.{suffix}", (found.text(style) + "\n").encode())
    rows = [(row["method"], row["ranks"]) for row in found.mean_ranks]
    if rows:
        figures.average_ranks(rows, out / "ranks.png", measure=found.metric)
    else:
        with storage_errors(out):
            (out / "ranks.png").unlink(missing_ok=True)  # an earlier one would be of other runs
