"""Figures are images of a sensible size that show the numbers they were given."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.errors import DataError
from prompt_tune import figures
from prompt_tune.statistics import Interval

LONG = "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)"
Draw = Callable[[Path], Path]


def cases(classes: int, seed: int = 0, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=n)
    logits = random.normal(size=(n, classes))
    logits[np.arange(n), labels] += 2
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels


def names(classes: int) -> list[str]:
    return [rf"class {k} $\no such formula$" if k else LONG for k in range(classes)]


def rows(shift: float = 0.0) -> list[tuple[str, Interval]]:
    return [
        ("linear probe", Interval(0.80 + shift, 0.75, 0.85)),
        ("zero-shot, aligned on training images and so no zero-shot", Interval(0.6, 0.55, 0.66)),
        ("undefined", Interval(float("nan"), float("nan"), float("nan"))),
    ]


def history(last: float = 0.1) -> list[dict[str, float]]:
    return [{"epoch": k, "loss": 1 / k, "val_accuracy": last * k} for k in range(1, 6)]


PAIRS: dict[str, tuple[Draw, Draw, tuple[int, int], tuple[int, int]]] = {
    # the figure, one of other numbers, smallest and largest size in pixels
    "confusion": (
        lambda path: figures.confusion_matrix(*cases(8), names(8), path),
        lambda path: figures.confusion_matrix(*cases(8, seed=1), names(8), path),
        (900, 700),
        (1800, 1500),
    ),
    "reliability": (
        lambda path: figures.reliability_diagram(*cases(3), path),
        lambda path: figures.reliability_diagram(*cases(3, seed=1), path),
        (600, 700),
        (800, 900),
    ),
    "curves": (
        lambda path: figures.training_curves(history(), path),
        lambda path: figures.training_curves(history(0.11), path),
        (1000, 400),
        (1300, 600),
    ),
    "methods": (
        lambda path: figures.methods(rows(), path, guess=0.2),
        lambda path: figures.methods(rows(0.01), path, guess=0.2),
        (900, 300),
        (1500, 600),
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_same_numbers_same_bytes_other_numbers_other_picture(tmp_path: Path, kind: str) -> None:
    draw, other, smallest, largest = PAIRS[kind]
    first = draw(tmp_path / "a.png")
    assert draw(tmp_path / "b.png").read_bytes() == first.read_bytes()
    with Image.open(first) as one, Image.open(other(tmp_path / "c.png")) as two:
        assert one.format == "PNG"
        assert all(a <= b <= c for a, b, c in zip(smallest, one.size, largest, strict=True))
        pixels = np.asarray(one.convert("L"), dtype=float)
        assert (pixels[[0, -1]] == 255).all(), "nothing touches the top or the bottom"
        assert (pixels[:, [0, -1]] == 255).all(), "nothing touches the sides"
        assert pixels.std() > 10, "something is drawn"
        assert one.size != two.size or not np.array_equal(pixels, np.asarray(two.convert("L")))


@pytest.mark.parametrize("classes", [2, 20])
def test_confusion_matrices_grow_with_the_classes(tmp_path: Path, classes: int) -> None:
    path = figures.confusion_matrix(*cases(classes), names(classes), tmp_path / "a.png")
    with Image.open(path) as image:
        assert classes * 60 < image.width < 2200
        assert classes * 60 < image.height < 2000


def test_the_cells_of_a_confusion_matrix_are_coloured_by_share(tmp_path: Path) -> None:
    labels = np.repeat([0, 1], 10)
    perfect = figures.confusion_matrix(np.eye(2)[labels], labels, ["a", "b"], tmp_path / "p.png")
    wrong = figures.confusion_matrix(np.eye(2)[1 - labels], labels, ["a", "b"], tmp_path / "w.png")
    yellow = []
    for path in (perfect, wrong):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=int)
        ys, xs = np.nonzero(abs(pixels - (254, 232, 56)).sum(2) < 40)
        inside = xs < image.width * 0.75  # not the colour bar
        yellow.append((ys[inside], xs[inside]))
    for (ys, xs), sign in zip(yellow, (1, -1), strict=True):
        assert sign * np.corrcoef(xs, ys)[0, 1] > 0.4, "the bright cells lie on the diagonal"


def test_a_class_without_cases_and_one_case(tmp_path: Path) -> None:
    figures.confusion_matrix(
        np.array([[0.9, 0.05, 0.05]]), np.array([0]), list("abc"), tmp_path / "a.png"
    )
    figures.reliability_diagram(np.array([[1.0, 0.0]]), np.array([0]), tmp_path / "b.png")
    figures.training_curves([{"epoch": 1, "loss": 1.0}], tmp_path / "c.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_curves_without_validation_have_one_panel(tmp_path: Path) -> None:
    both = figures.training_curves(history(), tmp_path / "a.png")
    alone = [{k: v for k, v in row.items() if k != "val_accuracy"} for row in history()]
    one = figures.training_curves(alone, tmp_path / "b.png")
    with Image.open(both) as a, Image.open(one) as b:
        assert b.width < 0.6 * a.width


def test_numbers_from_a_json_file_of_ours(tmp_path: Path) -> None:
    texts = [{k: str(v) for k, v in row.items()} for row in history()]
    a = figures.training_curves(history(), tmp_path / "a.png")
    b = figures.training_curves(texts, tmp_path / "b.png")
    assert a.read_bytes() == b.read_bytes()


def test_no_global_state_is_touched(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        own = figures.methods(rows(), tmp_path / "a.png").read_bytes()
        assert mpl.rcParams["font.size"] == 30
    assert figures.methods(rows(), tmp_path / "b.png").read_bytes() == own
    assert dict(mpl.rcParams) == before


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no epochs to draw"):
        figures.training_curves([], tmp_path / "a.png")
    with pytest.raises(DataError, match="nothing to draw"):
        figures.methods([], tmp_path / "a.png")
    with pytest.raises(DataError, match="no cases to evaluate"):
        figures.reliability_diagram(np.zeros((0, 2)), np.zeros(0, dtype=int), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
