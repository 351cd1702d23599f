"""Which runs are the seeds of one method, and what a method is called on every data set.

On one data set a method is a recipe without its seeds, on one backbone, reading the same blocks of
a cache. Backbones count by their fingerprint; aligned ones by their name without the seed at its
end, because alignment may see a run's own images only, so that every seed has its own.

Over data sets a method is known by its label. It says what a run did, and every setting that tells
two such methods apart on any data set. Between data sets classes, training schedules, samples,
blocks of knowledge and aligned backbones differ of themselves and tell nothing apart; settings of
the method and its knowledge, how rows were made, and other backbones do.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import RunError
from cache.recipe import validate
from prompt_tune.checkpoint import RUN, read_json, read_run
from prompt_tune.compare import run_label
from prompt_tune.recipe import TuneRecipe
from prompt_tune.run_folder import SAMPLES

EVERYWHERE = ("method.", "knowledge.", "backbone", "block_made")
"""How the settings begin that tell methods apart between data sets too."""
STORED = frozenset({"tip-adapter"})
"""Methods whose weights are features of the training images: stored, not trained."""
SHOWN = 8  # characters of a digest in a label


@dataclass(frozen=True)
class Group:
    """The runs of one method on one data set, one for each seed.

    Attributes:
        dataset: its id.
        label: of the method, the same on every data set.
        folders: of the runs.
        runs: the content of their `run.json`.
    """

    dataset: str
    label: str
    folders: tuple[Path, ...]
    runs: tuple[dict[str, Any], ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the runs, in their order."""
        return tuple(int(run["recipe"]["seed"]) for run in self.runs)

    def budget(self) -> dict[str, float | int | None]:
        """Trained numbers, steps and images seen of the first run; seconds are means over seeds.

        Nothing is trained by a method that is not fitted, took no step, or only stores features.
        """
        folder, run = self.folders[0], self.runs[0]
        steps = run["training"].get("steps")
        return {
            "trained": _trained(folder, run),
            "steps": None if steps is None else int(steps),
            "images_seen": _images_seen(folder, run),
            "step_seconds": self._mean("step_seconds"),
            "seconds": self._mean("seconds"),
        }

    def _mean(self, key: str) -> float | None:
        values = [run["training"].get(key) for run in self.runs]
        return None if None in values else sum(map(float, values)) / len(values)


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The run folders among some folders and what lies up to three levels below them, each once.

    Raises:
        RunError: a folder holds no run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        depths = (RUN, f"*/{RUN}", f"*/*/{RUN}", f"*/*/*/{RUN}")
        runs = sorted(p.parent for d in depths for p in folder.glob(d))
        if not runs:
            what = "no run here"
            raise RunError(what, where=folder, do="Name run folders, or a folder of run folders.")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def grouped(folders: Sequence[Path]) -> list[Group]:
    """Runs by data set and method.

    Raises:
        RunError: two runs of one method have the same seeds, or one is damaged.
    """
    members: dict[tuple[str, str], list[Path]] = {}
    runs, settings, names = {}, {}, dict[str, str]()
    for folder in folders:
        run = runs[folder] = read_run(folder)
        own = settings[folder] = _settings(folder, run, names)
        key = (str(run["bindings"]["dataset"]), repr(sorted(own.items())))
        members.setdefault(key, []).append(folder)
    known = []
    for (dataset, _), same in members.items():
        _refuse_same_seed(dataset, {f: runs[f]["recipe"] for f in same})
        read = [runs[f]["bindings"].get("cache", {}) for f in same]
        made = [{"block_made": r["block_made"]} for r in read if "block_made" in r]
        told = settings[same[0]] | (made[0] if made else {})  # older runs do not say it
        known.append((dataset, run_label(runs[same[0]]), told))
    return [
        Group(dataset, label, tuple(same), tuple(runs[f] for f in same))
        for ((dataset, _), same), label in zip(members.items(), _labels(known), strict=True)
    ]


