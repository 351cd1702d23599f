"""What may be stored: values, specifications, classes, and what never goes in."""

import numpy as np
import pytest

from cache import BlockSpec, ClassRecord, Entry, KnowledgeCache, ShardFolder, entry_key, seal
from cache.blocks import entry_digest
from cache.errors import ValueRefusedError
from cache.plain import check_header_data, first_difference, is_token, looks_like_place, redact

SPEC = {"kind": "states", "spec": {}, "dtype": "f2", "layers": (1,), "width": 3}
TEXTS = {"kind": "texts", "spec": {}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {**SPEC, "kind": "images"},
            "kind: unknown block kind; found 'images', wanted one of states",
        ),
        ({**SPEC, "spec": [1]}, "spec: the spec of a block is a table"),
        (
            {**SPEC, "spec": {"t": 0.5}},
            r"spec.t: a float may not go into a cache; found 0.5\. Write it as",
        ),
        (
            {**SPEC, "spec": {"a": {"t": "two words"}}},
            "spec.a.t: a text may not go into the header",
        ),
        (
            {**SPEC, "spec": {"f": "/data/models/x"}},
            "spec.f: a file path may not go into a knowledge cache",
        ),
        ({**SPEC, "spec": {"f": ["C:\\models"]}}, r"spec.f\[0\]: a file path may not go"),
        ({**SPEC, "spec": {"f": "~/models/x"}}, "spec.f: a file path may not go"),
        ({**SPEC, "spec": {"n": 2**53}}, "spec.n: an integer too large for JSON"),
        ({**SPEC, "spec": {"n": b"x"}}, "spec.n: not plain data"),
        ({**SPEC, "spec": {3: 1}}, "spec: a key of the header must be a short token"),
        ({**SPEC, "dtype": "f8"}, "dtype of a block of states; found 'f8', wanted f2 or f4"),
        ({**SPEC, "dtype": None}, "dtype of a block of states; found None"),
        ({**SPEC, "width": 0}, "width of a block of states; found 0"),
        ({**SPEC, "width": True}, "width of a block of states; found True"),
        ({**SPEC, "layers": ()}, r"layers of a block of states; found \(\), wanted at least one"),
        ({**SPEC, "layers": (1, 1)}, "layers are distinct numbers from 0"),
        ({**SPEC, "layers": (-1,)}, "layers are distinct numbers from 0"),
        (
            {**SPEC, "kind": "embeddings"},
            r"layers of a block of embeddings; found \(1,\), wanted none",
        ),
        ({**TEXTS, "dtype": "f2"}, "dtype of a block of texts; found 'f2', wanted None"),
        ({**TEXTS, "width": 3}, "width of a block of texts; found 3, wanted None"),
    ],
)
def test_specifications(fields, message):
    with pytest.raises(ValueRefusedError, match=message):
        BlockSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("Basophil", "x"), "class: not a class id; found 'Basophil'"),
        (("../x", "x"), "class: not a class id"),
        (("", "x"), "class: not a class id"),
        (("x", ""), "class x: a class needs a name"),
        (("x", "\ud800"), "class x, name: a text that is not valid Unicode"),
        (("x", 3), "class x, name: not a text"),
        (("x", "x", "m", "/home/name/notes.txt"), "class x, source: a file path may not go"),
    ],
)
def test_classes(fields, message):
    with pytest.raises(ValueRefusedError, match=message):
        ClassRecord(*fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "my data"}, "dataset: not an id for a data set; found 'my data'"),
        ({"dataset": "/data/x"}, "dataset: not an id for a data set"),
        ({"classes": ()}, "classes: an extraction needs classes"),
        (
            {"classes": (ClassRecord("a", "a"), ClassRecord("a", "b"))},
            "a class stands twice; found a",
        ),
        ({"blocks": {}}, "blocks: an extraction needs blocks"),
        (
            {"blocks": {"a__b": BlockSpec("texts", {})}},
            "blocks: not a name for a block; found 'a__b'",
        ),
        (
            {"recipe": {"model": {"folder": "/models/x"}}},
            "recipe.model.folder: a file path may not go",
        ),
        ({"provenance": {"made": "from /home/name/x"}}, "provenance.made: a file path may not go"),
        ({"provenance": {"made": 3}}, "provenance.made: provenance is a table of texts"),
    ],
)
def test_extraction_headers(make, changes, message):
    with pytest.raises(ValueRefusedError, match=message):
        make.header(**changes)


