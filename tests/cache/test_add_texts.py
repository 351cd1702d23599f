"""Texts made elsewhere: every layout people publish, classes matched or refused, licences kept."""

import json
from hashlib import sha256

import pytest

from cache import KnowledgeCache, verify
from cache.combining.merging import merge
from cache.errors import (
    CacheFormatError,
    CacheMismatchError,
    MissingKnowledgeError,
    RecipeError,
    UnknownNameError,
    ValueRefusedError,
)
from cache.foreign import text_files
from cache.foreign.add_texts import About, add_texts, new_texts
from cache.sharing.card import card
from cache.sharing.remote import push

ABOUT = About("described", "GPT-4, asked by the authors", "MIT")
TEXTS = {
    "Basophil": ["dark granules", "dark granules", "  a lobed nucleus\n", " "],
    "immature_Granulocyte": ["A\u030angstro\u0308m-sized", "band-shaped"],
    "a-b.c": ["one", "two", "three"],
}
STORED = {
    "basophil": ["dark granules", "dark granules", "a lobed nucleus"],
    "ig": ["\u00c5ngstr\u00f6m-sized", "band-shaped"],
    "a-b.c": ["one", "two", "three"],
}


def texts_in(path, block="described"):
    with KnowledgeCache.open(path) as found:
        own = found.blocks[block]
        return {
            c.id: [own.text(c.id, i)["text"] for i in range(own.items(c.id))] for c in found.classes
        }


def ranked(path, block="attributes"):
    with KnowledgeCache.open(path) as found:
        entries = found.blocks[block].entries()
        return {(e.class_id, e.item): tuple(e.values.values()) for e in entries}


def written(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


CSV = 'class,text\nig,one\nbasophil,"two, with a comma"\na-b.c,three\nig,four\n'


@pytest.mark.parametrize(
    ("name", "data", "wanted"),
    [
        ("t.json", TEXTS, STORED),
        ("t.yaml", TEXTS, STORED),
        (
            "t.csv",
            CSV,
            {"ig": ["one", "four"], "basophil": ["two, with a comma"], "a-b.c": ["three"]},
        ),
        (
            "t.json",
            [{"class": c, "text": c} for c in ("ig", "basophil", "a-b.c")],
            {"ig": ["ig"], "basophil": ["basophil"], "a-b.c": ["a-b.c"]},
        ),
    ],
)
def test_every_layout(sealed, tmp_path, name, data, wanted):
    report = add_texts(sealed, written(tmp_path / name, data), tmp_path / "new.h5", ABOUT)
    assert texts_in(tmp_path / "new.h5") == wanted
    assert report.entries == {c: len(own) for c, own in wanted.items()}
    assert verify(tmp_path / "new.h5").content_id == report.content_id


def test_everything_else_stays_and_the_source_is_told(sealed, tmp_path):
    file = written(tmp_path / "t.json", TEXTS)
    report = add_texts(sealed, file, tmp_path / "new.h5", ABOUT)
    assert (report.empty, report.duplicates) == (1, 1)
    assert "empty, left out: 1; duplicates, kept: 1" in report.describe()
    spelt = written(tmp_path / "s.json", {**TEXTS, "a-b.c": ["\u00c5", "A\u030a"]})
    assert add_texts(sealed, spelt, tmp_path / "s.h5", ABOUT).duplicates == 2
    with KnowledgeCache.open(sealed) as a, KnowledgeCache.open(tmp_path / "new.h5") as b:
        for name, block in a.blocks.items():
            assert b.blocks[name].id == block.id
        spec = b.blocks["described"].spec
        assert spec["file"] == sha256(file.read_bytes()).hexdigest()
        assert (spec["source"], spec["licence"]) == ("added", "MIT")
        assert b.provenance["described_source"] == "GPT-4, asked by the authors"
        assert b.provenance["licence"] == "Apache-2.0"
    text = card(tmp_path / "new.h5")
    assert "- licence MIT: permissive" in text
    assert "- described\\_source: GPT-4, asked by the authors" in text


def test_a_cache_of_texts_alone_merges_into_the_same_bytes(sealed, tmp_path):
    file = written(tmp_path / "t.json", TEXTS)
    add_texts(sealed, file, tmp_path / "new.h5", ABOUT)
    again = add_texts(tmp_path / "new.h5", file, tmp_path / "again.h5", ABOUT)
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "new.h5").read_bytes()
    assert again.content_id == verify(tmp_path / "new.h5").content_id
    names = {"b": "B c", "d-e": "D"}
    alone = new_texts(
        written(tmp_path / "u.yaml", {"b C": ["x"], "D": ["y"]}),
        tmp_path / "u.h5",
        ABOUT,
        dataset="toy",
        classes=names,
        modality="smear",
    )
    with KnowledgeCache.open(tmp_path / "u.h5", expect=alone.content_id) as found:
        assert [(c.id, c.name, c.modality) for c in found.classes] == [
            ("b", "B c", "smear"),
            ("d-e", "D", "smear"),
        ]
    merge([sealed, tmp_path / "u.h5"], tmp_path / "m.h5")
    new_texts(file, tmp_path / "own.h5", ABOUT, dataset="toy")
    assert set(texts_in(tmp_path / "own.h5")) == {"basophil", "immature-granulocyte", "a-b.c"}
    with pytest.raises(ValueRefusedError, match="no class id of its own can be made of a name"):
        new_texts(
            written(tmp_path / "v.json", {"A": ["x"], "a": ["y"]}),
            tmp_path / "v.h5",
            ABOUT,
            dataset="toy",
        )