def _refuse_same_seed(dataset: str, recipes: Mapping[Path, Mapping[str, Any]]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    for folder, recipe in recipes.items():
        seeds = (int(recipe["seed"]), int(recipe["samples"]["seed"]))
        if seeds in seen:
            what = f"two runs of one method have the seed {seeds[0]}"
            found = f"{seen[seeds]} and {folder}"
            raise RunError(what, where=dataset, found=found, do="Name only one of them.")
        seen[seeds] = folder


def _settings(folder: Path, run: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Everything but seeds that tells runs on one data set apart, as one flat table.

    Args:
        folder: of the run.
        run: its `run.json`.
        names: what backbones are called, by fingerprint; the first name wins.
    """
    recipe = validate(TuneRecipe, run["recipe"], where=folder / RUN)
    plain = recipe.model_dump(mode="json", exclude={"backbone"})
    plain["method"] = recipe.method_config(where=folder / RUN).model_dump(mode="json")
    del plain["knowledge"]["expect"]  # the blocks that were read say it
    if recipe.train.views == 1:
        del plain["train"]["flip"]  # a switch of views that are not taken
    bound, name = run["bindings"], str(run["backbone"]["name"])
    flat = _flat(plain)
    if recipe.backbone.aligned is not None or "alignment" in run["backbone"]["notes"]:
        seeds = f"{recipe.seed}|{recipe.samples.seed}"
        flat |= {"backbone": "aligned", "aligned": re.sub(f"[-_]({seeds})$", "", name)}
    else:
        mark = str(bound["backbone"])
        flat["backbone"] = names.setdefault(mark, f"{name} {mark[:SHOWN]}")
    read = bound.get("cache", {})
    blocks = {
        **read.get("texts", {}),
        **({read["block"]: read["block_id"]} if "block" in read else {}),
    }
    return flat | {f"cache.{block}": content for block, content in blocks.items()}


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of tables as one, with dotted keys and without seeds."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{k}": v for k, v in _flat(value).items()}
        elif key != "seed":
            flat[key] = value
    return flat


def _labels(known: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """For each (data set, words, settings) the words and the settings that tell it from others."""
    labels = []
    for _, words, settings in known:
        same = [(d, s) for d, w, s in known if w == words]
        keys = {k for k in _differing([s for _, s in same]) if k.startswith(EVERYWHERE)}
        for dataset in {d for d, _ in same}:
            keys |= _differing([s for d, s in same if d == dataset])
        labels.append(_told(words, settings, {k for k in keys if not k.startswith("cache.")}))
    places = [(dataset, label) for (dataset, _, _), label in zip(known, labels, strict=True)]
    counts = Counter(places)
    for k, place in enumerate(places):
        if counts[place] > 1:  # nothing but the data set's own blocks tells these apart
            own = known[k][2]
            twins = [known[j][2] for j in range(len(known)) if places[j] == place]
            blocks = {key for key in own if any(own[key] != twin.get(key) for twin in twins)}
            labels[k] = _told(labels[k], own, blocks)
    return labels


def _differing(tables: Sequence[Mapping[str, Any]]) -> set[str]:
    """Keys with several values; to lack a key is none."""
    keys = {key for table in tables for key in table}
    return {k for k in keys if len({repr(t[k]) for t in tables if k in t}) > 1}


def _told(words: str, settings: Mapping[str, Any], keys: Iterable[str]) -> str:
    digests = ("cache.", "block_made")
    parts = [
        f"{key}={str(settings[key])[: SHOWN if key.startswith(digests) else None]}"
        for key in sorted(keys)
        if key in settings
    ]
    return f"{words} ({', '.join(parts)})" if parts else words


def _trained(folder: Path, run: Mapping[str, Any]) -> int:
    method = validate(TuneRecipe, run["recipe"], where=folder / RUN).method_class()
    nothing = method.fitted_by == "nothing" or run["recipe"]["method"]["name"] in STORED
    still = run["training"].get("steps") == 0
    return 0 if nothing or still else int(run["parameters"]["scalars"])


def _images_seen(folder: Path, run: Mapping[str, Any]) -> int | None:
    """How many images the steps of a run saw; None where its folder does not say.

    Incomplete batches are dropped unless an epoch has no other.
    """
    training, size = run["training"], int(run["recipe"]["train"]["batch_size"])
    if training.get("images_seen") is not None:
        return int(training["images_seen"])
    steps, epochs = int(training.get("steps") or 0), len(training.get("history") or ())
    if not epochs:
        return None
    try:
        return steps * min(size, len(read_json(folder / SAMPLES / "train.json")["indices"]))
    except FileNotFoundError:  # trained on the whole split
        return steps * size if steps > epochs else None
