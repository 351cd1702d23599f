"""Images a second of the input pipeline against the plain one, at 28 and 512 pixels.

    python bench/pipeline.py [--sides 28 512] [--images 64] [--device cuda] [--json FILE]

Pictures lie as PNG files. Each row makes a batch of random resized crops, mirrored and normalised,
of the size a tower reads, again and again:

- `plain`: decode the file, then torchvision on Pillow, picture by picture;
- `stored`: what training does, from the memory-mapped store; on a GPU the batch at once;
- `at once`: the batch by matrix products, on the device, whatever it is.

All give the same bits, which is checked first. On a CPU processor seconds are counted, on a GPU
wall time up to a synchronise. Prints a Markdown table and, with --json, writes everything.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/cache.py is not our cache

import numpy as np
import torch
from torch import Tensor

import prompt_tune  # noqa: F401 - makes torchvision importable
from prompt_tune.augment import Pictures
from prompt_tune.data import load_data
from prompt_tune.preprocess import Preprocess

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)  # of OpenAI's CLIP
WAYS = ("plain", "stored", "at once")


def folder_of(place: Path, side: int, count: int) -> Path:
    """`count` smooth pictures with some noise, as PNG files of two classes and three splits."""
    from PIL import Image

    random = np.random.default_rng(side)
    for split, images in (("train", count), ("val", 2), ("test", 2)):
        for n in range(images):
            folder = place / split / ("a", "b")[n % 2]
            folder.mkdir(parents=True, exist_ok=True)
            coarse = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((side, side), 3), dtype=np.int64)
            pixels = (smooth + random.integers(-9, 10, smooth.shape)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{n}.png")
    return place


def images_per_second(
    make: Callable[[int], Tensor], count: int, repeats: int, device: str
) -> float:
    """The best of `repeats` batches, each of other views."""
    gpu = device.startswith("cuda")
    clock = time.perf_counter if gpu else time.process_time
    best = float("inf")
    for k in range(2, 2 + repeats):
        began = clock()
        make(k)
        if gpu:
            torch.cuda.synchronize()
        best = min(best, clock() - began)
    return count / best


def measure(place: Path, side: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    split = load_data(folder_of(place / str(side), side, options.images))["train"]
    preprocess = Preprocess(options.size, MEAN, STD)
    began = time.perf_counter()
    stored = Pictures(split, preprocess, options.device)
    opening = time.perf_counter() - began
    at_once = Pictures(split, preprocess, options.device)
    at_once.at_once = True
    everything = list(range(len(split)))

    def plain(k: int) -> Tensor:
        views = [preprocess.view(split.image(i), k, 1, split.digests[i]) for i in everything]
        return torch.stack(views).to(options.device)

    def shown(pictures: Pictures, k: int) -> Tensor:
        return pictures.show(everything, [k] * len(everything), 1)

    ways: tuple[Callable[[int], Tensor], ...] = (
        plain, lambda k: shown(stored, k), lambda k: shown(at_once, k),
    )  # fmt: skip
    first = [make(1).cpu() for make in ways]
    equal = all(torch.equal(other, first[0]) for other in first[1:])
    rates = {
        way: images_per_second(make, len(split), options.repeats, options.device)
        for way, make in zip(WAYS, ways, strict=True)
    }
    return {"side": side, "equal": equal, "fill_store_seconds": opening, "images_per_second": rates}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per side."""
    lines = [
        "| pixels | plain /s | stored /s | at once /s | stored / plain | bits equal |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        plain, stored, at_once = (row["images_per_second"][way] for way in WAYS)
        lines.append(
            f"| {row['side']} | {plain:.0f} | {stored:.0f} | {at_once:.0f} | "
            f"{stored / plain:.2f} | {'yes' if row['equal'] else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures every side and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[28, 512])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="what the tower reads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["VADEMECUM_HOME"] = str(Path(name) / "home")
        rows = [measure(Path(name), side, options) for side in options.sides]
    print(table(rows))
    if options.json:
        facts = {
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "device": options.device, "machine": platform.machine(), "images": options.images,
            "size": options.size, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
