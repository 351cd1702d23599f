"""Per-case predictions on disk, so that every metric can be recomputed without the model.

CSV (one row per case) or JSON lines (a header line, then one object per case), by the suffix.
Logits are written as the shortest decimals that read back to the same number, and probabilities
are always made from them by the same function, so recomputed metrics are exactly the original
ones. No file path, and a patient only as a number.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from cache.durable import write_atomic
from cache.errors import DataError
from prompt_tune.data.images import ImageSplit

FORMAT = "vademecum predictions 1"
LOGIT = "logit: "
FIXED, PATIENT = ("id", "label", "predicted"), "patient"
NAMED = ("label_class", "predicted_class")
"""What the classes of the two numbers are called, for who reads the CSV."""
FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
"""A spreadsheet takes a cell that starts so for a formula; the quote itself marks an escape."""


def softmax(logits: Float64[np.ndarray, "cases classes"]) -> Float64[np.ndarray, "cases classes"]:
    """Probabilities, in float64."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    total: Float64[np.ndarray, "cases classes"] = shifted / shifted.sum(axis=1, keepdims=True)
    return total


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a method said about each case.

    Attributes:
        class_names: in label order.
        ids: of each case, `split/index`.
        labels: the true class of each case.
        logits: of each case and class.
        groups: patient number of each case, or None where patients are not known.
    """

    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    labels: Int64[np.ndarray, "cases"]
    logits: Float64[np.ndarray, "cases classes"]
    groups: Int64[np.ndarray, "cases"] | None = None

    @classmethod
    def of(cls, logits: Float[np.ndarray, "cases classes"], split: ImageSplit) -> "Predictions":
        """The predictions for every case of `split`, in its order.

        Raises:
            DataError: another number of cases or classes, or a logit that is not finite.
        """
        values = np.asarray(logits, dtype=np.float64)
        if values.shape != (len(split), len(split.classes)):
            what = "the logits are not one row per case and one column per class"
            wanted = [len(split), len(split.classes)]
            raise DataError(what, where=split.name, found=list(values.shape), wanted=wanted)
        _refuse_non_finite(values, split.ids, split.name)
        names = tuple(c.name for c in split.classes)
        return cls(names, split.ids, split.labels, values, split.groups)

    @property
    def probabilities(self) -> Float64[np.ndarray, "cases classes"]:
        """Softmax of the logits in float64."""
        return softmax(self.logits)


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Writes `path` as CSV or JSON lines, whole or not at all.

    Raises:
        DataError: another suffix than .csv or .jsonl.
        StorageError: the file cannot be written.
    """
    write = {".csv": _csv, ".jsonl": _json_lines}.get(path.suffix)
    if write is None:
        raise _wrong_suffix(path)
    write_atomic(path, write(predictions).encode())


def load_predictions(path: Path) -> Predictions:
    """The predictions at `path`.

    Raises:
        DataError: missing, another suffix, damaged, or not a predictions file.
    """
    read = {".csv": _from_csv, ".jsonl": _from_json_lines}.get(path.suffix)
    if read is None:
        raise _wrong_suffix(path)
    try:
        found = read(path.read_bytes().decode())
    except FileNotFoundError as error:
        what = "no such predictions file"
        raise DataError(what, where=path) from error
    except (OSError, ValueError, TypeError, KeyError, IndexError, csv.Error) as error:
        what = f"not a predictions file, or damaged ({error})"
        raise DataError(what, where=path, do="Evaluate the run again.") from error
    if len(set(found.ids)) != len(found.ids):
        what = "one case stands twice"
        raise DataError(what, where=path, do="Evaluate the run again.")
    _refuse_non_finite(found.logits, found.ids, path)
    if found.labels.min() < 0 or found.labels.max() >= len(found.class_names):
        what = "a label is no class"
        raise DataError(what, where=path, found=int(found.labels.max()))
    return found


def _wrong_suffix(path: Path) -> DataError:
    what = "predictions are kept as .csv or .jsonl"
    return DataError(what, where=path, found=path.suffix or "no suffix")


def _refuse_non_finite(
    logits: Float64[np.ndarray, "cases classes"], ids: Sequence[str], where: object
) -> None:
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        what = f"the logits of case {ids[int(bad[0])]} are not all finite"
        raise DataError(what, where=where, found=f"{len(bad)} such cases")


def _rows(predictions: Predictions) -> list[tuple[str, int, int, int | None, list[float]]]:
    """(id, label, predicted, group, logits) of each case."""
    found = predictions
    groups = [None] * len(found.ids) if found.groups is None else found.groups.tolist()
    best = found.probabilities.argmax(axis=1).tolist()
    return list(
        zip(found.ids, found.labels.tolist(), best, groups, found.logits.tolist(), strict=True)
    )


def _assembled(names: Sequence[str], rows: Sequence[tuple[Any, Any, Any, Any]]) -> Predictions:
    ids, labels, groups, logits = zip(*rows, strict=True)
    if any(len(row) != len(names) for row in logits):
        what = "not one logit per class in every row"
        raise ValueError(what)
    return Predictions(
        class_names=tuple(names),
        ids=tuple(ids),
        labels=np.array(labels, dtype=np.int64),
        logits=np.array(logits, dtype=np.float64),
        groups=None if None in groups else np.array(groups, dtype=np.int64),
    )


def _escape(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text


def _unescape(text: str) -> str:
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text


def _csv(predictions: Predictions) -> str:
    grouped = predictions.groups is not None
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    names = [f"{LOGIT}{name}" for name in predictions.class_names]
    writer.writerow([*FIXED, *([PATIENT] if grouped else []), *NAMED, *names])
    for id_, label, best, group, logits in _rows(predictions):
        who = [group] if grouped else []
        named = [_escape(predictions.class_names[k]) for k in (label, best)]
        writer.writerow([_escape(id_), label, best, *who, *named, *map(repr, logits)])
    return out.getvalue()


def _from_csv(text: str) -> Predictions:
    header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    first = next(k for k, name in enumerate([*header, LOGIT]) if name.startswith(LOGIT))
    grouped = PATIENT in header[:first]
    fixed = [*FIXED, *([PATIENT] if grouped else [])]
    if header[:first] not in (fixed, [*fixed, *NAMED]):  # earlier files have no names
        raise ValueError(", ".join(header[:4]))
    names = [name.removeprefix(LOGIT) for name in header[first:]]
    rows = [
        (
            _unescape(line[0]),
            int(line[1]),
            int(line[3]) if grouped else None,
            [float(x) for x in line[first:]],
        )
        for line in lines
    ]
    return _assembled(names, rows)


def _json_lines(predictions: Predictions) -> str:
    lines: list[dict[str, Any]] = [{"format": FORMAT, "classes": predictions.class_names}]
    for id_, label, best, group, logits in _rows(predictions):
        who = {} if group is None else {"patient": group}
        lines.append({"id": id_, "label": label, "predicted": best, **who, "logits": logits})
    return "".join(json.dumps(line) + "\n" for line in lines)


def _from_json_lines(text: str) -> Predictions:
    header, *lines = map(json.loads, text.splitlines())
    if header["format"] != FORMAT:
        raise ValueError(header["format"])
    rows = [
        (str(line["id"]), index(line["label"]), line.get("patient"), line["logits"])
        for line in lines
    ]
    return _assembled(header["classes"], rows)
