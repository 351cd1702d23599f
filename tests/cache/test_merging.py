"""Merging: order, grouping and repetition do not matter; contradictions are listed."""

import dataclasses
import json
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import BlockSpec, ClassRecord, KnowledgeCache, ShardFolder, seal, verify
from cache.combining.joining import join_provenance, join_recipes, recipes_of, texts_of
from cache.combining.merging import MergeConflictsError, merge
from cache.errors import CacheFormatError, CacheMismatchError, RecipeError, StorageError
from cache.recipe import canonical_json

EXAMPLES = int(os.environ.get("VADEMECUM_EXAMPLES", "200")) // 4
MEMORY = Path("/dev/shm")
ORDER = sorted(("a-b.c", "basophil", "ig"))


def part(make, path: Path, places, *, seed=0, **changes) -> Path:
    """A cache with some `(block, class, item)` of the toy extraction; its recipe says which."""
    places = sorted(places)
    ids = {class_id for _, class_id, _ in places}
    names = sorted({block for block, _, _ in places})
    recipe = {"seed": 1, "classes": [{"id": i, "says": f"what {i} is"} for i in sorted(ids)]}
    fields = {
        "classes": tuple(r for r in make.CLASSES if r.id in ids),
        "blocks": {name: make.BLOCKS[name] for name in names},
        "recipe": recipe,
        **changes,
    }
    folder = ShardFolder(path.with_suffix(".parts"), header=make.header(**fields))
    rows = {"a-b.c": 1, "basophil": 2, "ig": 3}
    entries = [make.entry(b, c, i, seed, rows=rows[c]) for b, c, i in places]
    folder.commit(entries, batch_shape=(len(entries),))
    seal(folder, path)
    return path


def sealed_from(make, path: Path, one) -> None:
    """A cache with one embedding of the class ig."""
    fields = {"classes": make.CLASSES[1:2], "blocks": {"embedded": make.BLOCKS["embedded"]}}
    folder = ShardFolder(path.with_suffix(".parts"), header=make.header(**fields, recipe={}))
    folder.commit([one], batch_shape=(1,))
    seal(folder, path)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in which fsync costs nothing, where there is one."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as name:
        yield Path(name)


PLACES = [
    (block, class_id, item)
    for block in ("layers", "embedded", "answers", "attributes")
    for class_id in ORDER
    for item in range(2)
]


@st.composite
def splits(draw):
    """Three parts of the toy extraction that may overlap, none of them empty."""
    few = [place for place in PLACES if place[0] in {"layers", "answers"}]
    some = st.sets(st.sampled_from(few), min_size=1, max_size=5)
    return draw(st.tuples(some, some, some))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=splits(), notes=st.lists(st.sampled_from(["x", "y", '["x","y"]', "[]"]), min_size=3))
def test_order_grouping_and_repetition_do_not_matter(make, memory, parts, notes):
    where = Path(tempfile.mkdtemp(dir=memory))
    a, b, c = (
        part(make, where / f"{name}.h5", places, provenance={"note": note, name: "own"})
        for name, places, note in zip("abc", parts, notes)
    )

    def merged(*files: Path) -> Path:
        out = where / ("-".join(path.stem for path in files) + ".m.h5")
        merge(files, out)
        return out

    whole = merged(a, b, c)
    wanted = whole.read_bytes()
    left, right = merged(a, b), merged(b, c)
    for same in ((c, a, b), (left, c), (a, right), (whole, b)):
        assert merged(*same).read_bytes() == wanted
    assert merged(a, a).read_bytes() == a.read_bytes()
    verify(whole)
    with KnowledgeCache.open(whole) as found:
        held = [
            (n, e.class_id, e.item) for n, block in found.blocks.items() for e in block.entries()
        ]
        assert sorted(held) == sorted(set().union(*parts))


def test_the_parts_of_an_extraction_merge_into_it(make, tmp_path):
    whole = part(make, tmp_path / "whole.h5", PLACES)
    parts = [
        part(make, tmp_path / f"{n}.h5", [p for at, p in enumerate(PLACES) if at % 5 == n])
        for n in range(5)
    ]
    report = merge(parts, tmp_path / "merged.h5")
    assert (tmp_path / "merged.h5").read_bytes() == whole.read_bytes()
    assert json.loads(json.dumps(report.to_json())) == {
        "path": str(tmp_path / "merged.h5"),
        "content_id": verify(whole).content_id,
        "classes": 3,
        "blocks": 4,
        "entries": 24,
        "deduplicated": 0,
        "preferred": 0,
    }
    merge([whole], tmp_path / "alone.h5")
    assert (tmp_path / "alone.h5").read_bytes() == whole.read_bytes()
    again = merge([whole, *parts], tmp_path / "merged.h5")
    assert (again.content_id, again.deduplicated) == (report.content_id, 24)
    assert "24 entries stood in more than one file" in again.describe()
    assert not list(tmp_path.glob(".tmp-*"))


