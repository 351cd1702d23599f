"""Whole runs by the command line, from command to metrics, on the embedded data and models.

    python bench/run.py [--runs 100] [--sample 5] [--all] [--json run-bench.json]

Every row is the real `vademecum` in a process of its own, which imports, trains and evaluates: wall
and processor seconds and the highest memory. BloodMNIST is cut to 32 training, 4 validation and 32
test images per class, so that the features of all shots of all seeds are computed once, in a
timed first run, into an empty feature store. The backbone is the demo's, aligned on OrganAMNIST:
aligned on some of these images it would be refused for all seeds but one. What is marked "≈" was
not run whole: `--runs` runs follow from `--sample` of them unless `--all` is given, a CILMP run
with visual prompts from 20 steps. A second table has the parts of an epoch, all in one process.
`--epochs` and `--shots` make everything smaller, for a quick look.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # beside this lies a `cache.py`

import numpy as np
import yaml

from cache.assets import listing, location
from cache.user_folder import user_cache

CLASSES, STEPS = 8, 20  # of CILMP with visual prompts


@dataclass
class Row:
    """One line of the table; `runs` is what its name promises, `measured` what was run."""

    name: str
    command: str
    wall: float
    processor: float
    peak_gb: float
    extrapolated: bool = False


class Bench:
    """A folder with data, knowledge and backbone, and a feature store of its own."""

    def __init__(self, folder: Path, shots: int, epochs: int | None) -> None:
        self.folder, self.rows, self.shots = folder, list[Row](), shots
        self.home = folder / "home"
        self.home.mkdir()
        for name in ("assets", "converted", "models"):
            if (there := user_cache() / name).is_dir():
                (self.home / name).symlink_to(there)
        self.parts = {"train": 2 * shots, "val": 4, "test": 2 * shots}  # images per class
        self.data = write_images(folder, self.parts)
        self.knowledge, self.backbone = folder / "knowledge.h5", folder / "backbone"
        self.smaller = ["--set", f"samples.shots={shots}"]
        self.smaller += [] if epochs is None else ["--set", f"train.epochs={epochs}"]

    def call(self, name: str, arguments: list[str]) -> Row:
        """Runs one command and notes what it took.

        Raises:
            SystemExit: it failed.
        """
        log = self.folder / "log"
        environment = os.environ | {"VADEMECUM_HOME": str(self.home)}
        began = time.perf_counter()
        with log.open("wb") as out:
            process = subprocess.Popen(
                arguments, stdout=out, stderr=out, env=environment, cwd=self.folder
            )
            _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(arguments)}\n{last}")
        command = " ".join([Path(arguments[0]).name, *arguments[1:]])
        command = command.replace(f"{self.folder}/", "")
        processor, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9
        return Row(name, command, wall, processor, peak)

    def vademecum(self, name: str, *arguments: str) -> Row:
        """One command of the command line."""
        return self.call(name, [str(Path(sys.executable).with_name("vademecum")), *arguments])

    def tune(self, name: str, recipe: str, out: str, seeds: str, *settings: str) -> Row:
        """A run of a preset on the aligned backbone, evaluated."""
        where = f"backbone={{aligned: {json.dumps(str(self.backbone))}}}"
        sets = [word for one in (where, *settings) for word in ("--set", one)]
        arguments = [recipe, "--data", str(self.data), "--out", out, *sets, *self.smaller]
        if recipe == "cilmp":
            arguments += ["--knowledge", str(self.knowledge)]
        last = ["--seeds", seeds, "--eval", "test", "--device", "cpu"]
        return self.vademecum(name, "tune", *arguments, *last)

    def add(self, row: Row) -> Row:
        """Keeps and prints a row."""
        self.rows.append(row)
        print(line(row), flush=True)
        return row


def write_images(folder: Path, parts: dict[str, int]) -> Path:
    """A declaration of BloodMNIST with its first images of every class alone."""
    with np.load(location("bloodmnist")) as whole:
        chosen = {}
        for split, count in parts.items():
            labels = whole[f"{split}_labels"].reshape(-1)
            first = [np.flatnonzero(labels == k)[:count] for k in np.unique(labels)]
            at = np.sort(np.concatenate(first))
            chosen[f"{split}_images"] = whole[f"{split}_images"][at]
            chosen[f"{split}_labels"] = labels[at]
    np.savez(folder / "images.npz", **chosen)
    preset = ROOT / "prompt_tune" / "data" / "presets" / "bloodmnist.yaml"
    declared = yaml.safe_load(preset.read_text(encoding="utf-8"))
    del declared["asset"]
    file = folder / "images.yaml"
    file.write_text(yaml.safe_dump(declared | {"path": "images.npz"}), encoding="utf-8")
    return file


def write_knowledge(folder: Path) -> Path:
    """The demo's extraction recipe with answers and the states of all layers alone."""
    preset = ROOT / "knowledge_extract" / "presets" / "bloodmnist-demo.yaml"
    recipe = yaml.safe_load(preset.read_text(encoding="utf-8"))
    recipe["blocks"] = {name: recipe["blocks"][name] for name in ("answers", "layers")}
    file = folder / "knowledge.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def best(rows: list[Row]) -> Row:
    """The least of several like runs."""
    least = min(row.wall for row in rows), min(row.processor for row in rows)
    return Row(rows[0].name, rows[0].command, *least, max(row.peak_gb for row in rows))


