"""`vademecum cache inspect` and `vademecum cache verify`."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

import cache
from cache import KnowledgeCache, verify
from cache.errors import CacheFormatError, CacheMismatchError
from cache.inspect import describe, inspect, safe_text
from cache.recipe import canonical_json


def test_a_cache_is_described(make, sealed):
    facts = json.loads(json.dumps(inspect(sealed)))
    assert facts["dataset"] == "toy"
    assert facts["verified"] is False
    assert facts["size"] == sealed.stat().st_size
    assert facts["blocks"]["layers"]["items"] == {"a-b.c": 2, "basophil": 2, "ig": 2}
    assert facts["blocks"]["layers"]["layers"] == [1, 2, 30]
    assert facts["recipe"]["model"]["hub"] == "org/name"
    assert facts["provenance"] == make.PROVENANCE
    text = describe(sealed)
    for piece in (
        facts["content_id"] + " (not verified: vademecum cache verify checks every byte)",
        "Ångström näme",
        "6 entries of states, 3 layers of width 5, f2",
        "bits: 4",
        "6 entries of texts",
    ):
        assert piece in text
    assert "3 classes" in text
    assert "Apache-2.0" in text


def test_the_report_of_a_sound_file(make, sealed):
    report = verify(sealed)
    with KnowledgeCache.open(sealed) as found:
        assert report.content_id == found.content_id
        assert report.blocks == {name: block.id for name, block in found.blocks.items()}
    assert report.entries == 24
    assert report.size == sealed.stat().st_size
    assert json.loads(json.dumps(report.to_json()))["checks"] == list(report.checks)
    assert f"{sealed}: sound" in report.describe()
    assert report.content_id in report.describe()
    assert verify(sealed, expect=report.content_id) == report
    with pytest.raises(CacheMismatchError, match="another content id than expected"):
        verify(sealed, expect="0" * 64)


def test_foreign_texts_cannot_drive_a_terminal(make, tmp_path):
    name = "red \x1b[31m\u202eeslaf\u200b" + "x" * 100
    make.cache_at(
        tmp_path / "k.h5", classes=(*make.CLASSES[1:], cache.ClassRecord("basophil", name))
    )
    text = describe(tmp_path / "k.h5")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\u200b" not in text
    assert "x" * 61 not in text
    assert safe_text("näme\n") == "näme\ufffd"
    assert safe_text("abc", 2) == "a…"
    assert inspect(tmp_path / "k.h5")["classes"][1]["name"] == name


def values_of(path, name):
    with KnowledgeCache.open(path) as found:
        return found.sealed.array(name).copy()


def nan(array):
    array[3, 1, 2] = np.nan
    return array


def swap(array):
    return array[::-1]


def set_to(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "layers__values",
            nan,
            "block layers, class .*, item .: the digest of an entry is not that of its values",
        ),
        (
            "layers__keys",
            swap,
            "block layers, class a-b.c, item 0: the key of an entry is not the digest of what",
        ),
        (
            "layers__sources",
            set_to(0, 7),
            "the key of an entry is not the digest of what determines it",
        ),
        ("layers__digests", set_to(0, 7), "the digest of an entry is not that of its values"),
        ("layers__class", set_to(0, 3), "block layers: entries are not sorted by class and item"),
        ("layers__class", set_to(5, 3), "block layers: entries are not sorted by class and item"),
        ("layers__class", set_to(0, -1), "block layers: entries are not sorted"),
        ("layers__item", set_to(1, 0), "block layers: entries are not sorted"),
        ("layers__item", set_to(0, -1), "block layers: entries are not sorted"),
        ("layers__offsets", set_to(0, 1), "dataset layers__offsets does not run from 0 to"),
        ("layers__offsets", set_to(2, -5), "dataset layers__offsets does not run from 0 to"),
        ("layers__offsets", set_to(-1, 1 << 40), "dataset layers__offsets does not run from 0 to"),
        (
            "answers__text_offsets",
            set_to(1, 1 << 40),
            "dataset answers__text_offsets does not run from 0",
        ),
        ("answers__text", set_to(0, 0xFF), "text 0 of dataset answers__text is not UTF-8"),
        ("classes__id", set_to(0, ord("z")), "the class table is not sorted by id"),
        ("classes__id", set_to(0, ord("/")), "not a class id; found '/-b.c'"),
        (
            "classes__source",
            set_to(slice(0, 5), list(b"/etc/")),
            "refused: class basophil, source: a file path may not go",
        ),
        (
            "classes__name",
            set_to(slice(0, 3), list(b"e\xcc\x81")),
            "class a-b.c: a text is not in Unicode normal form C",
        ),
        ("recipe", set_to(0, ord("[")), "dataset recipe is not JSON"),
        (
            "recipe",
            set_to(slice(0, 2), list(b" {")),
            "dataset recipe is not (JSON|in canonical form)",
        ),
        ("provenance", set_to(slice(None), ord("1")), "dataset provenance is not a table"),
    ],
)
def test_content_that_no_writer_could_have_put_there_is_refused(
    make, sealed, name, change, message
):
    make.rewrite(sealed, name, change(values_of(sealed, name)))
    KnowledgeCache.open(sealed).close()
    with pytest.raises(CacheFormatError, match=message):
        verify(sealed)


def test_a_value_that_is_not_finite_is_refused_with_every_digest_right(make, sealed):
    values, offsets = values_of(sealed, "layers__values"), values_of(sealed, "layers__offsets")
    digests = values_of(sealed, "layers__digests")
    values[offsets[2], 0, 0] = np.inf
    rows = values[offsets[2] : offsets[3]]
    raw = len(rows).to_bytes(8, "little") + rows.tobytes()
    digests[2] = np.frombuffer(hashlib.sha256(raw).digest(), "u1")
    make.rewrite(sealed, "layers__values", values)
    make.rewrite(sealed, "layers__digests", digests)
    with pytest.raises(
        CacheFormatError, match="block layers, class basophil, item 0: a value is not finite"
    ):
        verify(sealed)


def test_a_text_that_is_not_normalised_is_refused_with_every_digest_right(make, sealed):
    texts, digests = values_of(sealed, "answers__text"), values_of(sealed, "answers__digests")
    with KnowledgeCache.open(sealed) as found:
        row = found.blocks["answers"].text("a-b.c", 0)
    raw = row["text"].encode().replace("ä".encode(), b"s\xcc"[:2])
    assert len(raw) == len(row["text"].encode())
    other = row["text"].replace("ä", "a").encode()[:-1] + "\u0301".encode()[:0] + b"!"
    spoiled = ("e\u0301" + row["text"].replace("ä", "aa")[3:]).encode()
    assert len(spoiled) == len(raw) == len(other) + 1
    texts[: len(spoiled)] = np.frombuffer(spoiled, "u1")
    row["text"] = spoiled.decode()
    from cache.blocks import entry_digest

    digests[0] = np.frombuffer(entry_digest("texts", row), "u1")
    make.rewrite(sealed, "answers__text", texts)
    make.rewrite(sealed, "answers__digests", digests)
    with pytest.raises(
        CacheFormatError, match=r"class a-b.c, item 0: text is not in Unicode normal form C"
    ):
        verify(sealed)


def test_an_entry_without_rows_is_refused(make, sealed):
    offsets, digests = values_of(sealed, "layers__offsets"), values_of(sealed, "layers__digests")
    values = values_of(sealed, "layers__values")
    offsets[1] = 0
    for row in range(2):
        rows = values[offsets[row] : offsets[row + 1]]
        raw = len(rows).to_bytes(8, "little") + rows.tobytes()
        digests[row] = np.frombuffer(hashlib.sha256(raw).digest(), "u1")
    make.rewrite(sealed, "layers__offsets", offsets)
    make.rewrite(sealed, "layers__digests", digests)
    with pytest.raises(CacheFormatError, match=r"class a-b.c, item 0: an entry without rows"):
        verify(sealed)


def test_the_recipe_of_the_header_must_be_that_of_the_file(make, sealed):
    def edit(body):
        body["content"]["recipe"]["temperature"] = "0.5"

    make.reforge(sealed, edit)
    with pytest.raises(
        CacheFormatError, match="the recipe in the header is not the recipe of the file"
    ):
        verify(sealed)


def test_provenance_holds_texts_only(make, sealed):
    raw = values_of(sealed, "provenance").tobytes()
    spoiled = raw.replace(b'"Apache-2.0"', b"123456789012")
    make.rewrite(sealed, "provenance", np.frombuffer(spoiled, "u1"))
    with pytest.raises(
        CacheFormatError, match=r"provenance.licence: provenance is a table of texts"
    ):
        verify(sealed)
    spoiled = raw.replace(b'"Apache-2.0"', b' "Apache2.0"')
    make.rewrite(sealed, "provenance", np.frombuffer(spoiled, "u1"))
    with pytest.raises(CacheFormatError, match="dataset provenance is not in canonical form"):
        verify(sealed)
    assert canonical_json(make.PROVENANCE) == raw


def test_the_package_is_light_and_complete(root):
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import cache\n"
        "heavy = {'h5py', 'numpy', 'torch', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "for name in cache.__all__: getattr(cache, name)\n"
        "cache.KnowledgeCache\n"
        "assert not {'h5py', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        cache.nothing  # noqa: B018