def test_every_conflict_is_listed_and_nothing_is_written(make, tmp_path):
    places = [*PLACES[:6], ("answers", "ig", 0), ("answers", "ig", 1)]
    a = part(make, tmp_path / "a.h5", places)
    b = part(make, tmp_path / "b.h5", places, seed=1)
    with pytest.raises(MergeConflictsError, match=r"a\.h5 and .*b\.h5: 8 conflicts: block") as info:
        merge([a, b], tmp_path / "m.h5")
    assert "block layers, class a-b.c, item 0: other values under the same key by up to" in str(
        info.value
    )
    assert "and 5 more. Nothing was written." in str(info.value)
    listed = json.loads(json.dumps(info.value.to_json()))["conflicts"]
    assert [(c["block"], c["class_id"], c["item"]) for c in listed] == sorted(
        places, key=lambda p: (p[0] != "answers", p)
    )
    with KnowledgeCache.open(a) as one, KnowledgeCache.open(b) as two:
        x, y = (k.blocks["layers"].array("ig", 1).astype("f8") for k in (one, two))
    wanted = np.abs(x - y).max()
    assert wanted > 0
    assert listed[-1]["difference"] == wanted
    assert listed[0]["difference"] is None
    assert listed[0]["files"] == [str(a), str(b)]
    assert not (tmp_path / "m.h5").exists()


def test_the_smallest_difference_is_a_conflict(make, tmp_path):
    """Also where somebody made every digest right."""
    a = part(make, tmp_path / "a.h5", [("embedded", "ig", 0)])
    one = make.entry("embedded", "ig", 0, rows=3)
    values = one.values["values"].copy()
    values[2, 6] = np.nextafter(values[2, 6], np.float32(99), dtype="f4")
    sealed_from(make, tmp_path / "b.h5", dataclasses.replace(one, values={"values": values}))
    with pytest.raises(MergeConflictsError) as info:
        merge([a, tmp_path / "b.h5"], tmp_path / "m.h5")
    assert 0 < info.value.conflicts[0].difference < 1e-5
    assert "1 conflict: block embedded, class ig, item 0: other values" in str(info.value)


def test_another_text_for_one_place_is_a_conflict(make, tmp_path):
    a = part(make, tmp_path / "a.h5", [("embedded", "ig", 0)])
    other = dataclasses.replace(
        make.entry("embedded", "ig", 0, rows=1), source_digest=make.digest("another text")
    )
    sealed_from(make, tmp_path / "b.h5", other)
    with pytest.raises(MergeConflictsError, match="item 0: made from other texts") as info:
        merge([a, tmp_path / "b.h5"], tmp_path / "m.h5")
    assert info.value.conflicts[0].difference is None  # arrays of another shape
    one = make.entry("embedded", "ig", 0, rows=3)
    alike = dataclasses.replace(one, source_digest=make.digest("another text"))
    sealed_from(make, tmp_path / "c.h5", alike)
    with pytest.raises(MergeConflictsError, match="item 0: made from other texts by up to 0"):
        merge([a, tmp_path / "c.h5"], tmp_path / "m.h5")


