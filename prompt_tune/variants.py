"""The variants of a recipe that an ablation runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import RecipeError
from cache.store import KnowledgeCache
from prompt_tune.data.source import DataSource
from prompt_tune.knowledge import sizes
from prompt_tune.recipe import TuneRecipe
from prompt_tune.tables import counted

BASE = "cached"
RANKS = (1, 2, 4, 8, 16)
TEXTS = (1, 4, 16)


@dataclass(frozen=True)
class Variant:
    """The recipe with one thing changed.

    Attributes:
        name: of the variant, and of its folder.
        about: what is asked: `knowledge`, `image condition`, `rank`, `rows`, `texts` or `source`.
        changes: values by dotted key.
        knowledge: another cache, for `source`.
    """

    name: str
    about: str
    changes: Mapping[str, Any]
    knowledge: Path | None = None


def variants(recipe: TuneRecipe, sources: Mapping[str, Path] | None = None) -> list[Variant]:
    """What can be asked of a recipe: controls, image condition, ranks, rows, texts, source models.

    Ranks are asked of methods that read rows, where a rank is the size of what changes and projects
    them; elsewhere it names a value. Texts are the first 1, 4 and 16 of every class, which keeps
    all if it has fewer.

    Args:
        recipe: as it stands; its own control must be `cached`.
        sources: further caches by name, of other language models.

    Raises:
        RecipeError: the method reads no knowledge, or the recipe's control is not `cached`.
    """
    settings = recipe.method_config(where="recipe")
    needs = recipe.method_class().needed(settings)
    if not needs:
        what = f"method {recipe.method['name']!r} reads no knowledge"
        raise RecipeError(what, where="method.name", do="Ablate a method that does.")
    if recipe.knowledge.control != "cached":
        what = "an ablation starts from the cached knowledge"
        found = recipe.knowledge.control
        raise RecipeError(what, where="knowledge.control", found=found, wanted="cached")
    config = settings.model_dump()
    made = [Variant(BASE, "as it stands", {})]
    made += [
        Variant(control, "knowledge", {"knowledge.control": control})
        for control in ("shuffled", "random", "none")
    ]
    if config.get("condition") == "image":
        made += [
            Variant("no image condition", "image condition", {"method.condition": "none"}),
            *(
                Variant(
                    f"{control}, no image condition",
                    "image condition",
                    {"method.condition": "none", "knowledge.control": control},
                )
                for control in ("shuffled", "random")
            ),
        ]
    if "rank" in config and "rows" in needs:
        made += [
            Variant(f"rank {rank}", "rank", {"method.rank": rank})
            for rank in RANKS
            if rank != config["rank"]
        ]
    if "rows" in needs:
        least = config.get("prefix", 0) + config.get("suffix", 0)
        made += [
            Variant(f"{keep} rows", "rows", {"knowledge.keep": keep})
            for keep in (least, 2 * least)
            if keep and keep != recipe.knowledge.keep
        ]
    if needs & {"texts", "symptoms"}:
        made += [
            Variant(counted(keep, "text"), "texts", {"knowledge.keep": keep})
            for keep in TEXTS
            if keep < (recipe.knowledge.keep or keep + 1)
        ]
    other = {} if recipe.knowledge.expect is None else {"knowledge.expect": None}
    for name, path in (sources or {}).items():
        made.append(Variant(f"source {name}", "source", other, path))
    return made


def distinct(
    chosen: Sequence[Variant], recipe: TuneRecipe, opened: KnowledgeCache, source: DataSource
) -> list[Variant]:
    """The variants without those that keep of this cache just what the recipe keeps.

    Raises:
        RecipeError: the recipe as it stands is all that is left.
        CacheError: see `load_knowledge`.
    """
    needs = recipe.reads()
    counts = sizes(
        opened, recipe.knowledge, dataset=source.dataset, classes=source.classes, needs=needs
    )

    def kept(keep: int | None) -> list[int]:
        return [min(n, keep or n) for n in counts]

    usual, key = kept(recipe.knowledge.keep), "knowledge.keep"
    found = [v for v in chosen if key not in v.changes or kept(v.changes[key]) != usual]
    if len(found) == 1 < len(chosen):
        what = "every variant would keep all that the recipe keeps of this cache"
        raise RecipeError(what, where=opened.path, found=f"at most {max(usual)} of a class")
    return found
