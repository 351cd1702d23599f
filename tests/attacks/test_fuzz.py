"""Fuzzing the header parser: nothing but CacheFormatError ever comes out."""

import copy
import hashlib
import json

import corruption
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.errors import CacheFormatError
from cache.header import MAGIC
from cache.header_reader import parse_header
from cache.recipe import canonical_json

QUICK = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SEED = corruption.seeds()[1]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**53 - 1, 2**53, 2**47, 2**63, -1, 0])
    | st.text(max_size=20)
    | st.sampled_from(["f2", "i8", "states", "texts", "shard", "../x", "/a/b/c", "ab" * 32, "toy"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)


def parse(text, size=None):
    """Nothing, if the parser accepts the header or refuses it as it should."""
    raw = MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    try:
        parse_header(raw, len(SEED.raw) if size is None else size)
    except CacheFormatError as error:
        text = str(error)
    else:
        return
    assert "\n" not in text
    assert len(text) < 1000


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes(raw):
    parse(raw)
    with pytest.raises(CacheFormatError):
        parse_header(raw, len(raw))


@QUICK
@given(VALUES, st.booleans())
def test_any_json(value, canonical):
    try:
        text = canonical_json(value) if canonical else json.dumps(value).encode()
    except RecursionError:
        return
    parse(text)


@QUICK
@given(st.data())
def test_a_header_with_any_value_in_any_place(data):
    body = copy.deepcopy(SEED.body)
    for _ in range(data.draw(st.integers(1, 3))):
        place = body
        for _ in range(data.draw(st.integers(1, 6))):
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or not place[key]:
                break
            place = place[key]
        if isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            if isinstance(place, dict) and data.draw(st.booleans()):
                place[data.draw(st.text(max_size=12))] = place.pop(key)
            else:
                place[key] = data.draw(VALUES)
    header = SEED.with_body(body)
    length = int.from_bytes(header[8:16], "little")
    parse(header[48 : 48 + length])


@QUICK
@given(st.integers(1, 3000), st.sampled_from([b"[", b'{"a":', b'{"content":', b'[1,"']))
def test_any_depth(depth, opening):
    closing = {b"[": b"]", b'[1,"': b""}.get(opening, b"}")
    parse(opening * depth + b"1" + closing * depth)