def states(values, **changes):
    fields = {"block": "layers", "class_id": "ig", "item": 0, "values": {"values": values}}
    return Entry(**{**fields, "source_digest": "0" * 64, **changes})


def with_value(number, at=(1, 2, 3)):
    values = np.zeros((2, 3, 5), "f4")
    values[at] = number
    return values


GOOD = {"text": "a", "prompt": "b", "prompt_tokens": 1, "text_tokens": 1}
WHERE = "block layers, class ig, item 0"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            states(with_value(np.nan)),
            f"{WHERE}, layer 30, row 1, component 3: a value is not finite; found nan",
        ),
        (
            states(with_value(np.inf, (0, 0, 0))),
            f"{WHERE}, layer 1, row 0, component 0: a value is not finite",
        ),
        (
            states(with_value(70000)),
            f"{WHERE}, layer 30, .*: 70000 is too large for float16. Store this block as",
        ),
        (states(np.zeros((2, 3, 4), "f4")), r"\(2, 3, 4\), wanted \[rows, 3, 5\]"),
        (states(np.zeros((0, 3, 5), "f4")), "an array of another shape than its block says"),
        (states(np.float32(3)), "an array of another shape"),
        (states([[1.0]]), "an array of another shape"),
        (states(np.zeros((2, 3, 5), "i8")), "an array of another type than float; found 'int64'"),
        (
            states(with_value(1), block="other"),
            "block other, .*: no such block; wanted one of answers",
        ),
        (
            states(with_value(1), class_id="zz"),
            "class zz, item 0: no such class in this extraction",
        ),
        (states(with_value(1), item=-1), "items are numbered from 0"),
        (states(with_value(1), item=True), "items are numbered from 0"),
        (states(with_value(1), source_digest="x"), "the source digest is no SHA-256"),
        (Entry("layers", "ig", 0, {}, "0" * 64), "an entry with other columns"),
        (
            Entry("answers", "ig", 0, {**GOOD, "text": 3}, "0" * 64),
            "class ig, item 0, text: not a text",
        ),
        (
            Entry("answers", "ig", 0, {**GOOD, "text": "\udc00"}, "0" * 64),
            "text: a text that is not valid",
        ),
        (
            Entry("answers", "ig", 0, {**GOOD, "text_tokens": True}, "0" * 64),
            "text_tokens: not an integer of 64",
        ),
        (
            Entry("answers", "ig", 0, {**GOOD, "text_tokens": 2**63}, "0" * 64),
            "text_tokens: not an integer",
        ),
        (Entry("answers", "ig", 0, {**GOOD, "note": "x"}, "0" * 64), "an entry with other columns"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_stored(make, tmp_path, entry, message):
    folder = ShardFolder(tmp_path / "k.parts", header=make.header())
    with pytest.raises(ValueRefusedError, match=message):
        folder.commit([make.entry("embedded", "ig"), entry], batch_shape=(2,))
    assert folder.present() == frozenset()


def test_one_entry_twice_in_a_commit_is_refused(make, tmp_path):
    folder = ShardFolder(tmp_path / "k.parts", header=make.header())
    with pytest.raises(
        ValueRefusedError, match="class ig, item 0: an entry stands twice in one commit"
    ):
        folder.commit(
            [make.entry("layers", "ig"), make.entry("layers", "ig", seed=1)], batch_shape=()
        )


def test_float32_blocks_take_what_float16_cannot(make, tmp_path):
    folder = ShardFolder(tmp_path / "k.parts", header=make.header())
    values = {"values": np.full((1, 7), 1e30)}
    folder.commit([Entry("embedded", "ig", 0, values, "0" * 64)], batch_shape=(1,))
    seal(folder, tmp_path / "k.h5")
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        assert found.blocks["embedded"].array("ig")[0, 0] == np.float32(1e30)


def test_texts_are_never_in_the_header(make, sealed):
    body = make.body_of(sealed)
    for text in (
        "immature",
        "smear",
        "example.org",
        "What does",
        "long text",
        "Made from",
        "licence",
    ):
        assert text not in repr(body)
    recipe = body["content"]["recipe"]
    assert recipe["model"]["hub"] == "org/name"
    assert recipe["temperature"] == "0.25"
    assert set(recipe["templates"]) == {"sha256"} == set(recipe["classes"])
    assert "two words" not in repr(redact({"a": "two words", "two words": ["x"]}))
    assert redact({"a": "two words"})["a"].startswith("sha256:")
    assert set(redact({"a": ["x" * 50] * 100})["a"]) == {"sha256"}


@pytest.mark.parametrize(
    "text",
    [
        "/data/x",
        "/home/name/a b",
        "see /mnt/a/b",
        "C:\\x",
        "d:/x/y",
        "\\\\server\\share",
        "~/x",
        "~name/x",
        "file:///x",
        "a=/usr/lib/x",
        "/tmp",
    ],
)
def test_places(text):
    assert looks_like_place(text)


@pytest.mark.parametrize(
    "text",
    [
        "and/or",
        "N/A",
        "org/name",
        "https://example.org/a/b",
        "1/2",
        "w/ stain",
        "A: b",
        "ratio: 1/3",
        "5'/3'",
        "n / m",
        "a: /",
        "T/B cell",
    ],
)
def test_no_places(text):
    assert not looks_like_place(text)


def test_tokens():
    assert all(
        map(is_token, ["-1.5e-05", "org/name", "a_b", "0.1", "model.safetensors", "ab" * 32])
    )
    assert not any(
        map(is_token, ["a/b/c", "..", "a/../b", "/a", "two words", "", "x" * 201, "ü", "a\n"])
    )


def test_keys_depend_on_everything_that_makes_a_value(make):
    spec = make.BLOCKS["layers"]
    keys = {
        entry_key(spec, "a", 0, "0" * 64),
        entry_key(spec, "b", 0, "0" * 64),
        entry_key(spec, "a", 1, "0" * 64),
        entry_key(spec, "a", 0, "1" * 64),
        entry_key(
            BlockSpec("states", {"model": "org/name", "bits": 8}, "f2", (1, 2, 30), 5),
            "a",
            0,
            "0" * 64,
        ),
        entry_key(
            BlockSpec("states", {"model": "org/name", "bits": 4}, "f4", (1, 2, 30), 5),
            "a",
            0,
            "0" * 64,
        ),
    }
    assert len(keys) == 6
    as_list = BlockSpec("states", {"model": "org/name", "bits": 4}, "f2", (1, 2, 30), 5)
    assert entry_key(as_list, "a", 0, "0" * 64) in keys


def test_digests_tell_columns_apart():
    row = {"attribute": "ab", "value": "c", "rank": 0}
    assert entry_digest("attributes", row) != entry_digest(
        "attributes", {**row, "attribute": "a", "value": "bc"}
    )
    assert entry_digest("attributes", row) != entry_digest("attributes", {**row, "rank": 1})


def test_differences_are_named():
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == ("a.b[1]", 2, 3)
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a (length)", 1, 2)
    assert first_difference({"a": 1}, {"b": 1}) == ("a", 1, "nothing")
    assert first_difference({"a": True}, {"a": 1}) == ("a", True, 1)
    assert first_difference({"a": [(1,)]}, {"a": [[1]]}) is None
    check_header_data({"a": [None, True, 3, "x", {"b": "-0.5"}]}, "spec")
