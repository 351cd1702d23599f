"""Many runs in one process: seeds and a grid over one recipe, what they share loaded once."""

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import RecipeError
from cache.progress import say
from cache.recipe import apply_overrides, parse_yaml, validate
from prompt_tune.checkpoint import read_json, write_json
from prompt_tune.evaluation import evaluate, evaluated_images, load_run, metrics_file
from prompt_tune.recipe import TuneRecipe
from prompt_tune.run_folder import is_of
from prompt_tune.setup import used_knowledge
from prompt_tune.shelf import Shelf
from prompt_tune.tables import counted
from prompt_tune.tuning import tune

RUNS = "runs.json"
MOST_SEEDS = 10_000  # in one range


@dataclass(frozen=True)
class Runs:
    """What a grid of runs left.

    Attributes:
        folder: that holds a run folder for each combination, and `runs.json`.
        rows: per run its folder, its choices, whether it was there before, and its metrics.
    """

    folder: Path
    rows: list[dict[str, Any]]

    def describe(self) -> str:
        """Mean and standard deviation over seeds for every combination of the grid."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            choices = {k: v for k, v in row["choices"].items() if k != "seed"}
            groups.setdefault(_name(choices) or "all", []).append(row)
        lines = [_summary(name, rows) for name, rows in groups.items()]
        done = sum(row["was_finished"] for row in self.rows)
        runs, were = counted(len(self.rows), "run"), "was" if done == 1 else "were"
        return "\n".join([*lines, f"{runs} in {self.folder}, {done} {were} already finished"])


def _summary(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    values = [row["metrics"]["accuracy"] for row in rows if row["metrics"]]
    if not values:
        return f"{name}: {counted(len(rows), 'run')}, not evaluated"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    over = counted(len(values), "run")
    return f"{name}: accuracy {statistics.fmean(values):.4f}{spread} over {over}"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from a list of numbers and ranges.

    >>> parse_seeds("1-3,7")
    (1, 2, 3, 7)

    Raises:
        RecipeError: not such a list, or a seed that stands twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= MOST_SEEDS:
            what, wanted = "not a list of seeds", "numbers and ranges, as in 1-20,30"
            raise RecipeError(what, where="--seeds", found=repr(text), wanted=wanted)
        seeds += range(first, last + 1)
    if len(set(seeds)) != len(seeds):
        what = "a seed stands twice"
        raise RecipeError(what, where="--seeds", found=repr(text))
    return tuple(seeds)


def parse_grid(axes: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The values of every axis `a.b=x,y`; values are YAML.

    >>> parse_grid(["method.rank=4,8"])
    {'method.rank': (4, 8)}

    Raises:
        RecipeError: not of that form, or a key that stands twice.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for axis in axes:
        key, equals, values = axis.partition("=")
        listed = parse_yaml(f"[{values}]", where=f"--grid {axis}") if equals and key else []
        if not listed or key in grid:
            what = "an axis of the grid has the form a.b=x,y, each key once"
            raise RecipeError(what, where="--grid", found=repr(axis))
        grid[key] = tuple(listed)
    return grid


def combinations(
    seeds: Sequence[int], grid: Mapping[str, Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    """Every choice of one value per axis and a seed; seeds vary fastest.

    Raises:
        RecipeError: seeds are given in both ways.
    """
    if seeds and "seed" in grid:
        what = "seeds stand in the grid too"
        raise RecipeError(what, where="--grid seed", do="Use --seeds alone.")
    axes = {**grid, "seed": seeds} if seeds else grid
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _name(choices: Mapping[str, Any]) -> str:
    words = [f"{key}={_plain(value)}" for key, value in choices.items()]
    return re.sub(r"[^A-Za-z0-9=,._+-]+", "_", ",".join(words))


def _plain(value: Any) -> str:
    """A value as YAML reads it back."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _chosen(recipe: TuneRecipe, choices: Mapping[str, Any]) -> TuneRecipe:
    """The recipe of one combination; a seed is that of the run and of its sample list.

    `{seed}` in `backbone.aligned` is the seed: alignment may see a run's own images only, so runs
    of several samples have a backbone each.
    """
    overrides = [
        f"{place}={json.dumps(value)}"
        for key, value in choices.items()
        for place in (("seed", "samples.seed") if key == "seed" else (key,))
    ]
    data = apply_overrides(recipe.model_dump(mode="json"), overrides, TuneRecipe)
    if "seed" in choices and data["backbone"].get("aligned"):
        of_seed = str(data["backbone"]["aligned"]).replace("{seed}", str(choices["seed"]))
        data["backbone"]["aligned"] = of_seed
    return validate(TuneRecipe, data, where=_name(choices))