def test_the_preferred_file_decides(make, tmp_path):
    both = [("layers", "ig", 0), ("answers", "ig", 0)]
    a = part(make, tmp_path / "a.h5", [*both, ("layers", "ig", 1)])
    b = part(make, tmp_path / "b.h5", [*both, ("layers", "basophil", 0)], seed=1)
    c = part(make, tmp_path / "c.h5", [("layers", "ig", 1)], seed=1)
    for order in permutations([a, b]):
        report = merge(order, tmp_path / "m.h5", prefer=b, replace=True)
        assert (report.preferred, report.entries) == (2, 4)
        assert "2 conflicts decided by the preferred file" in report.describe()
        with KnowledgeCache.open(tmp_path / "m.h5", verify="full") as found:
            wanted = make.entry("layers", "ig", 0, 1, rows=3).values["values"]
            assert (found.blocks["layers"].array("ig", 0) == wanted.astype("f2")).all()
            wanted = make.entry("layers", "ig", 1, 0, rows=3).values["values"]
            assert (found.blocks["layers"].array("ig", 1) == wanted.astype("f2")).all()
        verify(tmp_path / "m.h5")
    # Where the preferred file says nothing, the others must agree.
    with pytest.raises(MergeConflictsError, match="1 conflict: block layers, class ig, item 1"):
        merge([a, b, c], tmp_path / "n.h5", prefer=b)
    with pytest.raises(RecipeError, match="the preferred file is not one of those"):
        merge([a, b], tmp_path / "n.h5", prefer=c)
    with pytest.raises(RecipeError, match="nothing to merge"):
        merge([], tmp_path / "n.h5")


def test_classes_blocks_and_recipes_that_contradict_each_other(make, tmp_path):
    a = part(make, tmp_path / "a.h5", [("embedded", "ig", 0)])
    blocks = {"embedded": BlockSpec("embeddings", {"model": "org/other"}, "f4", (), 7)}
    named = (ClassRecord("ig", "immature granulocyte", "histology"),)
    recipe = {"seed": 1, "classes": [{"id": "ig", "says": "something else"}]}
    changes = {"classes": named, "blocks": blocks, "recipe": recipe}
    b = part(make, tmp_path / "b.h5", [("embedded", "ig", 0)], **changes)
    with pytest.raises(MergeConflictsError) as info:
        merge([a, b], tmp_path / "m.h5")
    assert [conflict.describe() for conflict in info.value.conflicts] == [
        "class ig: another modality ('blood smear', 'histology')",
        "block embedded: another spec.model ('org/name', 'org/other')",
        "class ig: the recipes describe it differently",
    ]
    with pytest.raises(MergeConflictsError, match="2 conflicts"):
        merge([a, b], tmp_path / "m.h5", prefer=a)  # decides values, not what things are


def test_another_data_set_is_refused(make, tmp_path):
    a = part(make, tmp_path / "a.h5", [("embedded", "ig", 0)])
    b = part(make, tmp_path / "b.h5", [("embedded", "ig", 0)], dataset="other")
    with pytest.raises(
        CacheMismatchError, match="another data set than the first file; found other, wanted toy"
    ):
        merge([a, b], tmp_path / "m.h5")


def test_recipes_that_differ_are_kept_side_by_side(make, tmp_path):
    place = "A text about /usr/share/things/here."
    recipes = [
        {"model": name, "classes": [{"id": "ig", "descriptions": [place]}]} for name in "xyz"
    ]
    files = [
        part(make, tmp_path / f"{n}.h5", [(block, "ig", 0)], recipe=recipe)
        for n, (block, recipe) in enumerate(zip(("layers", "embedded", "answers"), recipes))
    ]
    merge(files[:2], tmp_path / "two.h5")
    merge([tmp_path / "two.h5", files[2]], tmp_path / "three.h5")
    verify(tmp_path / "three.h5")
    with KnowledgeCache.open(tmp_path / "three.h5") as found:
        assert set(found.recipe) == {"merged"}
        assert sorted(r["model"] for r in found.recipe["merged"]) == ["x", "y", "z"]
        assert found.recipe["merged"] == sorted(
            found.recipe["merged"], key=lambda r: make.hashlib.sha256(canonical_json(r)).hexdigest()
        )


def test_damaged_foreign_and_missing_files_are_refused(make, tmp_path):
    a = part(make, tmp_path / "a.h5", [("embedded", "ig", 0)])
    raw = bytearray(a.read_bytes())
    at = make.body_of(a)["layout"]["embedded__values"]
    raw[at] ^= 1
    (tmp_path / "b.h5").write_bytes(raw)
    (tmp_path / "c.h5").write_text("hello")
    out = tmp_path / "m.h5"
    with pytest.raises(CacheFormatError, match=r"b\.h5: dataset embedded__values is damaged"):
        merge([a, tmp_path / "b.h5"], out)
    with pytest.raises(CacheFormatError, match=r"c\.h5: not a knowledge cache"):
        merge([a, tmp_path / "c.h5"], out)
    with pytest.raises(CacheFormatError, match=r"d\.h5: there is no such file"):
        merge([a, tmp_path / "d.h5"], out)
    with pytest.raises(CacheMismatchError, match="this file exists and is not a knowledge cache"):
        merge([a], tmp_path / "c.h5", replace=True)
    with pytest.raises(StorageError, match="is a folder"):
        merge([a], tmp_path)
    # A file whose digests are all right but whose entry digests lie.
    with KnowledgeCache.open(a) as found:
        values = found.blocks["embedded"].array("ig", 0) + 1
    make.rewrite(a, "embedded__values", values)
    with pytest.raises(CacheFormatError, match="the digest of an entry is not that of its values"):
        merge([a], out)
    assert not out.exists()


