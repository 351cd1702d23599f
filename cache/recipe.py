"""Recipes: strict YAML into frozen pydantic models, and canonical JSON back.

Shared by both stages because both read recipes and may import only this package.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cache.errors import RecipeError
from cache.registry import suggest

Alternatives = Mapping[str, tuple[str, ...]]
"""Keys of which only one is set, and with each those that say something about it alone."""


class RecipePart(BaseModel):
    """Base of every recipe model: frozen, no unknown keys, no silent type changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    alternatives: ClassVar[Alternatives] = {}


R = TypeVar("R", bound=RecipePart)


class _Loader(yaml.SafeLoader):
    """YAML whose duplicate keys are errors and whose `1e-3` is a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            what = f"the key {key!r} stands twice"
            raise RecipeError(what, where=f"line {key_node.start_mark.line + 1}")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, where: object) -> Any:
    """YAML text as plain Python data.

    Raises:
        RecipeError: not YAML, or a key stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        what = "not valid YAML: " + " ".join(str(error).split())
        raise RecipeError(what, where=where) from error
    except RecipeError as error:
        raise RecipeError(str(error), where=where) from error


def read_yaml(path: Path) -> Any:
    """A YAML file as plain Python data.

    Raises:
        RecipeError: missing, unreadable or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"the recipe cannot be read ({error.__class__.__name__})"
        raise RecipeError(what, where=path, do="Check the path.") from error
    return parse_yaml(text, where=path)


def apply_overrides(
    data: dict[str, Any], overrides: Sequence[str], model: type[BaseModel] = RecipePart
) -> dict[str, Any]:
    """`data` with every `a.b=value` of `overrides` set; values are YAML.

    One of several alternatives takes the place of those that no override sets; see
    `RecipePart.alternatives` of `model` and its parts.

    Raises:
        RecipeError: an override without `=`, or one that goes through a non-mapping.
    """
    chosen = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            what = "an override has the form a.b=value"
            raise RecipeError(what, where="--set", found=repr(override))
        *parents, last = path.split(".")
        at = data
        for parent in parents:
            if not isinstance(at.get(parent, {}), dict):
                what = f"{parent!r} is not a table"
                raise RecipeError(what, where=f"--set {override}", found=repr(at[parent]))
            at = at.setdefault(parent, {})
        at[last] = parse_yaml(value, where=f"--set {override}")
        if at[last] is not None:
            for key in _replaced(_models_at(model, parents), last):
                if ".".join([*parents, key]) not in chosen:
                    at.pop(key, None)
    return data


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None:
        for arg in get_args(annotation):
            yield from _models_in(arg)


def _models_at(model: type[BaseModel], loc: Sequence[int | str]) -> list[type[BaseModel]]:
    """The models a place may have; names in a table and tags of unions are passed over."""
    models = [model]
    for part in loc:
        inner = [
            found
            for m in models
            if isinstance(part, str) and part in m.model_fields
            for found in _models_in(m.model_fields[part].annotation)
        ]
        models = inner or models
    return models


def _known_keys(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys allowed at the place whose last part was unknown."""
    return sorted({key for m in _models_at(model, loc[:-1]) for key in m.model_fields})


def _replaced(models: Sequence[type[BaseModel]], chosen: str) -> Iterator[str]:
    """The alternatives to `chosen`, and what says something about them alone."""
    for model in models:
        every = model.alternatives if issubclass(model, RecipePart) else {}
        for key, about in every.items():
            if chosen in every and key != chosen:
                yield from (key, *about)


def _written(loc: Sequence[int | str], data: Any) -> Iterator[str]:
    """The parts of a fault's place that stand in the data; pydantic adds the tags of unions."""
    at = data
    for part in loc:
        listed = isinstance(at, list) and isinstance(part, int) and part < len(at)
        if listed or (isinstance(at, dict) and part in at):
            at = at[part]
        elif not isinstance(at, dict) or part != loc[-1]:
            continue
        yield str(part)


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
_BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}