def together(name: str, rows: list[Row]) -> Row:
    """Several commands as one row."""
    command = "; ".join(row.command for row in rows)
    wall, processor = sum(row.wall for row in rows), sum(row.processor for row in rows)
    return Row(name, command, wall, processor, max(row.peak_gb for row in rows))


def start_up(bench: Bench, repeats: int = 7) -> None:
    """What every command pays first."""
    alone = [sys.executable, "-c", "import prompt_tune"]
    bench.add(best([bench.vademecum("`vademecum --help`", "--help") for _ in range(repeats)]))
    bench.add(best([bench.call("`import prompt_tune`", alone) for _ in range(repeats)]))


def once(bench: Bench) -> None:
    """What runs share: knowledge, backbone, image features."""
    recipe = str(write_knowledge(bench.folder))
    known = ["extract", recipe, "--out", str(bench.knowledge), "--device", "cpu"]
    bench.add(bench.vademecum("once: extract 8 answers and their states", *known))
    align = ["align", "clip-minilm", "--data", "organamnist", "--out", str(bench.backbone)]
    bench.add(bench.vademecum("once: align the backbone", *align, "--device", "cpu"))
    rows = [bench.tune("", "zero-shot", "zero-shot", "1")]
    evaluation = ("eval", "zero-shot/seed=1", "--split")
    rows += [bench.vademecum("", *evaluation, split) for split in ("train", "val")]
    images = CLASSES * sum(bench.parts.values())
    bench.add(together(f"once: features of {images} images, by evaluating zero-shot", rows))


