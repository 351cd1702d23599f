"""What a run folder holds, and how it is emptied.

Beside `run.json`, weights, state and curves that is `samples/` with `train.json` and `val.json`,
and for each evaluation a folder `eval/<split>` or `eval/<split>-<images>`.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cache.durable import storage_errors
from prompt_tune.checkpoint import RUN, STATE, WEIGHTS

SAMPLES, EVALUATIONS, CURVES = "samples", "eval", "curves.png"
METRICS, PREDICTIONS, PART = "metrics.json", "predictions.csv", "samples.json"
CONFUSION, RELIABILITY = "confusion.png", "reliability.png"
HEADLINE = ("accuracy", "balanced_accuracy", "macro_f1")


def clear(folder: Path) -> None:
    """Removes what `tune` and `evaluate` write, and no file of anyone else.

    `run.json` goes first: what is left after a crash is no run.

    Raises:
        StorageError: something cannot be removed.
    """
    with storage_errors(folder):
        for name in (RUN, STATE, WEIGHTS, CURVES):
            (folder / name).unlink(missing_ok=True)
        for place in list(folder.glob(f"{EVALUATIONS}/*")):
            _remove(place, METRICS, PREDICTIONS, PART, CONFUSION, RELIABILITY)
        _remove(folder / EVALUATIONS)
        _remove(folder / SAMPLES, "train.json", "val.json")


def _remove(folder: Path, *names: str) -> None:
    """Removes these files of a folder that is no link, and it too if nothing else is in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def is_of(result: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether an evaluation was made with this very run and these weights.

    Args:
        result: the content of `metrics.json`.
        run: the content of `run.json`.
    """
    return result.get("run") == run["digest"] and result.get("weights") == run.get("weights")


def headline(result: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What `run.json` says of an evaluation: a few numbers, on which images, and where all are."""
    chosen = {name: result["metrics"][name] for name in HEADLINE}
    known = {name: result[name] for name in ("split", "images", "split_images", "data")}
    return {**chosen, **known, "file": file}


def absolute(place: str) -> str:
    """A path that means the same from any folder; a preset or hub id stays as it is."""
    return str(Path(place).absolute()) if Path(place).exists() else place
