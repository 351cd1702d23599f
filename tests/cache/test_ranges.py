"""Reading a cache over ranges: few reads, and no byte that no digest covers."""

import io
import re

import numpy as np
import pytest

from cache import KnowledgeCache
from cache.errors import (
    CacheFormatError,
    CacheMismatchError,
    MissingExtraError,
    MissingKnowledgeError,
    RecipeError,
    StorageError,
)
from cache.sharing.ranges import open_remote


@pytest.fixture(scope="module")
def server_module(root):
    import importlib.util

    path = root / "tests" / "cache" / "range_server.py"
    spec = importlib.util.spec_from_file_location("range_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(server_module, sealed):
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")
    with server_module.serving(sealed.parent) as running:
        yield running


def every_entry(found):
    return {
        (block.name, record.id, item): (
            block.array(record.id, item).tolist() if block.dtype else block.text(record.id, item)
        )
        for block in found.blocks.values()
        for record in found.classes
        for item in range(block.items(record.id))
    }


def same(remote, path):
    with KnowledgeCache.open(path) as local:
        assert remote.content_id == local.content_id
        assert every_entry(remote) == every_entry(local)
        assert (remote.recipe, remote.provenance) == (local.recipe, local.provenance)
        layers = remote.blocks["layers"]
        np.testing.assert_array_equal(layers.read(), local.blocks["layers"].values())
        np.testing.assert_array_equal(layers.layer(2), local.blocks["layers"].layer(2))
        for one, two in zip(layers.entries(), local.blocks["layers"].entries(), strict=True):
            assert (one.class_id, one.source_digest) == (two.class_id, two.source_digest)
        assert layers.keys() == local.blocks["layers"].keys()


def test_over_http_it_is_the_same_cache(server, sealed):
    with open_remote(f"{server.url}/k.h5") as remote:
        same(remote, sealed)


def test_over_files_and_memory_it_is_the_same_cache(sealed):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/k.h5", sealed.read_bytes())
    try:
        for place in (sealed, f"file://{sealed}", memory.open("/k.h5"), sealed.open("rb")):
            with open_remote(place) as remote:
                same(remote, sealed)
    finally:
        memory.rm("/k.h5")


def test_how_many_requests_it_takes(server):
    def taken(action):
        before = server.requests
        action()
        return server.requests - before

    opened = []
    assert taken(lambda: opened.append(open_remote(f"{server.url}/k.h5"))) == 2  # size and header
    with opened[0] as remote:
        assert remote.sealed.reads == 1
        assert taken(lambda: remote.classes) == 1
        layers, answers = remote.blocks["layers"], remote.blocks["answers"]
        assert taken(lambda: layers.items("ig")) == 1
        assert taken(lambda: layers.array("ig")) == 1
        assert taken(lambda: layers.array("basophil", 1)) == 1
        assert taken(lambda: answers.items("ig")) == 1
        assert taken(lambda: answers.text("ig", 1)) == 2
        assert taken(layers.digests) == 0
        assert taken(layers.values) == 1
        assert taken(lambda: layers.array("ig", 1)) == 0  # it is here by now


def test_a_long_header_is_read_whole(make, tmp_path, server_module):
    many = {f"block_{n}": make.BLOCKS["attributes"] for n in range(60)}
    path = tmp_path / "k.h5"
    header = make.header(blocks=many)
    folder = make.ShardFolder(tmp_path / "k.parts", header=header)
    folder.commit([], batch_shape=())
    make.seal(folder, path)
    assert path.read_bytes()[8:16] > (1 << 16).to_bytes(8, "little")[:2]
    with open_remote(str(path)) as remote:
        assert remote.sealed.reads == 2
        assert len(remote.blocks) == 60


def spoil(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 16
    path.write_bytes(raw)


def test_a_damaged_entry_is_refused_and_the_others_are_read(make, server, sealed):
    layout = make.body_of(sealed)["layout"]
    with KnowledgeCache.open(sealed) as local:
        good = every_entry(local)
        row = local.blocks["layers"].offsets()[3]
    spoil(sealed, layout["layers__values"] + int(row) * 3 * 5 * 2)
    spoil(sealed, layout["answers__text"])
    with open_remote(f"{server.url}/k.h5") as remote:
        refused = []
        for (name, class_id, item), value in good.items():
            block = remote.blocks[name]
            try:
                if block.dtype:
                    assert block.array(class_id, item).tolist() == value
                else:
                    assert block.text(class_id, item) == value
            except CacheFormatError as error:
                refused.append(((name, class_id, item), str(error)))
        line = (
            r".*/k.h5: entry \d of block \w+ is damaged: its digest differs. Fetch the file again."
        )
        assert all(re.fullmatch(line, message) for _, message in refused)
        assert [place for place, _ in refused] == [
            ("answers", "a-b.c", 0),
            ("layers", "basophil", 1),
        ]
        with pytest.raises(CacheFormatError, match="dataset layers__values is damaged"):
            remote.blocks["layers"].values()


@pytest.mark.parametrize("column", ["class", "item", "digests", "offsets"])
def test_a_damaged_index_is_refused_whole(make, sealed, column):
    spoil(sealed, make.body_of(sealed)["layout"][f"layers__{column}"] + 1)
    with open_remote(str(sealed)) as remote:
        for record in remote.classes:
            with pytest.raises(CacheFormatError, match=f"dataset layers__{column} is damaged"):
                remote.blocks["layers"].array(record.id)
        remote.blocks["embedded"].array("ig")


def test_whatever_is_refused_is_one_line(server, sealed, monkeypatch):
    url = server.url.replace("//", "//me:secret@") + "/k.h5?X-Signature=secret"
    with pytest.raises(CacheMismatchError, match="another content id") as caught:
        open_remote(url, expect="0" * 64)
    assert "secret" not in str(caught.value)
    with pytest.raises(CacheFormatError, match="there is no such file or server"):
        open_remote(f"{server.url}/absent.h5")
    with pytest.raises(RecipeError, match="an address of an unknown kind; found 'nowhere'"):
        open_remote("nowhere://k.h5")
    with pytest.raises(CacheFormatError, match=r"/absent\.h5: there is no such file"):
        open_remote(sealed.with_name("absent.h5"))
    with open_remote(url) as remote:
        sealed.unlink()
        with pytest.raises(CacheFormatError, match=r"k\.h5: there is no such file") as caught:
            _ = remote.classes
        assert "secret" not in str(caught.value)
    with pytest.raises(CacheFormatError, match="the cache was closed"):
        _ = remote.classes
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install .* -e '.\[share\]' in the"):
        open_remote(url)


def test_a_server_without_ranges_is_refused(server_module, sealed):
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")
    with (
        server_module.serving(sealed.parent, ranges=False) as server,
        pytest.raises(StorageError, match="the server does not answer ranges"),
    ):
        _ = open_remote(f"{server.url}/k.h5").classes


class Hostile(io.BytesIO):
    """A place that gives fewer or more bytes than asked for, or fails."""

    def __init__(self, raw, change):
        super().__init__(raw)
        self.change, self.asked = change, 0

    def read(self, size=-1):
        self.asked += 1
        return self.change(super().read(size)) if self.asked > 1 else super().read(size)


def test_a_place_that_lies_is_refused(sealed):
    raw = sealed.read_bytes()
    for change in (lambda b: b[:-1], lambda b: b + b"x", lambda b: b""):
        remote = open_remote(Hostile(raw, change))
        with pytest.raises(StorageError, match="another number of bytes than asked for"):
            _ = remote.classes
    remote = open_remote(Hostile(raw, bytes.swapcase))
    with pytest.raises(CacheFormatError, match="is damaged: its digest differs"):
        _ = remote.classes


def test_what_needs_the_whole_file_says_so(make, sealed):
    with open_remote(str(sealed)) as remote:
        for whole in (remote.sealed.verify_bytes, remote.sealed.verify_structure):
            with pytest.raises(CacheFormatError, match=r"needs the whole file\. Pull the file"):
                whole()
        with pytest.raises(MissingKnowledgeError, match="no item 2; found 2 items"):
            remote.blocks["layers"].array("ig", 2)
    for part, message in ((0, "not a knowledge cache"), (60, "the header is damaged")):
        raw = bytearray(sealed.read_bytes())
        raw[part] ^= 1
        with pytest.raises(CacheFormatError, match=f"^remote cache: {message}"):
            open_remote(io.BytesIO(raw))
    with pytest.raises(CacheFormatError, match="another size than when sealed"):
        open_remote(io.BytesIO(sealed.read_bytes()[:-1]))


def test_a_huge_claim_is_not_read(make, sealed, monkeypatch):
    monkeypatch.setattr("cache.sharing.ranges.LARGEST_READ", 100)
    file = sealed.open("rb")
    monkeypatch.setattr("cache.sharing.ranges.FIRST_READ", 100)
    with pytest.raises(CacheFormatError, match="too large to read over ranges; found"):
        open_remote(file)