def single(bench: Bench) -> Row:
    """One run of each kind; gives that of CoOp."""
    kind = f"{bench.shots}-shot"
    coop = bench.add(bench.tune(f"{kind} CoOp", "coop", "coop", "1"))
    still = ("method.visual_depth=0", "train.views=1")
    bench.add(bench.tune(f"{kind} CILMP, no visual prompts", "cilmp", "cilmp", "1", *still))
    name = f"{kind} CILMP with visual prompts, {STEPS} steps"
    few = bench.add(bench.tune(name, "cilmp", "visual", "1", f"train.max_steps={STEPS}"))
    run = json.loads((bench.folder / "visual/seed=1/run.json").read_text(encoding="utf-8"))
    found, spec = run["training"], run["recipe"]["train"]
    steps = spec["epochs"] * max(CLASSES * bench.shots // spec["batch_size"], 1)
    more = (steps - found["steps"]) * float(found["step_seconds"])
    name = f"{kind} CILMP with visual prompts, all {steps} steps"
    processor = few.processor * (1 + more / few.wall)
    bench.add(Row(name, "", few.wall + more, processor, few.peak_gb, extrapolated=True))
    return coop


def many(bench: Bench, alone: Row, runs: int, sample: int) -> None:
    """Many CoOp runs in one process, and as processes; of `sample` of them unless it is all."""
    name = f"{runs} {bench.shots}-shot CoOp runs in one process"
    part = bench.tune(name, "coop", "many", f"1-{sample}")

    def carried_on(first: float, measured: float) -> float:
        return first + (runs - 1) * (measured - first) / (sample - 1)

    whole = carried_on(alone.wall, part.wall), carried_on(alone.processor, part.processor)
    one = Row(name, part.command, *whole, part.peak_gb, extrapolated=sample < runs)
    name = f"{runs} {bench.shots}-shot CoOp runs as {runs} processes"
    rows = [alone]
    rows += [bench.tune(name, "coop", "apart", str(k)) for k in range(2, sample + 1)]
    apart = together(name, rows)
    scale = runs / sample
    whole = apart.wall * scale, apart.processor * scale
    bench.add(one)
    bench.add(Row(name, rows[-1].command, *whole, apart.peak_gb, extrapolated=sample < runs))


def line(row: Row) -> str:
    """A row in Markdown."""
    mark = "≈ " if row.extrapolated else ""
    digits = 2 if row.wall < 10 else 0
    seconds = [f"{mark}{value:,.{digits}f}" for value in (row.wall, row.processor)]
    return f"| {row.name} | {' | '.join(seconds)} | {row.peak_gb:.2f} |"


def least(work: Callable[[], Any], repeats: int) -> float:
    """Processor seconds, the best of some."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def epoch(bench: Bench) -> dict[str, float]:
    """Processor seconds of the parts of an epoch, in this process."""
    os.environ["VADEMECUM_HOME"] = str(bench.home)
    import torch
    import torch.nn.functional as F

    from prompt_tune.loop import train
    from prompt_tune.recipe import load_tune_recipe
    from prompt_tune.setup import Setup, prepare
    from prompt_tune.shelf import Shelf

    shelf = Shelf()

    def setup(recipe: str, *settings: str) -> Setup:
        where = f"backbone={{aligned: {json.dumps(str(bench.backbone))}}}"
        loaded = load_tune_recipe(recipe, (where, *settings))
        return prepare(loaded, data=str(bench.data), knowledge=None, samples=None, shelf=shelf)

    shots = f"samples.shots={bench.shots}"
    coop, live = setup("coop", shots), setup("coop", shots, "train.views=live")
    spec, method = coop.recipe.train, coop.method
    cached, again = (one.cases(one.train, training=True) for one in (coop, live))

    def image_side(cases: Any) -> None:
        for indices in cases.epoch(1, spec.batch_size):
            method.image_features(cases.batch(indices, epoch=1))

    batch = cached.batch(torch.arange(min(spec.batch_size, len(cached))))
    fixed = method.image_features(batch)

    def text_side() -> None:
        for _ in range(cached.steps(spec.batch_size)):
            scores = method.cosine_logits(fixed, method.text_features())
            F.cross_entropy(scores, batch.labels).backward()

    def epochs(count: int) -> None:
        few = spec.model_copy(update={"epochs": count})
        with (
            tempfile.TemporaryDirectory(dir=bench.folder) as name,
            contextlib.redirect_stderr(io.StringIO()),  # progress
        ):
            train(method, cached, None, few, folder=Path(name), digest="")

    probe = setup("linear-probe", shots)
    everything = torch.arange(len(cached))
    text_side()
    again.prepare()
    return {
        "image side, encoded again": least(lambda: image_side(again), 1),
        "image side, cached": least(lambda: image_side(cached), 20),
        "text side of CoOp": least(text_side, 5),
        "epoch of CoOp, cached": least(lambda: epochs(5), 2) / 5,
        "linear probe, cached": least(lambda: probe.method.fit(cached.batch(everything), None), 5),
    }


def epoch_table(parts: dict[str, float], images: int) -> str:
    """The parts, and what follows for a whole epoch."""
    again, cached, text, coop, probe = parts.values()
    titles = "from the cache | encoded again | ratio"
    lines = [f"| {images} images | {titles} |", "|---|---:|---:|---:|"]
    for name, fast, slow in (
        ("image side of an epoch", cached, again),
        ("linear probe: images read and solved once", probe, probe - cached + again),
        ("CoOp: a whole epoch", coop, coop - cached + again),
    ):
        ratio = slow / fast
        lines.append(f"| {name} | {1e3 * fast:.2f} ms | {slow:.2f} s | {ratio:,.1f}x |")
    lines += ["", f"A CoOp epoch takes {coop / text:.3f} of its text side alone ({text:.3f} s)."]
    return "\n".join(lines)


def main() -> None:
    """Measures everything and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="of CoOp, from 2 on")
    parser.add_argument("--sample", type=int, default=5, help="of those that are run, from 2 on")
    parser.add_argument("--all", action="store_true", help="run them all")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--epochs", type=int, help="of every run, instead of the preset's")
    parser.add_argument("--work", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    absent = [status.name for status in listing() if status.state != "present"]
    if absent:
        print(f"absent: {', '.join(absent)}; `vademecum assets fetch` brings them")
        return
    print("| what | wall s | processor s | peak GB |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-") as name:
        bench = Bench(Path(name), options.shots, options.epochs)
        start_up(bench)
        once(bench)
        coop = single(bench)
        many(bench, coop, options.runs, options.runs if options.all else options.sample)
        parts = epoch(bench)
    import torch

    print("\n≈ extrapolated\n")
    print(f"processor seconds of an epoch\n\n{epoch_table(parts, CLASSES * options.shots)}")
    facts = {
        "rows": [asdict(row) for row in bench.rows],
        "epoch": parts,
        "options": {k: str(v) for k, v in vars(options).items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    print(f"\n{facts['threads']} threads, load {facts['load']:.1f}, torch {facts['torch']}")
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