def _wanted(fault: Mapping[str, Any]) -> str | None:
    """What a value should have been, where pydantic's kind of fault tells."""
    if fault["type"] in _BOUNDS:
        name, sign = _BOUNDS[fault["type"]]
        return f"{sign} {fault['ctx'][name]}"
    if fault["type"] == "literal_error":
        return str(fault["ctx"]["expected"])
    return _KINDS.get(fault["type"])


def _set_by(key: str, overrides: Sequence[str]) -> str | None:
    """The override that a dotted key comes from."""
    for override in reversed(overrides):
        path = override.partition("=")[0]
        if f"{key}.".startswith(f"{path}."):
            return f"--set {override}"
    return None


def validate(
    model: type[R],
    data: Any,
    *,
    where: object,
    overrides: Sequence[str] = (),
    within: str | None = None,
) -> R:
    """`data` as a `model`; the first fault becomes one line.

    Args:
        model: to make.
        data: plain data.
        where: it stands.
        overrides: that were applied to it: a fault of theirs is said to be theirs.
        within: the dotted key `data` has in its recipe. Validators find `where` and `overrides` in
            the context.

    Raises:
        RecipeError: unknown key (the nearest known one is named), wrong type, value out of range.
    """
    if not isinstance(data, dict):
        what = "a recipe is a table of keys"
        raise RecipeError(what, where=where, found=type(data).__name__)
    try:
        context = {"where": where, "overrides": overrides}
        return model.model_validate_json(json.dumps(data), context=context)
    except ValidationError as error:
        faults = error.errors()
        first = next((e for e in faults if e["type"] == "extra_forbidden"), faults[0])
        own = [*_written(first["loc"], data)]
        key = ".".join(([] if within is None else [within]) + own)
        where = _set_by(key, overrides) or where
        if first["type"] == "extra_forbidden":
            do = suggest(str(first["loc"][-1]), _known_keys(model, first["loc"]))
            what = f"unknown key {key!r}"
            raise RecipeError(what, where=where, do=do) from error
        value = first["input"]
        shown = repr(value) if isinstance(value, str) else json.dumps(value)
        found = None if isinstance(value, dict | list) else shown
        if _wanted(first) is None:
            what = f"{key or 'recipe'}: {first['msg'].removeprefix('Value error, ')}"
            raise RecipeError(what, where=where, found=found) from error
        same = (_wanted(e) for e in faults if [*_written(e["loc"], data)] == own)
        wanted = " or ".join(dict.fromkeys(w for w in same if w is not None))
        what = f"{key}: wrong value"
        raise RecipeError(what, where=where, found=found, wanted=wanted) from error
    except TypeError as error:
        what = f"not plain data ({error})"
        raise RecipeError(what, where=where) from error


def load_recipe(model: type[R], path: Path, overrides: Sequence[str] = ()) -> R:
    """A recipe file with overrides, validated.

    Raises:
        RecipeError: see `read_yaml`, `apply_overrides`, `validate`.
    """
    data = read_yaml(path)
    if isinstance(data, dict):
        data = apply_overrides(data, overrides, model)
    return validate(model, data, where=path, overrides=overrides)


def canonical_json(value: Any) -> bytes:
    """The one byte form of plain data: ASCII, sorted keys, no spaces, no floats.

    Floats become their shortest decimal string, so that no reader has to agree on rounding.
    """

    def plain(v: Any) -> Any:
        if isinstance(v, bool) or v is None or isinstance(v, str | int):
            return v
        if isinstance(v, float):
            return repr(v)
        if isinstance(v, dict):
            return {str(k): plain(x) for k, x in v.items()}
        if isinstance(v, list | tuple):
            return [plain(x) for x in v]
        what = f"a {type(v).__name__} cannot be written canonically"
        raise TypeError(what)

    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode("ascii")


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
