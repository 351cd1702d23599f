"""The card of a cache: complete, reproducible, and safe from what a cache may say."""

import re

import pytest

from cache import ClassRecord, KnowledgeCache, verify
from cache.combining.merging import merge
from cache.errors import CacheFormatError
from cache.sharing.card import card, escaped


def test_a_card_says_what_who_and_how_to_cite(make, sealed):
    text = card(sealed)
    content_id = verify(sealed).content_id
    for piece in (
        "# Knowledge cache of toy",
        f"Content id: `{content_id}`",
        f"vademecum cache verify FILE --expect {content_id}",
        f'KnowledgeCache.open(path, expect="{content_id}")',
        f"- size: {sealed.stat().st_size} bytes",
        "- blocks: 4, with 24 entries",
        "| `layers` | states | 6 | 3 (1-2, 30) | 5 | f2 |",
        "| `ig` | immature granulocyte | blood smear | - |",
        "| `a-b.c` | Ångström näme | - | - |",
        "- hub: org/name",
        "ab" * 32,
        "Apache-2.0",
        "- notice: Made from a model with a licence.",
        "Not a medical device.",
        "it has none for images, patients, persons, hosts, times or file paths",
    ):
        assert piece in text, piece
    with KnowledgeCache.open(sealed) as found:
        for block in found.blocks.values():
            assert f"`{block.id}` |" in text
    assert card(sealed) == text
    assert str(sealed.parent) not in text


def test_quantisation_and_every_source_model_are_named(make, tmp_path):
    for name in ("one", "two"):
        model = {"hub": f"org/{name}", "revision": "0" * 40, "files": {"f": "x" * 600}}
        make.cache_at(tmp_path / f"{name}.h5", recipe={"model": model})
    merge([tmp_path / "one.h5", tmp_path / "two.h5"], tmp_path / "m.h5")
    text = card(tmp_path / "m.h5")
    assert "- hub: org/one" in text and "- hub: org/two" in text
    assert "- files: 1 values" in text and "x" * 600 not in text
    make.cache_at(tmp_path / "none.h5", recipe={})
    assert "The recipe names no model." in card(tmp_path / "none.h5")
    make.cache_at(tmp_path / "odd.h5", recipe={"model": "just\na name"})
    assert "- model: just a name" in card(tmp_path / "odd.h5")


HOSTILE = (
    "<script>alert(1)</script> [click](https://evil.example) ![x](//evil.example) | cell |\n"
    "\n# Heading\n\x1b[31m\u202eesrever\u200b `code` **bold** www.evil.example @all $x$ :skull:"
)


def test_foreign_texts_stay_text(make, tmp_path):
    make.cache_at(
        tmp_path / "k.h5",
        classes=(ClassRecord("basophil", HOSTILE, HOSTILE, HOSTILE), *make.CLASSES[1:]),
        recipe={"model": {HOSTILE: HOSTILE}},
        provenance={HOSTILE: HOSTILE, "licence": HOSTILE},
    )
    text = card(tmp_path / "k.h5")
    assert text.count("alert(1)") >= 6
    foreign = "\n".join(line for line in text.splitlines() if "alert" in line)
    assert "<" not in foreign and ">" not in foreign
    assert not re.search(r"(?<!\\)[\[\]*$@#]|(?<!\\)!|https:|www\.", foreign)
    assert text.count("# Heading") == foreign.count("\\# Heading")
    for hidden in ("\x1b", "\u202e", "\u200b"):
        assert hidden not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `basophil`")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("- item", r"\- item"),
        ("12. item", r"12\. item"),
        ("=== x", r"\=== x"),
        ("Apache-2.0", "Apache-2.0"),
        ("licence: MIT", "licence: MIT"),
        ("a & b", "a &amp; b"),
        ("x" * 600, "x" * 499 + "…"),
        (r"\|", r"\\\|"),
    ],
)
def test_escaping(text, wanted):
    assert escaped(text) == wanted


def test_a_damaged_file_gets_no_card(make, sealed):
    raw = bytearray(sealed.read_bytes())
    raw[make.body_of(sealed)["layout"]["layers__values"]] ^= 1
    sealed.write_bytes(raw)
    with pytest.raises(CacheFormatError, match="dataset layers__values is damaged"):
        card(sealed)
