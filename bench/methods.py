"""Every method on the embedded data, under one budget in images seen: the table of docs/methods.md.

    python bench/methods.py --out runs/methods [--only coop cilmp] [--seeds 1-3]
        [--datasets bloodmnist] [--budget images_seen=2560] [--write docs/methods.md]

For every data set: extract its knowledge, align a backbone on each seed's own few training images,
tune and evaluate every method of bench/methods.yaml, then evaluate some on the other data set. A
cell that is finished is skipped and an unfinished one goes on, so the command can be stopped,
repeated, and run twice at once with other seeds. A method that is refused or fails is listed under
the table.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # bench/cache.py is not our cache

from cache.recipe import read_yaml

BEGIN, END = "<!-- table: python bench/methods.py -->", "<!-- end of table -->"


def knowledge_of(dataset: str, preset: str, out: Path) -> Path:
    """The sealed cache of a data set; extracted once."""
    from knowledge_extract import RunSettings, extract
    from knowledge_extract.recipe import load_extract_recipe

    file = out / f"{dataset}.h5"
    if not file.is_file():
        extract(load_extract_recipe(preset), file, RunSettings(device="cpu"))
    return file


def backbone_of(dataset: str, seed: int, shots: int, out: Path) -> Path:
    """A backbone aligned on the images that a run of this seed trains on."""
    from prompt_tune.align_run import align_data, load_align_recipe

    folder = out / dataset / f"backbone-{seed}"
    if not (folder / "alignment.json").is_file():
        recipe = load_align_recipe(
            "clip-minilm", (f"samples.shots={shots}", f"samples.seed={seed}")
        )
        align_data(recipe, data=dataset, out=folder, device="cpu")
    return folder


def recipe_of(method: str, spec: dict[str, Any], budget: dict[str, int], **fixed: Any) -> Any:
    """A preset under the budget; `fixed` says backbone, seed and number of classes."""
    from prompt_tune.recipe import load_tune_recipe

    per_epoch = budget["shots"] * fixed["classes"]
    changes = {
        "samples.shots": budget["shots"],
        "samples.seed": fixed["seed"],
        "seed": fixed["seed"],
        "train.epochs": max(1, round(budget["images_seen"] / per_epoch)),
        "train.batch_size": budget["batch"],
        "train.warmup_epochs": 0,
        "train.views": 1,
        **(spec.get("set") or {}),
    }
    settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    tower = json.dumps({"aligned": str(fixed["backbone"])})
    return load_tune_recipe(spec.get("preset", method), (*settings, f"backbone={tower}"))


def cell(name: str, spec: dict[str, Any], place: Path, world: dict[str, Any]) -> dict[str, Any]:
    """One method on one data set under one seed, tuned and evaluated, or why it was not."""
    from prompt_tune.evaluation import evaluate, metrics_file
    from prompt_tune.tuning import tune

    budget, began = world["budget"], (time.perf_counter(), time.process_time())
    try:
        recipe = recipe_of(name, spec, budget, **world["fixed"])
        result = tune(
            recipe, data=world["data"], out=place, knowledge=world["knowledge"], device="cpu",
            shelf=world["shelf"],
        )  # fmt: skip
        if not metrics_file(place, "test", budget["part"]).is_file():
            evaluate(place, part=budget["part"], setup=result.setup)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other cells go on
        return {"failed": f"{type(error).__name__}: {error}"}
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    return {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}


def moved(place: Path, other: str, knowledge: Path, part: int) -> dict[str, Any]:
    """A finished cell's checkpoint on the other data set, or why it cannot be evaluated there."""
    from prompt_tune.evaluation import metrics_file
    from prompt_tune.transfer import evaluate_on, evaluation_name

    name = evaluation_name(other, "test", "all")
    try:
        if not metrics_file(place, name, part).is_file():
            evaluate_on(place, data=other, knowledge=knowledge, part=part, transfer=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other cells go on
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"evaluation": name}


