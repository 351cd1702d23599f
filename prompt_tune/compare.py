"""One table and one figure of several evaluated runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.durable import storage_errors, write_atomic
from cache.errors import RunError
from prompt_tune import figures
from prompt_tune.checkpoint import read_json, read_run
from prompt_tune.metrics import constant_guess
from prompt_tune.predictions import load_predictions
from prompt_tune.report import Row, interval_of, table
from prompt_tune.run_folder import is_of


@dataclass(frozen=True)
class Comparison:
    """A table of runs.

    Attributes:
        rows: the same numbers as plain data.
        text: the table as text.
    """

    rows: list[dict[str, Any]]
    text: str


def _knowledge_label(knowledge: dict[str, Any], *, rows: bool) -> str:
    control = knowledge["control"]
    if control == "none":
        return ", no knowledge"
    replaced = control if control in {"shuffled", "random"} else ""
    if not rows:
        return f", {replaced}" if replaced else ""
    raw = ", raw" if knowledge["scale"] == "raw" else ""
    return f", {knowledge['rows']} {replaced}".rstrip() + raw


def run_label(run: dict[str, Any]) -> str:
    """What a run did, in a few words: method, what it read of the cache, control, condition."""
    method, knowledge = run["recipe"]["method"], run["recipe"]["knowledge"]
    label = str(method["name"])
    if method.get("ensemble"):
        label += ", ensemble"
    if method.get("source", "template") != "template":
        label += f", {method['source']}"
    if "cache" in run["bindings"]:
        label += _knowledge_label(knowledge, rows="block" in run["bindings"]["cache"])
    if method.get("condition") == "none":
        label += ", no image condition"
    if method["name"] == "zero-shot" and "alignment" in run["backbone"]["notes"]:
        label += ", aligned"  # it saw images of these classes
    if run.get("smoke"):
        label += ", smoke run"
    return label


def evaluated(folder: Path, split: str) -> dict[str, Any]:
    """The content of `metrics.json` of a run on a split.

    Raises:
        RunError: it was not evaluated so.
    """
    path = folder / "eval" / split / "metrics.json"
    try:
        return read_json(path)
    except FileNotFoundError as error:
        there = sorted(p.parent.name for p in folder.glob("eval/*/metrics.json"))
        what = f"the run was not evaluated on {split!r}"
        found = ", ".join(there) or "no evaluation"
        raise RunError(what, where=folder, found=found, do="Run `vademecum eval` first.") from error


def _row(folder: Path, run: dict[str, Any], result: dict[str, Any]) -> tuple[Row, dict[str, Any]]:
    intervals = {k: interval_of(v) for k, v in result["intervals"]["metrics"].items()}
    step, scalars = run["training"].get("step_seconds"), int(run["parameters"]["scalars"])
    label, smoke = run_label(run), bool(run.get("smoke"))
    seconds = None if step is None else float(step)
    row = Row(label, intervals, scalars, seconds, "a smoke run, not a result" if smoke else "")
    facts = {
        "run": folder.name,
        "label": label,
        "metrics": {k: list(v) for k, v in intervals.items()},
        "parameters": scalars,
        "step_seconds": step,
        "smoke": smoke,
    }
    return row, facts


def compare_runs(folders: list[Path], *, split: str, out: Path | None = None) -> Comparison:
    """A table of runs that were evaluated on the same images; leaves `table.md` and `methods.png`.

    Raises:
        RunError: a run was not evaluated on `split`, or not with the weights it has now, or the
            runs saw different images.
    """
    rows, plain, seen = [], [], {}
    datasets: set[str] = set()
    for folder in folders:
        run, result = read_run(folder), evaluated(folder, split)
        try:
            seen[str(result["data"])] = folder
            datasets.add(str(run["bindings"]["dataset"]))
            row, facts = _row(folder, run, result)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise RunError("damaged run.json or metrics.json", where=folder) from error
        if not is_of(result, run):
            what = f"eval/{split}/metrics.json is of an earlier run or of other weights"
            raise RunError(what, where=folder, do="Run `vademecum eval` again.")
        if len(seen) > 1:
            what, found = "the runs were evaluated on different images", map(str, seen.values())
            do = "Use `vademecum compare` for several data sets." if len(datasets) > 1 else None
            raise RunError(what, where=split, found=" and ".join(found), do=do)
        rows.append(row)
        plain.append(facts)
    if not folders:
        raise RunError("no runs to compare")
    predictions = load_predictions(folders[0] / "eval" / split / "predictions.csv")
    guess = constant_guess(predictions.labels, predictions.class_names)
    note = (
        f"{result['images']} of {result['split_images']} images of {result['split']}; "
        f"{100 * float(result['intervals']['level']):.0f} % bootstrap intervals over "
        f"{result['intervals']['drawn']}; "
        f"the best constant answer has accuracy {guess.accuracy:.3f}."
    )
    if out is not None:
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        markdown = table(rows, style="markdown") + f"\n\n{note}\n"
        write_atomic(out / "table.md", markdown.encode())
        figures.methods(
            [(row.name, row.intervals["accuracy"]) for row in rows],
            out / "methods.png",
            guess=guess.accuracy,
        )
    return Comparison(plain, f"{table(rows)}\n\n{note}")
