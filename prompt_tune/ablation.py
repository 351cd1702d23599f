"""`ablate`: one method with its knowledge, without it, and with what looks like it.

Every variant is the recipe with one thing changed, run under the same seeds and evaluated on the
same images; what remains of the lead over the variant is given with a paired interval.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from cache.durable import storage_errors, write_atomic
from cache.errors import CacheError, DataError, RecipeError, VademecumError
from prompt_tune import figures
from prompt_tune.checkpoint import write_json
from prompt_tune.many import combinations, tune_many
from prompt_tune.method_table import LOWER_IS_BETTER
from prompt_tune.metrics import balanced_accuracy, constant_guess, macro_f1
from prompt_tune.paired import Score, difference, holm, p_value, score
from prompt_tune.predictions import Predictions, load_predictions
from prompt_tune.recipe import TuneRecipe
from prompt_tune.run_folder import EVALUATIONS, PREDICTIONS
from prompt_tune.shelf import Shelf
from prompt_tune.statistics import LABELS, MEASURES
from prompt_tune.tables import TableStyle, counted, laid_out
from prompt_tune.variants import BASE, Variant, distinct, variants

BESIDE = {"balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1}


@dataclass(frozen=True)
class Ablation:
    """What `ablate` found.

    Attributes:
        folder: that holds a folder for each variant, `ablation.json`, `.md` and `.png`.
        metric: what is compared.
        rows: per variant its score, and how far the recipe as it stands is ahead of it.
        note: on how many images and seeds, and what a constant answer scores.
        refused: variants that recipe, cache or data do not allow, with the reason.
    """

    folder: Path
    metric: str
    rows: tuple[dict[str, Any], ...]
    note: str
    refused: Mapping[str, VademecumError] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        refused = {name: str(error) for name, error in self.refused.items()}
        return {"metric": self.metric, "rows": self.rows, "note": self.note, "refused": refused}

    def text(self, style: TableStyle = "text") -> str:
        """The table and its note."""
        beside = [name for name in BESIDE if name != self.metric]
        head = ["variant", "about", LABELS[self.metric], *(LABELS[name] for name in beside)]
        cells = [[*head, "cached is ahead by [95 %]", "p (Holm)"]]
        for row in self.rows:
            value = f"{row['value']:z.3f}"
            if row["deviation"] is not None:
                value += f" ± {row['deviation']:.3f}"
            ahead, p = row["ahead"], row["p"]
            lead = "–"
            if ahead is not None:
                lead = f"{ahead[0]:+z.3f} [{ahead[1]:+z.3f}, {ahead[2]:+z.3f}]"
            others = [f"{row['beside'][name]:.3f}" for name in beside]
            shown = [row["variant"], row["about"], value, *others, lead]
            cells.append([*shown, "–" if p is None else f"{p:.3f}"])
        lost = "".join(f"\n\nNot run: {name}. {error}" for name, error in self.refused.items())
        return f"{laid_out(cells, style, left=(0, 1))}\n\n{self.note}{lost}"


def ablate(  # noqa: PLR0913 - a whole experiment
    recipe: TuneRecipe,
    *,
    data: str,
    knowledge: Path,
    out: Path,
    seeds: Sequence[int] = (1, 2, 3),
    split: str = "test",
    part: int | None = None,
    metric: str = "accuracy",
    only: Sequence[str] | None = None,
    sources: Mapping[str, Path] | None = None,
    device: str = "cpu",
) -> Ablation:
    """Runs every variant under every seed in one process, and says what remained.

    Finished runs are skipped, an unfinished one goes on. A variant that is refused, as a source
    with other texts than the method takes, is left out of the table and said. One that would keep
    just the rows or texts that the recipe keeps is the same run and not asked.

    Args:
        recipe: a method that reads knowledge, with control `cached`.
        data: the images.
        knowledge: the cache.
        out: a folder for all runs, table and figure.
        seeds: of the runs.
        split: to evaluate on.
        part: of the split; see `evaluate`.
        metric: to compare.
        only: the questions to ask, of `Variant.about`; None asks all.
        sources: see `variants`.
        device: of all runs.

    Raises:
        RecipeError: see `variants`; no such metric; an unknown question, or one that this cache
            cannot be asked.
        VademecumError: see `tune`, for the recipe as it stands; for variants, what no other recipe,
            cache or data would mend.
    """
    if metric not in MEASURES:
        what = f"no metric {metric!r}"
        raise RecipeError(what, wanted=", ".join(MEASURES))
    every = variants(recipe, sources)
    asked = {v.about for v in every[1:]}
    if only is not None and not set(only) <= asked:
        what, wanted = "this method cannot be asked that", ", ".join(sorted(asked))
        raise RecipeError(what, where="--only", found=", ".join(only), wanted=wanted)
    shelf = Shelf()
    chosen = distinct(
        [v for v in every if only is None or v.name == BASE or v.about in only],
        recipe,
        shelf.cache(knowledge, recipe.knowledge.expect),
        shelf.data(data, recipe.classes),
    )
    scores: dict[str, Score] = {}
    predictions: dict[str, list[Predictions]] = {}
    refused: dict[str, VademecumError] = {}
    for variant in chosen:
        place = out / re.sub(r"[^a-z0-9]+", "-", variant.name.lower()).strip("-")
        try:
            runs = tune_many(
                recipe,
                [{**variant.changes, **c} for c in combinations(tuple(seeds), {})],
                data=data,
                out=place,
                knowledge=variant.knowledge or knowledge,
                device=device,
                split=split,
                part=part,
                shelf=shelf,
                title=f"variant {variant.name}",
            )
        except (RecipeError, CacheError, DataError) as error:
            if variant.name == BASE:
                raise
            refused[variant.name] = error
            continue
        name = split if part is None else f"{split}-{part}"
        files = [place / r["run"] / EVALUATIONS / name / PREDICTIONS for r in runs.rows]
        predictions[variant.name] = [load_predictions(f) for f in files]
        scores[variant.name] = score(predictions[variant.name], metric)
    chosen = [v for v in chosen if v.name not in refused]
    if refused and len(chosen) == 1:
        raise next(iter(refused.values()))
    rows = _rows(chosen, scores, predictions, metric)
    found = Ablation(out, metric, rows, _note(predictions[BASE]), refused)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / "ablation.json", found.to_json())
    write_atomic(out / "ablation.md", (found.text("markdown") + "\n").encode())
    figures.differences(
        [(r["variant"], r["ahead"]) for r in found.rows if r["ahead"]],
        out / "ablation.png",
        measure=metric,
    )
    return found


def _note(runs: Sequence[Predictions]) -> str:
    guess = constant_guess(runs[0].labels, runs[0].class_names)
    images, seeds = counted(len(runs[0].labels), "image"), counted(len(runs), "seed")
    return (
        f"{images}, {seeds}; mean ± standard deviation over seeds; "
        "intervals: paired bootstrap over cases of the difference of the means over seeds; "
        "p-values Holm-corrected over all variants; the best constant answer has accuracy "
        f"{guess.accuracy:.3f}, balanced accuracy {guess.balanced_accuracy:.3f}, macro F1 "
        f"{guess.macro_f1:.3f}."
    )


def _rows(
    chosen: Sequence[Variant],
    scores: Mapping[str, Score],
    predictions: Mapping[str, Sequence[Predictions]],
    metric: str,
) -> tuple[dict[str, Any], ...]:
    base, lower = scores[BASE], metric in LOWER_IS_BETTER
    adjusted = holm([p_value(base, scores[v.name]) for v in chosen[1:]])
    rows = []
    for variant, p in zip(chosen, [None, *adjusted], strict=True):
        own, runs = scores[variant.name], predictions[variant.name]
        lead = difference(own, base) if lower else difference(base, own)
        rows.append(
            {
                "variant": variant.name,
                "about": variant.about,
                "value": own.value,
                "deviation": own.deviation if own.deviation == own.deviation else None,
                "interval": own.interval.to_json(),
                "beside": {
                    name: fmean(measure(run.probabilities, run.labels) for run in runs)
                    for name, measure in BESIDE.items()
                },
                "ahead": None if p is None else lead.to_json(),
                "p": p,
            }
        )
    return tuple(rows)
