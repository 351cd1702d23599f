"""Figures as PNG files: confusion matrix, reliability diagram, training curves, methods.

matplotlib is imported when a figure is drawn, without a display and without its global state or the
user's style file, so the same numbers give the same bytes. Colours are of the Okabe-Ito palette and
of `cividis`, which colour-blind readers can tell apart; nothing is told by colour alone.
"""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache.durable import write_atomic
from cache.errors import DataError
from prompt_tune import metrics
from prompt_tune.statistics import LABELS, Interval

DPI = 150
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.size": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called "$x$"
}


def _drawn(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> Path:
    """Runs `draw` on a fresh figure of `size` inches and writes it, whole or not at all."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcParams.update(mpl.rcParamsDefault)
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None}, bbox_inches="tight")
    write_atomic(path, png.getvalue())
    return path


def _wrapped(name: str, width: int = 26, lines: int = 3) -> str:
    """`name` over at most `lines` lines, shortened beyond that."""
    return "\n".join(
        textwrap.wrap(name, width, max_lines=lines, placeholder=" …", break_long_words=True)
    )


def _shortened(name: str, width: int = 28) -> str:
    """`name` on one line of at most `width` characters, its beginning and its end kept."""
    head = width * 3 // 5
    if len(name) <= width:
        return name
    return f"{name[:head].rstrip()}…{name[head + 1 - width :].lstrip()}"


def confusion_matrix(
    probabilities: metrics.Probabilities,
    labels: metrics.Labels,
    class_names: Sequence[str],
    path: Path,
) -> Path:
    """The confusion matrix: a row per true class, cells as share of the row and as cases.

    Raises:
        DataError: see `prompt_tune.metrics.check`.
    """
    counts = metrics.confusion(*metrics.check(probabilities, labels))
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    classes = len(counts)
    cell = 0.62 if classes <= 10 else 0.46
    longest = max(len(line) for name in class_names for line in _wrapped(name).splitlines())
    margin = 0.072 * longest + 0.5
    size = (max(4.2, classes * cell + margin + 1.1), max(3.6, classes * cell + 0.72 * margin + 0.9))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        picture = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        for row, column in np.ndindex(counts.shape):
            n, share = counts[row, column], shares[row, column]
            if n:
                text = f"{share:.0%}\n{n}" if classes <= 12 else f"{n}"
                colour = "white" if share < 0.55 else "black"
                size = 7 if classes <= 12 else 6
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
        ticks = [_shortened(name) for name in class_names]
        rows = [
            f"{_wrapped(name)} ({n})"
            for name, n in zip(class_names, totals[:, 0].tolist(), strict=True)
        ]
        axes.set_xticks(range(classes), ticks, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted class", ylabel="true class (cases)")
        bar = figure.colorbar(picture, ax=axes, shrink=0.8, format="{x:.0%}")
        bar.set_label("share of the true class")

    return _drawn(path, size, draw)


def reliability_diagram(
    probabilities: metrics.Probabilities, labels: metrics.Labels, path: Path
) -> Path:
    """Accuracy against confidence in 15 bins, with the number of cases in each below.

    Raises:
        DataError: see `prompt_tune.metrics.check`.
    """
    p, y = metrics.check(probabilities, labels)
    count, confidence, right = metrics.reliability(p, y)
    full = count > 0
    at, accuracy = confidence[full] / count[full], right[full] / count[full]
    error = metrics.expected_calibration_error(p, y)
    edges = np.linspace(0, 1, metrics.BINS + 1)

    def draw(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect")
        low, high = np.minimum(at, accuracy), np.maximum(at, accuracy)
        top.vlines(at, low, high, color=ORANGE, alpha=0.7, label="gap")
        top.plot(at, accuracy, color=BLUE, marker="o", markersize=4, label="these predictions")
        top.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="accuracy in the bin")
        top.set_title(f"expected calibration error {error:.3f}, {len(y)} cases", loc="left")
        top.legend(loc="upper left")
        bottom.bar(edges[:-1], count, width=1 / metrics.BINS, align="edge", color=BLUE, ec="white")
        bottom.set(xlabel="confidence in the predicted class", ylabel="cases")
        bottom.yaxis.get_major_locator().set_params(integer=True, nbins=3)

    return _drawn(path, (4.6, 5.2), draw)


def training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Training loss and, where it was measured, validation accuracy per epoch.

    Args:
        history: rows with `epoch`, `loss` and perhaps `val_accuracy`.
        path: the PNG to write.

    Raises:
        DataError: no epochs.
    """
    if not history:
        what = "there are no epochs to draw"
        raise DataError(what)
    panels = [("loss", "training loss", BLUE)]
    if any("val_accuracy" in row for row in history):
        panels.append(("val_accuracy", "validation accuracy", ORANGE))

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for axes, (key, label, colour) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            rows = [row for row in history if key in row]
            epochs = [int(row["epoch"]) for row in rows]
            values = [float(row[key]) for row in rows]
            marker = "o" if len(rows) <= 30 else None
            axes.plot(epochs, values, color=colour, marker=marker, markersize=3)
            axes.set(xlabel="epoch")
            axes.set_title(label, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y", alpha=0.3)

    return _drawn(path, (3.8 * len(panels), 3.0), draw)


def methods(
    rows: Sequence[tuple[str, Interval]],
    path: Path,
    *,
    measure: str = "accuracy",
    guess: float | None = None,
) -> Path:
    """One dot per method with its confidence interval, in the order given.

    Args:
        rows: (method, interval).
        path: the PNG to write.
        measure: what the axis shows.
        guess: what the best constant answer scores, as a dashed line.

    Raises:
        DataError: no methods.
    """

    def draw(axes: Any, k: int) -> str:
        if guess is not None and k == 0:
            axes.axvline(guess, color=GREY, linestyle="--", linewidth=1, zorder=0)
            axes.annotate(
                "best constant answer",
                (guess, 1.01),
                xycoords=("data", "axes fraction"),
                color=GREY,
                fontsize=8,
                ha="center",
                va="bottom",
            )
        value, low, high = rows[k][1]
        if math.isnan(value):
            axes.text(0.5, k, "undefined", transform=axes.get_yaxis_transform(), va="center")
            return ""
        axes.plot([low, high], [k, k], color=BLUE, linewidth=1.5, marker="|", markersize=7)
        axes.plot([value], [k], color=BLUE, marker="o", markersize=5)
        return f"{value:.3f}"

    label = f"{LABELS.get(measure, measure)} (95 % interval)"
    return _one_by_one([name for name, _ in rows], path, draw, label)


def average_ranks(
    rows: Sequence[tuple[str, Sequence[float]]], path: Path, *, measure: str = "accuracy"
) -> Path:
    """Mean rank of every method over data sets, a small dot for each of them; best on top.

    Args:
        rows: (method, its rank on each data set), best mean first.
        path: the PNG to write.
        measure: what methods are ranked by.

    Raises:
        DataError: no methods.
    """
    counts = max((len(own) for _, own in rows), default=0)
    over = f"over {counts} data sets" if counts > 1 else "on one data set"

    def draw(axes: Any, k: int) -> str:
        own = rows[k][1]
        mean = sum(own) / len(own)
        axes.plot([min(own), max(own)], [k, k], color=GREY, linewidth=1, zorder=1)
        axes.plot(own, [k] * len(own), color=GREY, marker="o", markersize=3, linestyle="")
        axes.plot([mean], [k], color=BLUE, marker="D", markersize=6, zorder=3)
        return f"{mean:.1f}"

    label = f"rank by {LABELS.get(measure, measure)}, mean {over} (1 is best)"
    return _one_by_one([name for name, _ in rows], path, draw, label)


def differences(
    rows: Sequence[tuple[str, Sequence[float]]], path: Path, *, measure: str = "accuracy"
) -> Path:
    """How far one method is ahead of each of several variants, with intervals around zero.

    Args:
        rows: (variant, [difference, low, high]).
        path: the PNG to write.
        measure: what differs.

    Raises:
        DataError: no variants.
    """

    def draw(axes: Any, k: int) -> str:
        value, low, high = rows[k][1]
        face = BLUE if low > 0 or high < 0 else "white"
        axes.axvline(0.0, color=GREY, linewidth=1, linestyle="--", zorder=0)
        axes.plot([low, high], [k, k], color=BLUE, linewidth=1.5, marker="|", markersize=7)
        axes.plot([value], [k], color=BLUE, marker="o", markersize=6, markerfacecolor=face)
        return f"{value:+z.3f}"

    label = f"{LABELS.get(measure, measure)}: cached minus variant (95 % interval)"
    return _one_by_one([name for name, _ in rows], path, draw, label)


def _one_by_one(
    names: Sequence[str], path: Path, draw: Callable[[Any, int], str], label: str
) -> Path:
    """A line per name, drawn by `draw`, which returns the number that stands beside it."""
    if not names:
        what = "there is nothing to draw"
        raise DataError(what)
    wrapped = [_wrapped(name, 36, 2) for name in names]
    longest = max(len(line) for name in wrapped for line in name.splitlines())

    def whole(figure: Any) -> None:
        axes = figure.subplots()
        for k in range(len(names)):
            beside = draw(axes, k)
            axes.annotate(beside, (1.02, k), xycoords=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(names)), wrapped)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
        axes.margins(x=0.08)

    return _drawn(path, (4.4 + 0.068 * longest, 1.2 + 0.34 * len(names)), whole)
