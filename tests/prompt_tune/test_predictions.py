"""Predictions survive the disk exactly, whatever a class or a case is called."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DataError
from prompt_tune.data import DataClass, ImageSplit
from prompt_tune.metrics import evaluate
from prompt_tune.predictions import Predictions, load_predictions, save_predictions
from prompt_tune.statistics import confidence_intervals

SUFFIXES = pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


def split_of(n: int, patients: tuple[str | None, ...] | None = None) -> ImageSplit:
    return ImageSplit(
        name="test",
        classes=(DataClass("a", "=1+1"), DataClass("b", 'two, "quoted"'), DataClass("c", "drei")),
        labels=np.arange(n) % 3,
        ids=tuple(f"test/{k}" for k in range(n)),
        patients=patients or (None,) * n,
        files=("/somewhere/private.png",) * n,
        rows=None,
        at=np.arange(n),
    )


def made(n: int = 40, dtype: type = np.float32, patients: bool = False) -> Predictions:
    logits = (30 * np.random.default_rng(0).normal(size=(n, 3))).astype(dtype)
    who = tuple(f"name {k // 2}" for k in range(n)) if patients else None
    return Predictions.of(logits, split_of(n, who))


def same(a: Predictions, b: Predictions) -> bool:
    groups = (a.groups is None and b.groups is None) or np.array_equal(a.groups, b.groups)
    return (
        (a.class_names, a.ids) == (b.class_names, b.ids)
        and np.array_equal(a.labels, b.labels)
        and np.array_equal(a.logits, b.logits)
        and groups
    )


@SUFFIXES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("patients", [False, True])
def test_recomputed_metrics_are_exactly_the_original_ones(
    tmp_path: Path, suffix: str, dtype: type, patients: bool
) -> None:
    found = made(dtype=dtype, patients=patients)
    path = tmp_path / f"p{suffix}"
    save_predictions(found, path)
    again = load_predictions(path)
    assert same(again, found)
    assert evaluate(again.probabilities, again.labels, again.class_names) == evaluate(
        found.probabilities, found.labels, found.class_names
    )
    one, two = (
        confidence_intervals(x.probabilities, x.labels, groups=x.groups, draws=50)
        for x in (found, again)
    )
    assert one == two
    save_predictions(again, tmp_path / f"q{suffix}")
    assert (tmp_path / f"q{suffix}").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("patients", [False, True])
def test_a_csv_names_its_classes_and_one_without_names_is_read(
    tmp_path: Path, patients: bool
) -> None:
    found, path = made(patients=patients), tmp_path / "p.csv"
    save_predictions(found, path)
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["label_class"] for row in rows} == {"'=1+1", 'two, "quoted"', "drei"}
    for row in rows:
        for kind in ("label", "predicted"):
            name = found.class_names[int(row[kind])]
            assert row[f"{kind}_class"].removeprefix("'") == name
    with (tmp_path / "old.csv").open("w", newline="") as stream:
        kept = [name for name in rows[0] if not name.endswith("_class")]
        writer = csv.DictWriter(stream, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert same(load_predictions(tmp_path / "old.csv"), found)


def test_probabilities_are_the_softmax_even_of_huge_logits() -> None:
    found = Predictions.of(np.array([[1000.0, 1000.0, -1000.0]]), split_of(1))
    assert found.probabilities.tolist() == [[0.5, 0.5, 0.0]]


@SUFFIXES
def test_no_path_and_no_patient_name_is_written(tmp_path: Path, suffix: str) -> None:
    save_predictions(made(patients=True), tmp_path / f"p{suffix}")
    text = (tmp_path / f"p{suffix}").read_text(encoding="utf-8")
    assert "private" not in text
    assert "name" not in text
    assert "patient" in text


@given(
    st.lists(TEXT, min_size=2, max_size=4),
    st.lists(TEXT, min_size=1, max_size=5, unique=True),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_names_and_any_finite_logits(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], ids: list[str], data: st.DataObject
) -> None:
    finite = st.floats(allow_nan=False, allow_infinity=False)
    row = st.lists(finite, min_size=len(names), max_size=len(names))
    logits = data.draw(st.lists(row, min_size=len(ids), max_size=len(ids)))
    found = Predictions(
        tuple(names), tuple(ids), np.zeros(len(ids), dtype=np.int64), np.array(logits)
    )
    folder = tmp_path_factory.mktemp("any")
    for suffix in (".csv", ".jsonl"):
        if suffix == ".csv" or all(np.abs(logits).ravel() < 1e300):
            with np.errstate(over="ignore"):
                save_predictions(found, folder / f"p{suffix}")
            assert same(load_predictions(folder / f"p{suffix}"), found)


def test_no_text_cell_starts_a_formula(tmp_path: Path) -> None:
    names = ("=cmd()", "+1", "-1", "@x", "'=quoted")
    logits = np.zeros((5, 5))
    save_predictions(Predictions(names, names, np.arange(5), logits), path := tmp_path / "p.csv")
    with path.open(encoding="utf-8", newline="") as file:
        cells = list(csv.reader(file))
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in cells for cell in row)
    assert cells[1][0] == "'=cmd()"
    assert load_predictions(path).ids == names


def test_what_cannot_be_predictions() -> None:
    split = split_of(2)
    with pytest.raises(DataError, match=r"one column per class; found \[3, 3\], wanted \[2, 3\]"):
        Predictions.of(np.zeros((3, 3)), split)
    with pytest.raises(DataError, match=r"case test/1 are not all finite; found 1 such cases"):
        Predictions.of(np.array([[0.0, 0, 0], [0, np.nan, 0]]), split)


def test_faults_of_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"kept as \.csv or \.jsonl; found \.txt"):
        save_predictions(made(), tmp_path / "p.txt")
    with pytest.raises(DataError, match=r"kept as \.csv or \.jsonl; found no suffix"):
        load_predictions(tmp_path / "p")
    with pytest.raises(DataError, match="no such predictions file"):
        load_predictions(tmp_path / "p.csv")
    head = "id,label,predicted,logit: a,logit: b\n"
    line = '{"format": "vademecum predictions 1", "classes": ["a", "b"]}\n'
    for suffix, text, match in [
        (".csv", "", "not a predictions file"),
        (".csv", "a,b\n1,2\n", "not a predictions file"),
        (".csv", head, "not a predictions file"),
        (".csv", head + "x,0,0,1.0\n", "damaged .not one logit per class in every row"),
        (".csv", head + "x,0,0,1.0,y\n", "not a predictions file"),
        (".csv", head + "x,0,0,1.0,2.0\nx,0,0,1.0,2.0\n", "one case stands twice"),
        (".csv", head + "x,0,0,1.0,nan\n", "the logits of case x are not all finite"),
        (".csv", head + "x,2,0,1.0,2.0\n", "a label is no class; found 2"),
        (".jsonl", "{}\n", "not a predictions file"),
        (".jsonl", "{\n", "not a predictions file"),
        (".jsonl", line + '{"id": "x", "label": 0}\n', "not a predictions file"),
        (
            ".jsonl",
            line + '{"id": "x", "label": 0.5, "logits": [1, 2]}\n',
            "not a predictions file",
        ),
        (".jsonl", line + '{"id": "x", "label": 0, "logits": [1]}\n', "not one logit per class"),
    ]:
        path = tmp_path / f"p{suffix}"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=match) as caught:
            load_predictions(path)
        assert "\n" not in str(caught.value)
