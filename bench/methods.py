"""Every method on the embedded data, under one budget in images seen: the table of docs/methods.md.

    python bench/methods.py --out runs/methods [--only coop cilmp] [--seeds 1-3]
        [--datasets bloodmnist] [--budget images_seen=2560] [--write docs/methods.md]

For every data set: extract its knowledge, align a backbone on each seed's own few training images,
tune and evaluate every method of bench/methods.yaml. A cell that is finished is skipped and an
unfinished one goes on, so the command can be stopped and repeated. A method that is refused or
fails is a row that says so.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # bench/cache.py is not our cache

from cache.errors import VademecumError
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

    budget, began = world["budget"], time.perf_counter()
    try:
        recipe = recipe_of(name, spec, budget, **world["fixed"])
        result = tune(
            recipe, data=world["data"], out=place, knowledge=world["knowledge"], device="cpu",
            shelf=world["shelf"],
        )  # fmt: skip
        if not metrics_file(place, "test", budget["part"]).is_file():
            evaluate(place, part=budget["part"], setup=result.setup)
    except (VademecumError, RuntimeError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"seconds": round(time.perf_counter() - began, 1)}


def run(options: argparse.Namespace, plan: dict[str, Any]) -> dict[str, Any]:
    """Every cell that is not finished; what failed, by data set and method."""
    from prompt_tune.shelf import Shelf

    budget, failures = plan["budget"], dict[str, dict[str, str]]()
    methods = {**plan["cached"], **plan["pixels"]}
    chosen = options.only or list(methods)
    for group in ("cached", "pixels"):
        for dataset, settings in plan["datasets"].items():
            if options.datasets and dataset not in options.datasets:
                continue
            shelf = Shelf()
            knowledge = knowledge_of(dataset, settings["extract"], options.out)
            classes = len(shelf.data(dataset, None).classes)
            for seed in options.seeds:
                backbone = backbone_of(dataset, seed, budget["shots"], options.out)
                fixed = {"backbone": backbone, "seed": seed, "classes": classes}
                world = dict(budget=budget, data=dataset, knowledge=knowledge, fixed=fixed,
                             shelf=shelf)  # fmt: skip
                for name in plan[group]:
                    if name not in chosen:
                        continue
                    place = options.out / dataset / name.replace(" ", "-") / f"seed-{seed}"
                    found = cell(name, methods[name] or {}, place, world)
                    if "failed" in found:
                        failures.setdefault(dataset, {})[name] = found["failed"]
                    print(dataset, name, seed, json.dumps(found), flush=True)
    return failures


def report(options: argparse.Namespace, plan: dict[str, Any], failures: dict[str, Any]) -> str:
    """The tables, the failures and the figure of ranks."""
    from prompt_tune.checkpoint import read_run
    from prompt_tune.method_table import compare_methods, find_runs

    part = plan["budget"]["part"]
    finished = [
        run for run in find_runs([options.out])
        if read_run(run).get("status") == "finished"
        and (run / "eval" / f"test-{part}" / "metrics.json").is_file()
    ]  # fmt: skip
    found = compare_methods(finished, split=f"test-{part}", out=options.out / "table")
    lines = [found.text("markdown")]
    for dataset, failed in failures.items():
        lines += [f"Failed on {dataset}:", ""]
        lines += [f"- {name}: {why}" for name, why in failed.items()]
    return "\n\n".join(lines)


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
    failed = options.out / "failures.json"
    failures = json.loads(failed.read_text()) if failed.is_file() else {}
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        for dataset, rows in run(options, plan).items():
            failures.setdefault(dataset, {}).update(rows)
        failed.write_text(json.dumps(failures, indent=1))
    text = report(options, plan, failures)
    print(text)
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