def test_an_existing_cache_is_replaced_only_on_purpose(make, tmp_path):
    a = part(make, tmp_path / "a.h5", [("embedded", "ig", 0)])
    b = part(make, tmp_path / "b.h5", [("embedded", "ig", 1)])
    before = a.read_bytes()
    with pytest.raises(CacheMismatchError, match="another knowledge cache has this name"):
        merge([a, b], a)
    assert a.read_bytes() == before
    report = merge([a, b], a, replace=True)
    assert verify(a).content_id == report.content_id
    assert merge([a, b], a).content_id == report.content_id


def test_a_file_that_changes_while_it_is_read_is_refused(make, tmp_path, monkeypatch):
    a = part(make, tmp_path / "a.h5", [("embedded", "ig", 0)])
    at = make.body_of(a)["layout"]["embedded__values"]

    def late(path):
        report = verify(path)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"\x01\x02")
        return report

    monkeypatch.setattr("cache.combining.merging.verify", late)
    with pytest.raises(CacheFormatError, match="an entry of block embedded changed while it was"):
        merge([a], tmp_path / "m.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_a_merge_never_holds_a_whole_cache(make, memory):
    blocks = {"embedded": BlockSpec("embeddings", {}, "f4", (), 1 << 16)}
    for name, ids in (("a", range(10)), ("b", range(9, 18))):
        header = make.header(blocks=blocks, recipe={})
        folder = ShardFolder(memory / f"{name}.parts", header=header)
        for item in ids:
            values = np.full((8, 1 << 16), item, "f4")  # 2 MiB
            one = dataclasses.replace(make.entry("embedded", "ig", item), values={"values": values})
            folder.commit([one], batch_shape=(1,))
        seal(folder, memory / f"{name}.h5")
    tracemalloc.start()
    try:
        report = merge([memory / "a.h5", memory / "b.h5"], memory / "m.h5")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.entries == 18
    assert peak < 16 << 20  # of 36 MiB; packing gathers 8 MiB at a time


NESTED = canonical_json(['["a","b"]', "c"]).decode()  # no list that a merge would write
texts = st.sampled_from(["a", "b", '["a","b"]', '["a"]', '["b","a"]', "[", NESTED])


@given(st.lists(st.dictionaries(st.sampled_from("xy"), texts), min_size=3, max_size=3))
def test_provenance_is_a_join(tables):
    a, b, c = tables
    assert join_provenance([a]) == a == join_provenance([a, a])
    assert join_provenance([a, b]) == join_provenance([b, a])
    whole = join_provenance([a, b, c])
    assert join_provenance([join_provenance([a, b]), c]) == whole
    assert join_provenance([a, join_provenance([b, c])]) == whole
    for key, text in whole.items():
        assert texts_of(text) == sorted(
            {t for table in tables if key in table for t in texts_of(table[key])}
        )


class_lists = st.lists(st.fixed_dictionaries({"id": st.sampled_from("abc")}), max_size=3) | st.just(
    3
)
simple = st.fixed_dictionaries({"seed": st.integers(0, 1)}, optional={"classes": class_lists})
recipes = st.recursive(
    simple, lambda r: st.fixed_dictionaries({"merged": st.lists(r, max_size=3)}), max_leaves=5
)


@given(st.lists(recipes, min_size=3, max_size=3))
def test_recipes_are_joined(found):
    def join(*parts):
        joined, conflicts = join_recipes([("f", part) for part in parts], None)
        assert not conflicts
        return canonical_json(joined), joined

    a, b, c = found
    assert join(a, b) == join(b, a)
    assert join(join(a)[1]) == join(a) == join(a, a)
    whole = join(a, b, c)
    assert join(join(a, b)[1], c) == join(a, join(b, c)[1]) == whole
    assert all("merged" not in part for part in recipes_of(whole[1]) if len(found) > 1) or whole[
        1
    ] == {"merged": []}