def tune_many(  # noqa: PLR0913 - a whole experiment
    recipe: TuneRecipe,
    choices: Iterable[Mapping[str, Any]],
    *,
    data: str,
    out: Path,
    knowledge: Path | None = None,
    device: str = "cpu",
    split: str | None = None,
    part: int | None = None,
    shelf: Shelf | None = None,
    title: str | None = None,
) -> Runs:
    """Runs one recipe under every combination; each is bit for bit what `tune` alone gives.

    All recipes are validated before the first run starts. Runs that are finished are skipped, an
    unfinished one goes on; `out` gets one run folder per combination, and `runs.json`.

    Args:
        recipe: what all combinations start from.
        choices: values by dotted key, see `combinations`; a `seed` is that of the run and of its
            sample list.
        data: the images.
        out: the folder for all of them.
        knowledge: the cache, for methods that need one.
        device: of all runs.
        split: evaluate every run on it; None leaves that for later.
        part: of the split; see `evaluate`.
        shelf: what is on it is not loaded again.
        title: said before every run, with its seed.

    Raises:
        VademecumError: see `tune`.
    """
    planned = [(dict(c), _chosen(recipe, c)) for c in choices]
    names = [_name(chosen) or "run" for chosen, _ in planned]
    if twice := next((name for name in names if names.count(name) > 1), None):
        what = "two combinations would share one run folder"
        raise RecipeError(what, where="--grid", found=twice, do="Give each value once.")
    shelf, rows = shelf or Shelf(), []
    earlier = _earlier(out / RUNS, split, part, names)
    read = used_knowledge([one for _, one in planned], knowledge)
    for name, (chosen, one) in zip(names, planned, strict=True):
        folder = out / name
        if title is not None:
            say(f"{title}, seed {one.seed}")
        own = read if one.reads() else None
        result = tune(one, data=data, out=folder, knowledge=own, device=device, shelf=shelf)
        metrics = None
        if split is not None:
            setup = result.setup
            known = metrics_file(folder, split, part)
            found = read_json(known) if setup is None and known.is_file() else None
            images = evaluated_images(shelf.data(data, one.classes), folder, split, part)
            if found is None or not is_of(found, result.run) or found["data"] != images.digest:
                setup = setup or load_run(
                    folder, data=data, knowledge=own, device=device, shelf=shelf
                )
                found = evaluate(folder, split=split, part=part, setup=setup).result
            metrics = found["metrics"]
        rows.append(
            {
                "run": folder.name,
                "choices": chosen,
                "was_finished": result.setup is None,
                "parameters": result.run["parameters"]["scalars"],
                "metrics": metrics,
            }
        )
        record = {"format": 1, "split": split, "part": part, "runs": [*earlier, *rows]}
        write_json(out / RUNS, record)
    return Runs(out, rows)


def _earlier(file: Path, split: str | None, part: int | None, names: Sequence[str]) -> list[Any]:
    """The rows of an earlier call that evaluated in the same way, without those done again."""
    if not file.is_file():
        return []
    known = read_json(file)
    if (known.get("split"), known.get("part")) != (split, part):
        return []
    return [row for row in known.get("runs", []) if row.get("run") not in names]