ATTRIBUTES = {
    "ig": {"shape": ["round", "oval"], "colour": "blue"},
    "basophil": {"colour": ["purple"]},
    "a-b.c": {"colour": ["red"]},
}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.json", ATTRIBUTES),
        (
            "t.csv",
            """class,attribute,value,rank
ig,shape,oval,1
ig,shape,round,0
ig,colour,blue,
basophil,colour,purple,0
a-b.c,colour,red,
""",
        ),
    ],
)
def test_attributes_are_sorted_by_name_and_rank(sealed, tmp_path, name, data):
    about = About("values", "a table", "CC0-1.0", "attributes")
    add_texts(sealed, written(tmp_path / name, data), tmp_path / "new.h5", about)
    assert ranked(tmp_path / "new.h5", "values") == {
        ("ig", 0): ("colour", "blue", 0),
        ("ig", 1): ("shape", "round", 0),
        ("ig", 2): ("shape", "oval", 1),
        ("basophil", 0): ("colour", "purple", 0),
        ("a-b.c", 0): ("colour", "red", 0),
    }


def changed(**own):
    """The texts with others; None leaves a name out, and `ig` stands for its class's other name."""
    dropped = {"immature_Granulocyte": None} if "ig" in own else {}
    return {k: v for k, v in {**TEXTS, **dropped, **own}.items() if v is not None}


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (
            changed(basophill=["x"]),
            UnknownNameError,
            r"of no classes\. Did you mean 'basophil'",
        ),
        (changed(basophil=["x"]), UnknownNameError, "two names are those of the class 'basophil'"),
        (changed(Basophil=None), MissingKnowledgeError, r"class 'basophil' \(basophil\) has no te"),
        (changed(Basophil=[" "]), MissingKnowledgeError, "'basophil'.*Did you mean 'Basophil'"),
        (changed(ig=3), CacheFormatError, "'ig' has no list of texts; found int"),
        (changed(ig=[3]), CacheFormatError, r"row 8, text: not a text; found 3\. Put it between"),
        ("[1", CacheFormatError, "the texts are not valid JSON"),
        ("3", CacheFormatError, "not a table of classes; found int"),
        ('{"a": ["x"], "a": ["y"]}', CacheFormatError, "a key stands twice"),
        ("[" * 100_000, CacheFormatError, "not valid JSON"),
        ([{"class": "ig", "txt": "x"}], CacheFormatError, r"row 1 has other columns; found \['cla"),
        (changed(ig=["x" * 20_001]), ValueRefusedError, "row 8, text: too long"),
        (changed(ig=["\ud800"]), ValueRefusedError, "not valid Unicode"),
    ],
)
def test_refusals(sealed, tmp_path, data, error, match):
    with pytest.raises(error, match=match):
        add_texts(sealed, written(tmp_path / "t.json", data), tmp_path / "new.h5", ABOUT)
    assert not (tmp_path / "new.h5").exists()


