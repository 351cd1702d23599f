"""Slicing: some classes of a cache, and nothing of the others."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import KnowledgeCache, ShardFolder, seal, verify
from cache.combining.merging import merge
from cache.combining.slicing import slice_classes
from cache.errors import CacheFormatError, CacheMismatchError, MissingKnowledgeError

IDS = ("a-b.c", "basophil", "ig")


def listing(*names):
    return [{"id": name, "descriptions": [f"A text about {name}."]} for name in names]


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("slices") / "whole.h5"
    make.cache_at(path, recipe={"seed": 1, "classes": listing(*IDS)})
    return path


def test_the_folder_of_a_slice_is_made(whole, tmp_path):
    slice_classes(whole, ["ig"], tmp_path / "new" / "below" / "s.h5")
    assert [path.name for path in (tmp_path / "new" / "below").iterdir()] == ["s.h5"]
    with pytest.raises(MissingKnowledgeError):
        slice_classes(whole, ["absent"], tmp_path / "other" / "s.h5")
    assert not (tmp_path / "other").exists()


def test_a_slice_holds_its_classes_and_no_more(make, whole, tmp_path):
    content_id = slice_classes(whole, ["ig", "a-b.c", "ig"], tmp_path / "s.h5")
    assert verify(tmp_path / "s.h5").content_id == content_id
    with KnowledgeCache.open(whole) as a, KnowledgeCache.open(tmp_path / "s.h5") as b:
        assert [record.id for record in b.classes] == ["a-b.c", "ig"]
        assert b.recipe == {"seed": 1, "classes": listing("a-b.c", "ig")}
        assert b.provenance == a.provenance
        assert set(b.blocks) == set(a.blocks)
        wanted = [
            key
            for key, e in zip(a.blocks["answers"].keys(), a.blocks["answers"].entries())
            if e.class_id != "basophil"
        ]
        assert list(b.blocks["answers"].keys()) == wanted
        for class_id in ("ig", "a-b.c"):
            for item in range(2):
                one, two = (k.blocks["layers"].array(class_id, item) for k in (a, b))
                assert np.array_equal(one, two)
                assert a.blocks["attributes"].text(class_id, item) == b.blocks["attributes"].text(
                    class_id, item
                )
    assert b"basophil" not in (tmp_path / "s.h5").read_bytes()


covers = st.lists(st.sets(st.sampled_from(IDS), min_size=1), min_size=1, max_size=4)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(sets=covers)
def test_slices_that_cover_a_cache_merge_into_it(whole, tmp_path_factory, sets):
    where = tmp_path_factory.mktemp("s")
    sets.append(set(IDS) - set().union(*sets) or {"ig"})
    files = [where / f"{n}.h5" for n in range(len(sets))]
    for path, names in zip(files, sets):
        slice_classes(whole, sorted(names), path)
    merge(files, where / "m.h5")
    assert (where / "m.h5").read_bytes() == whole.read_bytes()


def test_a_merged_recipe_is_sliced_in_every_part(make, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        recipe = {"seed": seed, "classes": listing(*IDS)}
        make.cache_at(tmp_path / f"{name}.h5", recipe=recipe)
    merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "m.h5")
    slice_classes(tmp_path / "m.h5", ["ig"], tmp_path / "s.h5")
    with KnowledgeCache.open(tmp_path / "s.h5") as found:
        assert sorted(part["seed"] for part in found.recipe["merged"]) == [1, 2]
        assert all(part["classes"] == listing("ig") for part in found.recipe["merged"])
    slice_classes(tmp_path / "m.h5", ["a-b.c", "basophil"], tmp_path / "t.h5")
    merge([tmp_path / "s.h5", tmp_path / "t.h5"], tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "m.h5").read_bytes()


def test_a_class_without_entries_may_stand_alone(make, tmp_path):
    blocks = {"layers": make.BLOCKS["layers"], "answers": make.BLOCKS["answers"]}
    folder = ShardFolder(tmp_path / "p", header=make.header(blocks=blocks))
    folder.commit([make.entry("layers", "ig"), make.entry("answers", "ig")], batch_shape=(2,))
    seal(folder, tmp_path / "k.h5")
    slice_classes(tmp_path / "k.h5", ["basophil"], tmp_path / "s.h5")
    assert verify(tmp_path / "s.h5").entries == 0


def test_what_cannot_be_sliced_is_refused(make, whole, tmp_path):
    out = tmp_path / "s.h5"
    with pytest.raises(
        MissingKnowledgeError, match=r"no class 'basophill'\. Did you mean 'basophil'"
    ):
        slice_classes(whole, ["ig", "basophill"], out)
    with pytest.raises(MissingKnowledgeError, match="no class was named"):
        slice_classes(whole, [], out)
    (tmp_path / "x.h5").write_text("no")
    with pytest.raises(CacheFormatError, match="not a knowledge cache"):
        slice_classes(tmp_path / "x.h5", ["ig"], out)
    assert not out.exists()
    slice_classes(whole, ["ig"], out)
    with pytest.raises(CacheMismatchError, match="another knowledge cache has this name"):
        slice_classes(whole, ["basophil"], out)
    slice_classes(whole, ["basophil"], out, replace=True)
    with KnowledgeCache.open(out) as found:
        assert [record.id for record in found.classes] == ["basophil"]
