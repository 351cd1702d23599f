"""docs/recipes.md is what bench/recipes.py makes of the models, and every key has a meaning."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from cache.recipe import RecipePart

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/recipes.md"


@pytest.fixture(scope="module")
def recipes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_recipes", ROOT / "bench/recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", ["", *sys.path])  # a script takes the place of the first
        spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_models_say(recipes: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == recipes.written(text), "run: python bench/recipes.py --write docs/recipes.md"


def test_every_link_of_the_page_leads_to_a_heading() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert len(links) > 20
    assert links <= slugs


def test_every_row_has_four_cells_and_a_meaning() -> None:
    rows = [r for r in PAGE.read_text(encoding="utf-8").splitlines() if r.startswith("| `")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert len(rows) > 200
    assert all(len(row) == 4 and row[0] and row[1] and row[3] for row in cells)


def test_the_example_of_the_page_is_a_recipe(tmp_path: Path) -> None:
    from prompt_tune.recipe import load_tune_recipe

    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example, encoding="utf-8")
    recipe = load_tune_recipe(str(tmp_path / "mine.yaml"))
    assert recipe.samples.shots == yaml.safe_load(example)["samples"]["shots"]


class Inner(RecipePart):
    """What is inside."""

    size: int = 1
    """How large | how small."""


class Outer(RecipePart):
    """A model.

    Attributes:
        inner: what it holds,
            in two lines.
    """

    inner: Inner = Inner()
    bare: int = 0


def test_a_key_without_a_meaning_is_refused(recipes: ModuleType) -> None:
    made = recipes.Reference()
    made.said = {}
    with pytest.raises(KeyError, match=r"Outer\.bare has no meaning"):
        made.section("Thing", Outer)
    made.said, made.links, made.lines = {"bare": "Nothing."}, {}, []
    made.section("Thing", Outer)
    assert "| `inner` | [table](#thing-inner) |  | What it holds, in two lines. |" in made.lines
    assert "| `inner.size` | integer | `1` | How large \\| how small. |" in made.lines
    assert "| `bare` | integer | `0` | Nothing. |" in made.lines


def test_a_meaning_without_a_key_is_refused(
    recipes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = recipes.read_yaml(ROOT / "bench/recipes.yaml")
    monkeypatch.setattr(recipes, "read_yaml", lambda _: said | {"no_such_key": "Nothing."})
    with pytest.raises(KeyError, match=r"nobody needs: \['no_such_key'\]"):
        recipes.reference()
