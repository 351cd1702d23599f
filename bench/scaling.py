"""How time and memory of a CILMP step and the time of a CoOp epoch grow; draws one figure.

    python bench/scaling.py [--figure docs/figures/scaling.png] [--json scaling-bench.json]

A step is `bench/tune.py`'s: forward and backward on OpenAI's ViT-B/16 with random weights, rows of
width 4096, depth 12 and 12. Each panel moves one of classes, images per batch and knowledge rows
and holds the others (8 classes, 4 images, 32 rows); where the image side stays the same, the text
side is measured alone. The last panel is CoOp on cached features: batches of 32 of 8 classes.
Time is processor seconds, best of the repeats; memory is bytes kept for the backward. Between two
points the exponent is log(ratio of costs) / log(ratio of sizes): 1 is linear, 0 a fixed cost.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/cache.py is not our cache

import torch

from bench.tune import NAMES, ROWS, backbone_of, case_of, counted, forget, seconds_of, work

CLASSES, BATCH = 8, 4
SIZES = {
    "classes": (2, 5, 10, 20, 40),
    "images": (1, 2, 4, 8, 16),
    "rows": (8, 16, 32, 64),
    "shots": (1, 2, 4, 8, 16),
}
TITLES = {
    "classes": "text side of a CILMP step",
    "images": "whole CILMP step",
    "rows": "text side of a CILMP step",
    "shots": "CoOp epoch on cached features",
}
LABELS = {
    "classes": "classes",
    "images": "images in the batch",
    "rows": "knowledge rows per class",
    "shots": "images per class (shots)",
}


WHY = {
    "classes": "products of the stages' parameters, once a step however many classes read them",
    "images": "what a step does once whatever its batch: those products, and the visual prompts",
    "rows": "rows are keys of rank 8 that the few live name tokens look at, and no more",
    "shots": "an epoch of up to 32 images is one step, and the text side of a step reads no image",
}


@dataclass(frozen=True)
class Point:
    """One measurement."""

    size: int
    seconds: float
    gb: float


def step(backbone: Any, repeats: int, *, classes: int, images: int, rows: int, part: str) -> Point:
    """One CILMP step."""
    case = case_of(backbone, images, classes, "cpu", rows)
    forward = work(case, "ours", part)
    gb, found = counted(case, "ours", part)["saved_gb"], []
    for _ in range(repeats):
        found.append(seconds_of(lambda: forward().backward(), "cpu"))
        forget(case)
    return Point(0, min(found), gb)


def coop_epoch(backbone: Any, repeats: int, shots: int) -> Point:
    """All steps of one epoch of CoOp."""
    from prompt_tune.method import Batch, Problem
    from prompt_tune.methods.coop import CoOp, CoopConfig

    names = tuple(f"{NAMES[k % len(NAMES)]} {k}" for k in range(CLASSES))
    method = CoOp(CoopConfig(), Problem(backbone=backbone, class_names=names))
    labels = torch.arange(CLASSES).repeat(shots)
    features = torch.randn(len(labels), backbone.embed_dim)
    size = min(32, len(labels))

    def epoch() -> None:
        for some in torch.arange(len(labels)).split(size):
            method.loss(Batch(labels=labels[some], features=features[some])).backward()

    return Point(shots, min(seconds_of(epoch, "cpu") for _ in range(repeats + 1)), math.nan)


def measure(backbone: Any, panel: str, sizes: Sequence[int], repeats: int) -> list[Point]:
    """The points of one panel."""
    if panel == "shots":
        return [coop_epoch(backbone, repeats, shots) for shots in sizes]
    held = {"classes": CLASSES, "images": BATCH, "rows": ROWS}
    part = "whole" if panel == "images" else "text"
    found = []
    for size in sizes:
        one = step(backbone, repeats, **(held | {panel: size}), part=part)
        found.append(Point(size, one.seconds, one.gb))
    return found


def exponents(points: Sequence[Point], key: str) -> list[float]:
    """Of the growth between neighbouring points."""
    return [
        math.log(getattr(b, key) / getattr(a, key)) / math.log(b.size / a.size)
        for a, b in itertools.pairwise(points)
    ]


def fixed_share(points: Sequence[Point]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line of seconds over size."""
    sizes = torch.tensor([[1.0, p.size] for p in points], dtype=torch.float64)
    seconds = torch.tensor([[p.seconds] for p in points], dtype=torch.float64)
    a, b = torch.linalg.lstsq(sizes, seconds).solution.flatten().tolist()
    return a, b


def growth(fixed: float, each: float) -> str:
    """Where the growth is linear, in words."""
    line = f"about {max(fixed, 0):.3f} s and {1e3 * each:.1f} ms for each;"
    if fixed < each / 2:
        return f"{line} linear from the first on. The little that is fixed:"
    return f"{line} what is fixed weighs as much as {fixed / each:.0f} of them:"


def table(found: dict[str, list[Point]]) -> str:
    """Markdown: every panel, with its exponents and its straight line."""
    titles = "what grows | size | seconds | exponent | kept GB | exponent"
    lines = [f"| {titles} |", "|---|" + "---:|" * 5]
    for panel, points in found.items():
        slopes = ["", *(f"{x:.2f}" for x in exponents(points, "seconds"))]
        kept = ["", *(f"{x:.2f}" for x in exponents(points, "gb"))]
        for point, slope, grown in zip(points, slopes, kept, strict=True):
            memory = [f"{point.gb:.3f}", grown] if panel != "shots" else ["", ""]
            cells = [LABELS[panel], str(point.size), f"{point.seconds:.3f}", slope, *memory]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, list[Point]], file: Path) -> None:
    """Four small panels, both axes logarithmic, with a line of slope 1 through the last point."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.1), layout="constrained")
    for axis, (panel, points) in zip(axes, found.items(), strict=True):
        sizes = [p.size for p in points]
        curves = [("seconds", "processor seconds", "C0", "o")]
        if panel != "shots":
            curves.append(("gb", "GB kept for the backward", "C1", "s"))
        for key, label, colour, marker in curves:
            values = [getattr(p, key) for p in points]
            ends = [values[-1] * size / sizes[-1] for size in (sizes[0], sizes[-1])]
            axis.plot((sizes[0], sizes[-1]), ends, "--", color="0.7", lw=1, zorder=1)
            axis.plot(sizes, values, color=colour, marker=marker, ms=4, lw=1.5, label=label)
        axis.set(xscale="log", yscale="log", title=TITLES[panel], xlabel=LABELS[panel])
        axis.title.set_fontsize(10)
        axis.set_xticks(sizes)
        axis.xaxis.set_major_formatter(plain)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_locator(NullLocator())
        axis.tick_params(labelsize=8)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    dashed = plt.Line2D([], [], ls="--", color="0.7", lw=1)
    figure.legend(
        [*handles, dashed], [*labels, "linear"], loc="outside lower center", ncols=3,
        frameon=False, fontsize=9,
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/scaling.png"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--most", type=int, help="leave out larger sizes, for a quick look")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    backbone = backbone_of("cpu")
    found: dict[str, list[Point]] = {}
    for panel, sizes in SIZES.items():
        kept = [n for n in sizes if options.most is None or n <= options.most]
        found[panel] = measure(backbone, panel, kept, options.repeats)
        fixed, each = fixed_share(found[panel])
        print(f"{LABELS[panel]}: {growth(fixed, each)} {WHY[panel]}.", flush=True)
    print(f"\n{table(found)}")
    draw(found, options.figure)
    if options.json:
        rows = {panel: [asdict(p) for p in points] for panel, points in found.items()}
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "points": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