def test_other_files_are_refused(sealed, tmp_path, monkeypatch):
    out = tmp_path / "new.h5"
    with pytest.raises(CacheFormatError, match=r"not a file of texts by its name; found \.txt"):
        add_texts(sealed, written(tmp_path / "t.txt", "x"), out, ABOUT)
    for name, data in (("t.yaml", "a: [1"), ("t.csv", 'class,text\na,"b'), ("u.yaml", "[" * 9000)):
        with pytest.raises(CacheFormatError, match="the texts are not valid"):
            add_texts(sealed, written(tmp_path / name, data), out, ABOUT)
    (tmp_path / "latin.csv").write_bytes(b"class,text\nig,\xe4\n")
    with pytest.raises(CacheFormatError, match="not valid CSV"):
        add_texts(sealed, tmp_path / "latin.csv", out, ABOUT)
    twice = "class,attribute,value,rank\nig,shape,oval,0\nig,shape,round,0\na-b.c,x,y,0\n"
    about = About("v", "a table", "MIT", "attributes")
    rows = written(tmp_path / "r.csv", twice + "basophil,x,y,0\n")
    with pytest.raises(ValueRefusedError, match="two values of an attribute have one rank; found"):
        add_texts(sealed, rows, out, about)
    rows = written(tmp_path / "r.csv", twice.replace("oval,0", "oval,first"))
    with pytest.raises(CacheFormatError, match="row 1, rank: not a rank; found 'first'"):
        add_texts(sealed, rows, out, about)
    with pytest.raises(CacheFormatError, match="class 'ig' has no table of attributes; found list"):
        add_texts(sealed, written(tmp_path / "t.json", {"ig": ["x"]}), out, about)
    monkeypatch.setattr(text_files, "MOST_ROWS", 3)
    with pytest.raises(ValueRefusedError, match="too many texts; wanted at most 3"):
        add_texts(sealed, written(tmp_path / "t.json", TEXTS), out, ABOUT)
    monkeypatch.setitem(text_files.LARGEST, ".json", 10)
    with pytest.raises(CacheFormatError, match=r"too large; found .* wanted at most 10 bytes"):
        add_texts(sealed, tmp_path / "t.json", out, ABOUT)


def test_ambiguous_names_and_taken_blocks_are_refused(sealed, tmp_path):
    file = written(tmp_path / "t.json", {"a b": ["x"]})
    with pytest.raises(UnknownNameError, match=r"'a b' is that of 2 classes. Use class ids"):
        new_texts(
            file,
            tmp_path / "new.h5",
            ABOUT,
            dataset="toy",
            classes={"one": "A_b", "two": "a-B"},
        )
    file = written(tmp_path / "t.json", TEXTS)
    with pytest.raises(CacheMismatchError, match="the cache has another block 'answers'"):
        add_texts(sealed, file, tmp_path / "new.h5", About("answers", "x", "MIT"))
    with pytest.raises(RecipeError, match="licence: texts need a source and a licence"):
        About("x", "x", " ")
    with pytest.raises(RecipeError, match="kind: not a kind of texts; found 'states'"):
        About("x", "x", "MIT", "states")
    with pytest.raises(ValueRefusedError, match=r"provenance.x_source.*file path"):
        add_texts(sealed, file, tmp_path / "new.h5", About("x", "from /home/me/x", "MIT"))


def test_texts_of_unknown_licence_are_not_pushed(sealed, tmp_path):
    about = About("described", "found on a disk", "no idea")
    add_texts(sealed, written(tmp_path / "t.json", TEXTS), tmp_path / "new.h5", about)
    with pytest.raises(ValueRefusedError, match=r"licence of a source.* is unknown; found no idea"):
        push(tmp_path / "new.h5", str(tmp_path / "there.h5"))
    push(tmp_path / "new.h5", str(tmp_path / "there.h5"), accept_licence=True, accept_privacy=True)
    notice = (tmp_path / "there.h5.NOTICE").read_text()
    assert "made with: found on a disk" in notice
