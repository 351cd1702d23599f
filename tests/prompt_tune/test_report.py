"""Tables and summaries as a person reads them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.errors import DataError
from cache.recipe import canonical_json
from prompt_tune.metrics import evaluate
from prompt_tune.report import (
    Row,
    describe_evaluation,
    describe_run,
    duration,
    interval_of,
    shown,
    table,
)
from prompt_tune.statistics import Interval, with_intervals

NAN = Interval(math.nan, math.nan, math.nan)
ROWS = [
    Row("CoOp", {"accuracy": Interval(0.8125, 0.7749, 0.8481), "macro_auroc": NAN}, 8192, 0.0231),
    Row("CILMP | shuffled", {"accuracy": Interval(0.5, 0.5, 0.5)}, 1_234_567, 2.5, "smoke run"),
    Row("zero-shot", {}),
]


def test_text_table() -> None:
    assert table(ROWS, columns=["accuracy", "macro_auroc"]) == "\n".join(
        [
            "method                        accuracy  macro AUROC    trained     step  note",
            "----------------  --------------------  -----------  ---------  -------  ---------",
            "CoOp              0.812 [0.775, 0.848]            –      8,192  23.1 ms",
            "CILMP | shuffled  0.500 [0.500, 0.500]            –  1,234,567    2.5 s  smoke run",
            "zero-shot                            –            –          –        –",
        ]
    )


def test_markdown_table() -> None:
    assert table(ROWS[:2], columns=["accuracy"], style="markdown").splitlines() == [
        "| method | accuracy | trained | step | note |",
        "| --- | ---: | ---: | ---: | --- |",
        "| CoOp | 0.812 [0.775, 0.848] | 8,192 | 23.1 ms |  |",
        "| CILMP \\| shuffled | 0.500 [0.500, 0.500] | 1,234,567 | 2.5 s | smoke run |",
    ]


def test_no_note_column_without_notes_and_default_columns() -> None:
    header = table(ROWS[:1]).splitlines()[0].split("  ")
    assert [cell.strip() for cell in header if cell.strip()] == [
        "method",
        "accuracy",
        "balanced accuracy",
        "macro F1",
        "macro AUROC",
        "kappa",
        "ECE",
        "trained",
        "step",
    ]


def test_pieces() -> None:
    assert shown(None) == shown(NAN) == "–"
    assert shown(Interval(0.5, math.nan, math.nan)) == "0.500"
    assert interval_of(["0.5", None, 1]) == pytest.approx(Interval(0.5, math.nan, 1), nan_ok=True)
    assert [duration(x) for x in (None, 0.00123, 0.9, 61.2)] == ["–", "1.23 ms", "900 ms", "61.2 s"]


def test_faults() -> None:
    with pytest.raises(DataError, match="no results to put in a table"):
        table([])
    with pytest.raises(DataError, match="no metric 'auc'; wanted accuracy, "):
        table(ROWS, columns=["auc"])
    for value in ([1, 2], ["x", 1, 2], 3):
        with pytest.raises(DataError, match=r"an interval is \[value, low, high\]; found"):
            interval_of(value)  # type: ignore[arg-type]


def result(part: bool) -> dict[str, Any]:
    p = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    y = np.array([0, 0, 0, 1])
    return {
        "split": "test",
        "images": 4,
        "split_images": 100 if part else 4,
        "metrics": evaluate(p, y, ["one", "two", "three"]).to_json(),
        "intervals": with_intervals(p, y, patients=["a", "b", "b", "c"], resamples=50),
    }


def test_an_evaluation_in_words() -> None:
    text = describe_evaluation(result(part=True), Path("runs/x"))
    assert text.startswith("test: 4 of 100 images, 95 % intervals over patients\n")
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "0.750 [" in lines["accuracy"]
    assert "0.833 [" in lines["balanced accuracy"]
    assert lines["one"].split()[1:3] == ["3", "0.667"]
    assert lines["three"].split()[1:3] == ["0", "–"]
    assert "no AUROC, for want of cases or of other cases: three" in text
    assert text.endswith("predictions, metrics and figures: runs/x")
    whole = result(part=False)
    assert "4 images," in describe_evaluation(whole, Path("x"))
    scaled = {"temperature": 1.0, "fitted_on": 1, "ece": 0.1, "nll": 0.2}
    one = describe_evaluation(whole | {"images": 1, "split_images": 1, "scaled": scaled}, Path("x"))
    assert one.startswith("test: 1 image, 95 %")
    assert "from 1 validation image " in one
    assert shown(Interval(-0.0001, -0.0004, 0.2)) == "0.000 [0.000, 0.200]"


def test_an_evaluation_reads_the_same_from_its_file() -> None:
    found = result(part=False)
    stored = json.loads(canonical_json(found))
    assert isinstance(stored["metrics"]["accuracy"], str)
    for style in ("text", "markdown"):
        assert describe_evaluation(stored, Path("x"), style) == describe_evaluation(
            found, Path("x"), style
        )


def test_a_run_in_words() -> None:
    run = {
        "recipe": {"method": {"name": "cilmp"}},
        "backbone": {"name": "tiny"},
        "parameters": {"scalars": 12345, "tensors": 7},
        "selection": "the last epoch",
        "smoke": True,
        "training": {
            "history": [{"epoch": 1, "loss": "0.5", "val_accuracy": 0.75}],
            "step_seconds": "0.25",
            "steps": 3,
            "stall_share": "0.031",
        },
    }
    assert describe_run(run, Path("runs/x")).splitlines() == [
        "method     cilmp",
        "backbone   tiny",
        "trained    12,345 in 7 tensors",
        "steps      3, 250 ms each, 3.1% of it waiting for images",
        "last epoch 1: loss 0.5000, validation accuracy 0.750",
        "selection  the last epoch",
        "a smoke run, not a result",
        "run        runs/x",
    ]
    bare = run | {"training": {}, "smoke": False, "parameters": {}}
    assert len(describe_run(bare, Path("x")).splitlines()) == 4
