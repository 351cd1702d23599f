"""Results as text a person reads: one table of methods, one run, one evaluation.

Numbers may come from memory or from a JSON file of ours, where they are decimal strings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache.errors import DataError
from prompt_tune.statistics import LABELS, Interval
from prompt_tune.tables import counted, laid_out

COLUMNS = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "kappa", "ece")
Style = Literal["text", "markdown"]
SHOWN = 5  # of a list of names


@dataclass(frozen=True)
class Row:
    """One method in a table.

    Attributes:
        name: what the row shows, control and all.
        intervals: of each metric by name; a missing one is left blank.
        trainable: number of trained parameters, or None where it is not known.
        step_seconds: mean time of a training step, or None where nothing was stepped.
        note: a remark, such as "smoke run, not a result".
    """

    name: str
    intervals: Mapping[str, Interval]
    trainable: int | None = None
    step_seconds: float | None = None
    note: str = ""


def interval_of(value: Sequence[Any]) -> Interval:
    """[value, low, high] from JSON; null becomes NaN.

    Raises:
        DataError: not three numbers.
    """
    try:
        numbers = [math.nan if x is None else float(x) for x in value]
    except (TypeError, ValueError) as error:
        what = "an interval is [value, low, high]"
        raise DataError(what, found=value) from error
    if len(numbers) != 3:
        what = "an interval is [value, low, high]"
        raise DataError(what, found=value)
    return Interval(*numbers)


def shown(interval: Interval | None) -> str:
    """`0.812 [0.774, 0.848]`, or a dash where undefined."""
    if interval is None or math.isnan(interval.value):
        return "–"
    if math.isnan(interval.low):
        return f"{interval.value:z.3f}"
    return f"{interval.value:z.3f} [{interval.low:z.3f}, {interval.high:z.3f}]"


def duration(seconds: float | None) -> str:
    """A step time with its unit, or a dash."""
    if seconds is None:
        return "–"
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def table(rows: Sequence[Row], *, columns: Sequence[str] = COLUMNS, style: Style = "text") -> str:
    """Methods by metrics with intervals, trained parameters and step time, in the order given.

    Nothing is ranked or printed bold: intervals overlap.

    Raises:
        DataError: no rows, or an unknown metric.
    """
    if not rows:
        what = "there are no results to put in a table"
        raise DataError(what)
    for column in columns:
        if column not in LABELS:
            what = f"no metric {column!r}"
            raise DataError(what, wanted=", ".join(LABELS))
    notes = any(row.note for row in rows)
    header = ["method", *(LABELS[c] for c in columns), "trained", "step"]
    cells = [header + (["note"] if notes else [])]
    for row in rows:
        line = [row.name, *(shown(row.intervals.get(c)) for c in columns)]
        line.append("–" if row.trainable is None else f"{row.trainable:,}")
        line.append(duration(row.step_seconds))
        cells.append(line + ([row.note] if notes else []))
    left = {0, len(header)} if notes else {0}
    return laid_out(cells, style, left=left)


def per_class(metrics: Mapping[str, Any], intervals: Mapping[str, Any], style: Style) -> str:
    """Sensitivity and specificity with intervals, AUROC and cases of each class."""
    cells = [["class", "cases", "sensitivity", "specificity", "AUROC"]]
    for k, name in enumerate(metrics["classes"]):
        area = metrics["auroc"][k]
        cells.append(
            [
                str(name),
                str(sum(int(n) for n in metrics["confusion"][k])),
                shown(interval_of(intervals["sensitivity"][k])),
                shown(interval_of(intervals["specificity"][k])),
                "–" if area is None else f"{float(area):.3f}",
            ]
        )
    return laid_out(cells, style)


def describe_evaluation(result: Mapping[str, Any], folder: Path, style: Style = "text") -> str:
    """One evaluation as a few lines: overall metrics, then each class, then where files lie.

    Args:
        result: the content of `metrics.json`.
        folder: where the files of the evaluation lie.
        style: plain text or Markdown.
    """
    metrics, intervals = result["metrics"], result["intervals"]
    of = f" of {result['split_images']}" if result["split_images"] != result["images"] else ""
    by = intervals.get("drawn", "cases")
    seen = f"{result['images']}{of} images" if of else counted(result["images"], "image")
    head = f"{result['split']}: {seen}, 95 % intervals over {by}"
    cells = [["metric", "value"]]
    for name, label in LABELS.items():
        cells.append([label, shown(interval_of(intervals["metrics"][name]))])
    if scaled := result.get("scaled"):
        fitted = counted(int(scaled["fitted_on"]), "validation image")
        what = f"after temperature {float(scaled['temperature']):.3g} from {fitted}"
        cells += [[f"{LABELS[n]}, {what}", f"{float(scaled[n]):.3f}"] for n in ("ece", "nll")]
    undefined = [
        str(name)
        for name, area in zip(metrics["classes"], metrics["auroc"], strict=True)
        if area is None
    ]
    lines = [head, laid_out(cells, style), per_class(metrics, intervals, style)]
    if undefined:
        lines.append(f"no AUROC, for want of cases or of other cases: {', '.join(undefined)}")
    lines.append(f"predictions, metrics and figures: {folder}")
    return "\n\n".join(lines)


def describe_run(run: Mapping[str, Any], folder: Path) -> str:
    """One run as a few lines.

    Args:
        run: the content of `run.json`.
        folder: the run folder.
    """
    recipe, training = run["recipe"], run.get("training", {})
    lines = [f"method     {recipe['method']['name']}", f"backbone   {run['backbone']['name']}"]
    if "scalars" in run.get("parameters", {}):
        counts = run["parameters"]
        lines.append(f"trained    {int(counts['scalars']):,} in {counts['tensors']} tensors")
    if "step_seconds" in training and training["step_seconds"] is not None:
        step = duration(float(training["step_seconds"]))
        stall = training.get("stall_share")
        waited = "" if stall is None else f", {float(stall):.1%} of it waiting for images"
        lines.append(f"steps      {training.get('steps', '?')}, {step} each{waited}")
    history = training.get("history") or []
    if history:
        last = history[-1]
        val = last.get("val_accuracy")
        seen = "" if val is None else f", validation accuracy {float(val):.3f}"
        lines.append(f"last epoch {last['epoch']}: loss {float(last['loss']):.4f}{seen}")
    lines.append(f"selection  {run['selection']}")
    if unused := run.get("bindings", {}).get("cache", {}).get("unused_classes"):
        more = f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
        lines.append(f"not used   {', '.join(unused[:SHOWN])}{more}: in the cache, not in this run")
    if run.get("smoke"):
        lines.append("a smoke run, not a result")
    lines.append(f"run        {folder}")
    return "\n".join(lines)
