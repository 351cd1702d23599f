"""Every key of every recipe and declaration, from the models that check them: docs/recipes.md.

    python bench/recipes.py --write docs/recipes.md

What a key means is the text below its field or its entry under `Attributes`, or that of
bench/recipes.yaml. A key without a meaning is refused, and so is a meaning without a key. What
stands above the marker in the file is written by hand and stays.
"""

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache as remembered
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # bench/cache.py is not our cache

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cache.recipe import read_yaml

BEGIN = "<!-- below this line: python bench/recipes.py --write docs/recipes.md -->"
Model = type[BaseModel]


def models_in(annotation: Any) -> Iterator[Model]:
    """The models a field is made of, whatever they are wrapped in."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from models_in(part)


@remembered
def below_fields(model: Model) -> dict[str, str]:
    """The string that stands below a field, by key."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, after in pairwise(tree.body):
        match field, after:
            case ast.AnnAssign(ast.Name(key)), ast.Expr(ast.Constant(str() as text)):
                found[key] = text
    return found


@remembered
def under_attributes(model: Model) -> dict[str, str]:
    """The entries under `Attributes` of a docstring, by key."""
    _, _, listed = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")
    return dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE))


def about(model: Model) -> str:
    """The docstring without its `Attributes`; nothing of one that only says whose settings."""
    text = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[0].strip()
    return "" if re.fullmatch(r"Settings of [^;]+\.", text) else text


def anchor(title: str) -> str:
    """What a heading is called in a link."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def shape(schema: dict[str, Any], links: dict[str, str]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        title = links[schema["$ref"].rpartition("/")[2]]
        return f"[{title.partition('blocks ')[2] or 'table'}](#{anchor(title)})"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        words = dict.fromkeys(shape(option, links) for option in options)
        return " or ".join(words)
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {shape(schema['items'], links)}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        keys = shape(schema["propertyNames"], links) + ": " if "propertyNames" in schema else ""
        return f"table of {keys}{shape(inner, links)}" if isinstance(inner, dict) else "table"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    names = {"string": "text", "boolean": "true or false"}
    kind = schema.get("type", "any")
    return " ".join([names.get(kind, kind), ", ".join(limits)]).strip()


def default_of(field: FieldInfo) -> str:
    """A field's default as one would write it; nothing for a table that has its own."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    plain = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return f"`{plain}`"


class Reference:
    """The tables of all models, each model once."""

    def __init__(self) -> None:
        self.said: dict[str, str] = read_yaml(ROOT / "bench/recipes.yaml")
        self.used: set[str] = set()
        self.links: dict[str, str] = {}
        self.lines: list[str] = []

    def meaning(self, model: Model, key: str) -> str:
        """What a key means, by the nearest class that says so.

        Raises:
            KeyError: none, and not bench/recipes.yaml either.
        """
        for owner in (c for c in model.__mro__ if key in inspect.get_annotations(c)):
            texts = under_attributes(owner) | below_fields(owner)
            own = f"{owner.__name__}.{key}"
            found = own if own in self.said or key in texts else key
            if found in self.said:
                self.used.add(found)
                return " ".join(self.said[found].split())
            if key in texts:
                text = " ".join(texts[key].split())
                return text[0].upper() + text[1:]
        what = f"{model.__name__}.{key} has no meaning: write it below its field"
        raise KeyError(what)

    def section(self, title: str, model: Model, prefix: str = "", level: int = 2) -> None:
        """The table of a model, and those of the models inside that have none yet."""
        self.heading(title, level)
        self.links[model.__name__] = title
        inside = self.inside(title, model, prefix)
        self.links |= {part.__name__: inner for inner, part, _ in inside}
        self.lines += [about(model), ""] if about(model) else []
        self.table(model, prefix)
        for inner, part, place in inside:
            self.section(inner, part, place, level=3)

    def inside(self, title: str, model: Model, prefix: str) -> list[tuple[str, Model, str]]:
        """Title, model and prefix of the models in a model's fields that have no section yet."""
        whole, found = title.partition(":")[0], []
        for key, field in model.model_fields.items():
            parts = [p for p in models_in(field.annotation) if p.__name__ not in self.links]
            for part in parts:
                tags = [part.model_fields[t] for t in ("kind", "by") if t in part.model_fields]
                kinds = [get_args(tag.annotation)[0] for tag in tags]
                inner = f"{whole}: {prefix}{key} {' by '.join(kinds)}".strip()
                place = f"{prefix}{key}.NAME." if kinds else f"{prefix}{key}."
                found.append((inner, part, "" if get_origin(field.annotation) is tuple else place))
        return found

    def table(self, model: Model, prefix: str = "", leave: tuple[str, ...] = ()) -> None:
        """One row a key."""
        schema = model.model_json_schema()
        self.lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
        tags = [key for key in ("kind", "by") if key in model.model_fields]
        for key in dict.fromkeys([*tags, *model.model_fields]):
            if key in leave:
                continue
            takes = shape(schema["properties"][key], self.links)
            default = default_of(model.model_fields[key])
            row = (f"`{prefix}{key}`", takes, default, self.meaning(model, key))
            self.lines.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in row)} |")
        self.lines.append("")

    def heading(self, text: str, level: int) -> None:
        """A line of its own with room around it."""
        self.lines += ["#" * level + " " + text, ""]


def method_sections(reference: Reference) -> None:
    """The settings of every method: what it is, what it reads, its keys."""
    from prompt_tune.method import Method
    from prompt_tune.methods import METHODS

    for name in METHODS:
        method = METHODS[name]
        assert isinstance(method, type)
        assert issubclass(method, Method)
        reference.heading(f"method: {name}", 3)
        module = importlib.import_module(method.__module__)
        first = " ".join((module.__doc__ or "").partition("\n\n")[0].split())
        needs = ", ".join(sorted(method.needs)) or "nothing"
        needs += " by default" if "needed" in vars(method) else ""
        said = f"{first} Reads of the cache: {needs}. Fitted by: {method.fitted_by}."
        reference.lines += [said, "", *([about(method.Config), ""] if about(method.Config) else [])]
        if len(method.Config.model_fields) > 1:
            reference.table(method.Config, "method.", leave=("name",))


def reference() -> str:
    """The generated part of docs/recipes.md.

    Raises:
        KeyError: a key without a meaning, or a meaning without a key.
    """
    from knowledge_extract.recipe import ExtractRecipe
    from prompt_tune.align import AlignSpec
    from prompt_tune.data.declaration import DataDeclaration
    from prompt_tune.recipe import TuneRecipe

    made = Reference()
    made.section("Tuning recipe", TuneRecipe)
    method_sections(made)
    made.section("Extraction recipe", ExtractRecipe)
    made.section("Alignment recipe", AlignSpec)
    made.section("Data declaration", DataDeclaration)
    if idle := sorted(set(made.said) - made.used):
        what = f"bench/recipes.yaml explains keys nobody needs: {idle}"
        raise KeyError(what)
    return "\n".join(made.lines).rstrip() + "\n"


def written(text: str) -> str:
    """A file's text with the part below the marker made again."""
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{reference()}"


def main() -> None:
    """Prints the reference, or writes it into a file below its marker."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path)
    file = parser.parse_args().write
    if file is None:
        sys.stdout.write(reference())
    else:
        file.write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
