"""Reading a sealed cache: round trip, alignment, determinism."""

import hashlib
import threading
import unicodedata

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import BlockSpec, ClassRecord, Entry, KnowledgeCache, ShardFolder, seal, verify
from cache.errors import CacheFormatError, CacheMismatchError, MissingKnowledgeError

GOLDEN_ID = "d6b2e99d7b24714fc422a1ede94ffb2829604effbbc05a8abaf2e1f2e0ca411d"
GOLDEN_BYTES = "24816acdc0396ae4ad964c4490a2b6306085e77a8e7f70c5f0272ca48961403c"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def test_everything_comes_back(make, sealed):
    with KnowledgeCache.open(sealed) as found:
        for one in make.entries():
            block = found.blocks[one.block]
            if block.dtype is None:
                assert block.text(one.class_id, one.item) == dict(one.values)
            else:
                wanted = one.values["values"].astype(block.dtype)
                np.testing.assert_array_equal(block.array(one.class_id, one.item), wanted)
            assert block.items(one.class_id) == 2
        assert [record.id for record in found.classes] == ["a-b.c", "basophil", "ig"]
        assert found.recipe["temperature"] == "0.25"
        assert found.recipe["classes"] == make.RECIPE["classes"]
        assert found.provenance == make.PROVENANCE
        layers = found.blocks["layers"]
        assert (layers.layers, layers.width, layers.kind) == ((1, 2, 30), 5, "states")
        assert layers.spec["bits"] == 4
        assert len(layers) == 6
        assert sorted(found.blocks) == sorted(make.BLOCKS)
        assert {make.key(e) for e in make.entries()} == {
            k
            for b in found.blocks.values()
            for k in b.keys()  # noqa: SIM118 - a block is no mapping
        }


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_content_round_trips(make, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    width, layers = (
        data.draw(st.integers(1, 9)),
        tuple(data.draw(st.sets(st.integers(0, 40), min_size=1, max_size=4))),
    )
    dtype = data.draw(st.sampled_from(["f2", "f4"]))
    ids = data.draw(
        st.lists(
            st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,5}", fullmatch=True),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    blocks = {
        "states": BlockSpec("states", {"n": width}, dtype, layers, width),
        "texts": BlockSpec("texts", {}),
    }
    header = make.header(classes=tuple(ClassRecord(i, "n " + i) for i in ids), blocks=blocks)
    wanted, found = {}, []
    for class_id in ids:
        for item in range(data.draw(st.integers(0, 3))):
            rows = data.draw(st.integers(1, 3))
            number = data.draw(st.floats(-60000, 60000, width=32))
            values = np.full((rows, len(layers), width), number, "f4")
            text = data.draw(TEXT)
            row = {"text": text, "prompt": "", "prompt_tokens": item, "text_tokens": -item}
            wanted[class_id, item] = values.astype(dtype), row
            found.append(Entry("states", class_id, item, {"values": values}, "0" * 64))
            found.append(Entry("texts", class_id, item, row, "1" * 64))
    shards = ShardFolder(folder / "k.parts", header=header)
    for start in range(0, len(found), 3):
        shards.commit(found[start : start + 3], batch_shape=(3,))
    content_id = seal(shards, folder / "k.h5")
    assert verify(folder / "k.h5", expect=content_id).entries == len(found)
    with KnowledgeCache.open(folder / "k.h5") as opened:
        for (class_id, item), (values, row) in wanted.items():
            np.testing.assert_array_equal(opened.blocks["states"].array(class_id, item), values)
            normal = {**row, "text": unicodedata.normalize("NFC", row["text"])}
            assert opened.blocks["texts"].text(class_id, item) == normal


def test_arrays_are_views_that_cannot_be_written_and_outlive_the_cache(sealed):
    with KnowledgeCache.open(sealed) as found:
        array = found.blocks["layers"].array("ig")
        again = found.blocks["layers"].array("ig")
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert array.ctypes.data == again.ctypes.data
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 0
    assert np.isfinite(array).all()
    with pytest.raises(CacheFormatError, match="the cache was closed"):
        found.blocks["embedded"].array("ig")


def test_an_hdf5_tool_reads_the_same(make, sealed):
    with h5py.File(sealed) as tool, KnowledgeCache.open(sealed) as found:
        assert set(tool) == set(found.sealed.header.extents)
        for name in tool:
            np.testing.assert_array_equal(tool[name][()], found.sealed.array(name))
            assert tool[name].chunks is None
            assert tool[name].compression is None


def test_the_same_content_is_the_same_bytes(make, tmp_path):
    made = make.entries()
    shards = ShardFolder(tmp_path / "a.parts", header=make.header(classes=make.CLASSES[::-1]))
    shards.commit(made[::-1], batch_shape=(24,))
    content_id = seal(shards, tmp_path / "a.h5")
    assert make.cache_at(tmp_path / "b.h5") == content_id == GOLDEN_ID
    first, second = (tmp_path / "a.h5").read_bytes(), (tmp_path / "b.h5").read_bytes()
    assert first == second
    assert hashlib.sha256(first).hexdigest() == GOLDEN_BYTES


def test_a_block_keeps_its_id_when_another_is_added(make, tmp_path):
    few = {name: make.BLOCKS[name] for name in ("layers", "answers")}
    one = make.cache_at(tmp_path / "few.h5", blocks=few)
    two = make.cache_at(tmp_path / "all.h5")
    with (
        KnowledgeCache.open(tmp_path / "few.h5") as a,
        KnowledgeCache.open(tmp_path / "all.h5") as b,
    ):
        assert one != two
        assert {n: a.blocks[n].id for n in few} == {n: b.blocks[n].id for n in few}
        assert len({block.id for block in b.blocks.values()}) == 4


def test_another_value_is_another_block_id(make, tmp_path):
    folder = ShardFolder(tmp_path / "x.parts", header=make.header())
    folder.commit(make.entries(seed=1), batch_shape=(24,))
    seal(folder, tmp_path / "x.h5")
    make.cache_at(tmp_path / "y.h5")
    with KnowledgeCache.open(tmp_path / "x.h5") as a, KnowledgeCache.open(tmp_path / "y.h5") as b:
        assert all(a.blocks[name].id != b.blocks[name].id for name in a.blocks)


def test_an_expected_content_id_is_enforced(make, sealed):
    with KnowledgeCache.open(sealed) as found:
        identity = found.content_id
    KnowledgeCache.open(sealed, expect=identity).close()
    KnowledgeCache.open(sealed, expect="sha256:" + identity[:12].upper()).close()
    with pytest.raises(
        CacheMismatchError, match=f"another content id than expected; found {identity}"
    ):
        KnowledgeCache.open(sealed, expect="0" * 64)
    with pytest.raises(CacheMismatchError, match="wanted 1234"):
        KnowledgeCache.open(sealed, expect="1234")
    with pytest.raises(CacheMismatchError, match="another content id"):
        KnowledgeCache.open(sealed, expect=identity[:8])


def test_what_is_missing_is_named(sealed):
    with KnowledgeCache.open(sealed) as found:
        with pytest.raises(
            MissingKnowledgeError, match=r"no class 'basofil'.* Did you mean 'basophil'"
        ):
            found.blocks["layers"].items("basofil")
        with pytest.raises(
            MissingKnowledgeError, match="block layers, class ig: no item 2; found 2 items"
        ):
            found.blocks["layers"].array("ig", 2)
        with pytest.raises(
            MissingKnowledgeError, match=r"no block 'layer'\. Did you mean 'layers'"
        ):
            found.blocks["layer"]
        assert "layer" not in found.blocks
        with pytest.raises(MissingKnowledgeError, match="a block of texts holds no arrays"):
            found.blocks["answers"].array("ig")
        with pytest.raises(MissingKnowledgeError, match="a block of states holds no texts"):
            found.blocks["layers"].text("ig")


def test_alignment_follows_the_labels_of_the_data(sealed):
    with KnowledgeCache.open(sealed) as found:
        wanted = [("ig", "immature granulocyte", None), ("a-b.c", "A\u030angstro\u0308m näme", "")]
        aligned = found.align("toy", wanted)
        assert [found.classes[p].id for p in aligned.positions] == ["ig", "a-b.c"]
        assert aligned.ids == ("ig", "a-b.c")
        assert [record.id for record in aligned.unused] == ["basophil"]


def test_a_modality_the_cache_does_not_state_fits_every_one(make, tmp_path):
    classes = tuple(ClassRecord(c.id, c.name, "", c.source) for c in make.CLASSES)
    make.cache_at(tmp_path / "k.h5", classes=classes)
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        assert found.align("toy", [("ig", "immature granulocyte", "x-ray")]).ids == ("ig",)


@pytest.mark.parametrize(
    ("dataset", "classes", "error", "message"),
    [
        ("other", [], CacheMismatchError, "made for another data set; found toy, wanted other"),
        (
            "toy",
            [("x", "X-ray", None)],
            MissingKnowledgeError,
            r"the class 'x' \(X-ray\) of the data is not in",
        ),
        (
            "toy",
            [("ig", "IG", None)],
            CacheMismatchError,
            "'ig' has another name .* found 'immature granulocyte', wanted 'IG'.* --classes names",
        ),
        (
            "toy",
            [("ig", "immature granulocyte", "x-ray")],
            CacheMismatchError,
            "'ig' has another modality .* found 'blood smear', wanted 'x-ray'.* from --modality",
        ),
        (
            "toy",
            [("ig", "immature granulocyte", None)] * 2,
            CacheMismatchError,
            "has the class 'ig' twice",
        ),
    ],
)
def test_alignment_refuses(sealed, dataset, classes, error, message):
    with KnowledgeCache.open(sealed) as found, pytest.raises(error, match=message):
        found.align(dataset, classes)


def test_entries_of_one_cache_can_be_committed_to_another_extraction(make, sealed, tmp_path):
    folder = ShardFolder(tmp_path / "again.parts", header=make.header())
    with KnowledgeCache.open(sealed) as found:
        for block in found.blocks.values():
            folder.commit(list(block.entries()), batch_shape=())
        assert seal(folder, tmp_path / "again.h5") == found.content_id
    assert (tmp_path / "again.h5").read_bytes() == sealed.read_bytes()


def test_readers_see_whole_files_while_one_is_replaced(make, tmp_path):
    target = tmp_path / "k.h5"
    ids = {make.cache_at(target)}
    stop, faults, seen = threading.Event(), [], set()

    def read():
        while not stop.is_set():
            try:
                with KnowledgeCache.open(target, verify="full") as found:
                    seen.add(found.content_id)
            except Exception as error:  # noqa: BLE001 - reported in the test's own thread
                faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for seed in range(1, 6):
        folder = ShardFolder(tmp_path / "next.parts", header=make.header())
        folder.commit(make.entries(seed=seed), batch_shape=(24,))
        ids.add(seal(folder, target, replace=True))
    stop.set()
    for reader in readers:
        reader.join()
    assert not faults
    assert seen <= ids
    assert len(ids) == 6


def test_a_part_of_an_extraction_is_no_cache(make, tmp_path):
    folder = ShardFolder(tmp_path / "k.parts", header=make.header())
    folder.commit(make.entries()[:1], batch_shape=(1,))
    for path in folder.folder.glob("*.h5"):
        with pytest.raises(CacheFormatError, match="a part of an unfinished extraction"):
            KnowledgeCache.open(path)


def test_paths_may_be_links(sealed, tmp_path):
    link = tmp_path / "link.h5"
    link.symlink_to(sealed)
    KnowledgeCache.open(link, verify="full").close()