def recorded(out: Path, found: dict[str, Any], *names: str | int) -> None:
    """Keeps what a cell took or why it failed; a cell that was finished before changes nothing."""
    file = out / "cells" / ("-".join(str(n).replace(" ", "-") for n in names) + ".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(file.read_text()) if file.is_file() else {}
    more = found.get("cpu_seconds", 0) > old.get("cpu_seconds", 0)
    if not old or "failed" in old or "failed" in found or more:
        file.write_text(json.dumps({"cell": names, **found}))
    print(*names, json.dumps(found), flush=True)


def run(options: argparse.Namespace, plan: dict[str, Any]) -> None:
    """Every cell that is not finished, those on cached features first."""
    from prompt_tune.shelf import Shelf

    budget, out = plan["budget"], options.out
    methods = {**plan["cached"], **plan["pixels"]}
    chosen = options.only or list(methods)
    datasets = {d: s for d, s in plan["datasets"].items() if d in (options.datasets or [d])}
    caches = {d: knowledge_of(d, s["extract"], out) for d, s in plan["datasets"].items()}
    for group in ("cached", "pixels", "transfer"):
        for dataset in datasets:
            shelf = Shelf()
            classes = len(shelf.data(dataset, None).classes)
            for seed in options.seeds:
                backbone = backbone_of(dataset, seed, budget["shots"], out)
                fixed = {"backbone": backbone, "seed": seed, "classes": classes}
                world = dict(budget=budget, data=dataset, knowledge=caches[dataset], fixed=fixed,
                             shelf=shelf)  # fmt: skip
                for name in (n for n in plan[group] if n in chosen):
                    place = out / dataset / name.replace(" ", "-") / f"seed-{seed}"
                    if group != "transfer":
                        found = cell(name, methods[name] or {}, place, world)
                        recorded(out, found, dataset, name, seed)
                        continue
                    for other in (d for d in caches if d != dataset):
                        found = moved(place, other, caches[other], budget["part"])
                        recorded(out, found, dataset, name, seed, "on", other)


def report(options: argparse.Namespace, plan: dict[str, Any]) -> str:
    """The tables, what failed and how long it took."""
    from prompt_tune.checkpoint import read_run
    from prompt_tune.method_table import compare_methods, find_runs

    part = plan["budget"]["part"]
    finished = [
        run for run in find_runs([options.out])
        if read_run(run).get("status") == "finished"
        and (run / "eval" / f"test-{part}" / "metrics.json").is_file()
    ]  # fmt: skip
    found = compare_methods(finished, split=f"test-{part}", out=options.out / "table")
    cells = [json.loads(f.read_text()) for f in sorted((options.out / "cells").glob("*.json"))]
    failed = [c for c in cells if "failed" in c]
    seconds = sum(c.get("cpu_seconds", 0) for c in cells)
    timed = sum("cpu_seconds" in c for c in cells)
    lines = [found.text("markdown"), transfers(options.out, plan)]
    lines += [f"- Failed: {' '.join(map(str, c['cell']))}: {c['failed']}" for c in failed]
    lines.append(
        f"{timed} of {len(finished)} cells were timed: {seconds / 60:.0f} processor minutes."
    )
    return "\n\n".join(lines)


def transfers(out: Path, plan: dict[str, Any]) -> str:
    """Accuracy of every method's checkpoints on the data set they were not tuned on."""
    from statistics import fmean, stdev

    part, sets = plan["budget"]["part"], list(plan["datasets"])
    pairs = [(a, b) for a in sets for b in sets if a != b]
    lines = ["| method | " + " | ".join(f"{a} → {b}" for a, b in pairs) + " |"]
    lines.append("|---|" + "---:|" * len(pairs))
    for name in plan["transfer"]:
        line = [name]
        for home, other in pairs:
            pattern = f"{name.replace(' ', '-')}/seed-*/eval/{other}-test-all-{part}/metrics.json"
            files = sorted((out / home).glob(pattern))
            values = [float(json.loads(f.read_text())["metrics"]["accuracy"]) for f in files]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            line.append(f"{fmean(values):.3f}{spread} ({len(values)})" if values else "")
        lines.append(f"| {' | '.join(line)} |")
    lines += ["", f"Tuned on the first, {part} test images of the second; (number of seeds)."]
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, prints the tables, and writes them into a document if asked."""
    from prompt_tune.many import parse_seeds

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--seeds", type=parse_seeds, default=(1, 2, 3))
    parser.add_argument("--datasets", nargs="+")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--budget", nargs="+", default=[], help="images_seen=2560 and the like")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--report", action="store_true", help="only the tables")
    options = parser.parse_args()
    plan = read_yaml(ROOT / "bench" / "methods.yaml")
    plan["budget"] |= {k: int(v) for k, _, v in (b.partition("=") for b in options.budget)}
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        run(options, plan)
    text = report(options, plan)
    print(text)
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
