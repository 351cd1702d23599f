"""What may stand in the header of a cache: plain data without texts, floats or places.

A *token* is a short string of letters, digits and `_ . : @ + = , / -`, such as a slug, a digest,
a decimal string or a hub id. Everything else a recipe holds is a text. Texts are datasets; in
the header only their digests stand.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cache.errors import ValueRefusedError
from cache.recipe import canonical_json, digest_of

TOKEN = re.compile(r"-?[A-Za-z0-9_][A-Za-z0-9_.:@+=,-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.:@+=,-]*)?")
TOKEN_LENGTH = 200
TEXT_FIELDS = ("classes", "templates")  # of a recipe: digested as a whole
FIELD_BYTES = 4096  # a larger field of a recipe stands in the header as its digest
LARGEST_INT = 2**53 - 1
DEEPEST = 32  # tables and lists inside each other
_TOO_DEEP = f"more than {DEEPEST} tables and lists inside each other"

_PLACE = re.compile(
    r"""(?:^|[\s"'(\[=,;<])            # at the start of a word
        (?: /(?:[^\s/"']+/)+           # /home/name/
          | ~[\w.-]*/                  # ~/ and ~name/
          | [A-Za-z]:[\\/](?!/)        # a drive letter
          | \\\\[\w.-]+                # a server share
          | file: )""",
    re.VERBOSE,
)


def looks_like_place(text: str) -> bool:
    """True if `text` is, or holds, an absolute path.

    >>> looks_like_place("/data/scans"), looks_like_place("and/or")
    (True, False)
    """
    return bool(re.match(r"/[^\s/]", text) or _PLACE.search(text))


def is_token(text: str) -> bool:
    """True if `text` may stand in the header of a cache."""
    return len(text) <= TOKEN_LENGTH and TOKEN.fullmatch(text) is not None and ".." not in text


def strings_of(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """Every string in plain data, keys included, with the dotted place it stands at."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield at, str(key)
            yield from strings_of(inner, f"{at}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from strings_of(inner, f"{at}[{index}]")


def refuse_places(value: Any, at: str) -> None:
    """Nothing, if no string of `value` looks like a path.

    Raises:
        ValueRefusedError: a string that does, and where it stands.
    """
    for place, text in strings_of(value, at):
        if looks_like_place(text):
            what = "a file path may not go into a knowledge cache"
            do = "Store a base name or a digest instead."
            raise ValueRefusedError(what, where=place, found=repr(text[:80]), do=do)


def strict_json(raw: bytes) -> Any:
    """The value of JSON text in which no key stands twice and every number is finite.

    Raises:
        ValueError: anything else, also more than 32 tables and lists inside each other.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            what = "a key stands twice"
            raise ValueError(what)
        return table

    def finite(digits: str) -> float:
        if not math.isfinite(number := float(digits)):
            what = f"the number {digits[:30]}"
            raise ValueError(what)
        return number

    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=finite,
        )
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    refuse_depth(value)
    return value


def refuse_depth(value: Any, left: int = DEEPEST) -> None:
    """Nothing, if at most `left` tables and lists of `value` stand inside each other.

    Raises:
        ValueError: more.
    """
    if isinstance(value, Mapping | list | tuple):
        if left == 0:
            raise ValueError(_TOO_DEEP)
        for inner in value.values() if isinstance(value, Mapping) else value:
            refuse_depth(inner, left - 1)


def check_header_data(value: Any, at: str, left: int = DEEPEST) -> None:
    """Nothing, if `value` is made of tokens, integers, booleans, lists and tables only.

    Raises:
        ValueRefusedError: a float, a text, a path or any other object, and where it stands; more
            than `left` tables and lists inside each other.
    """
    if left == 0 and isinstance(value, Mapping | list | tuple):
        raise ValueRefusedError(_TOO_DEEP, where=at[:80])
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str) or not is_token(key):
                what = "a key of the header must be a short token"
                raise ValueRefusedError(what, where=at, found=repr(key)[:80])
            check_header_data(inner, f"{at}.{key}", left - 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            check_header_data(inner, f"{at}[{index}]", left - 1)
    elif value is not None and not isinstance(value, bool):
        _check_leaf(value, at)


def _check_leaf(value: object, at: str) -> None:
    found, wanted = repr(value)[:80], "tokens, integers, booleans, lists and tables"
    if isinstance(value, str):
        refuse_places(value, at)
        if not is_token(value):
            what = "a text may not go into the header of a cache"
            raise ValueRefusedError(what, where=at, found=found, do="Give its SHA-256 instead.")
    elif isinstance(value, int):
        if abs(value) > LARGEST_INT:
            what = "an integer too large for JSON"
            raise ValueRefusedError(what, where=at, found=found, wanted="less than 2^53")
    elif isinstance(value, float):
        do = "Write it as a decimal string."
        what = "a float may not go into a cache"
        raise ValueRefusedError(what, where=at, found=found, do=do)
    else:
        what = "not plain data"
        raise ValueRefusedError(what, where=at, found=found, wanted=wanted)


def _text_digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _without_texts(value: Any) -> Any:
    if isinstance(value, str):
        return value if is_token(value) else _text_digest(value)
    if isinstance(value, Mapping):
        return {k if is_token(k) else _text_digest(k): _without_texts(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_texts(v) for v in value]
    return repr(value) if isinstance(value, float) else value


def redact(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as it stands in the header: every text replaced by its SHA-256.

    The fields `classes` and `templates`, and any field of more than 4 KiB, are replaced as a
    whole by `{"sha256": digest of its canonical JSON}`, so that the header stays small.
    """
    safe: dict[str, Any] = {}
    for field, value in recipe.items():
        inner = _without_texts(value)
        as_digest = field in TEXT_FIELDS or len(canonical_json(inner)) > FIELD_BYTES
        key = field if is_token(field) else _text_digest(field)
        safe[key] = {"sha256": digest_of(value)} if as_digest else inner
    return safe


def first_difference(found: Any, wanted: Any, at: str = "") -> tuple[str, Any, Any] | None:
    """Where two pieces of plain data first differ, in sorted order: `(place, found, wanted)`."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*found, *wanted}):
            place = f"{at}.{key}" if at else str(key)
            if key not in found or key not in wanted:
                return place, found.get(key, "nothing"), wanted.get(key, "nothing")
            inner = first_difference(found[key], wanted[key], place)
            if inner is not None:
                return inner
        return None
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        for index, (a, b) in enumerate(zip(found, wanted, strict=False)):
            inner = first_difference(a, b, f"{at}[{index}]")
            if inner is not None:
                return inner
        if len(found) != len(wanted):
            return f"{at} (length)", len(found), len(wanted)
        return None
    return None if type(found) is type(wanted) and found == wanted else (at, found, wanted)
