"""Traps met while the format was designed; where each of them is guarded.

 1. closing a file does not close its data sets     test_the_skeleton_is_whole_when_it_is_hashed
 2. an empty data set has a nonsense address        test_an_empty_data_set_has_no_address
 3. mkstemp hides a file from colleagues            test_a_cache_is_readable_as_the_umask_says
 4. opening a FIFO waits for ever                   cache/test_sealed.py, test_hostile_files.py
 5. wrong types, doubled keys, NaN, UTF-16          cache/test_header.py, headers.py, test_fuzz.py
 6. 100,000 tensors in a header                     test_a_bloated_header_is_not_read
 7. time stamps and library bounds                  cache/test_determinism.py, cache/test_frozen.py
 8. kill -9 proves nothing about fsync              torture: negative controls
 9. a SWMR reader hangs on torn metadata            test_only_the_limited_child_parses_hdf5
10. a signal right after fork is dropped            torture: a ready byte
11. "w" truncates before it looks at the lock       test_only_the_limited_child_parses_hdf5
12. page-aligned data copy slowly                   test_no_large_data_set_starts_on_a_page
"""

import hashlib
import os
import re
import stat

import forge
import h5py
import make
import numpy as np
import pytest
from headers import MORE_EDITS

from cache import header_reader
from cache.durable import drafting
from cache.errors import CacheFormatError
from cache.packing import Source, pack
from cache.plain import strict_json
from cache.sealed import SealedFile
from cache.skeleton import build

PACKAGES = ("cache", "knowledge_extract", "prompt_tune")


def test_the_skeleton_is_whole_when_it_is_hashed(tmp_path):
    """Trap 1: with the data sets still open, the library had not written all of its bytes."""
    shapes = {f"d{n}": ("f4", (n + 1, 5)) for n in range(40)}
    skeleton = build(shapes, 4096)
    path = tmp_path / "x.h5"
    path.write_bytes(skeleton.read(0, skeleton.size))
    with h5py.File(path, "r") as file:
        assert {name: data.shape for name, data in file.items()} == {
            name: shape for name, (_, shape) in shapes.items()
        }
    end = int.from_bytes(path.read_bytes()[4096 + 28 : 4096 + 36], "little")
    assert end == skeleton.size


def test_an_empty_data_set_has_no_address():
    """Trap 2: the library answers 4095, the undefined address plus the user block."""
    skeleton = build({"empty": ("u1", (0,)), "none": ("f2", (0, 3, 5)), "one": ("i8", (1,))}, 4096)
    assert skeleton.offsets["empty"] == 0
    assert skeleton.offsets["none"] == 0
    assert skeleton.offsets["one"] > 4096


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_cache_is_readable_as_the_umask_says(tmp_path, mask):
    """Trap 3: a shared cache of mode 0600."""
    before = os.umask(mask)
    try:
        make.tiny_cache_at(tmp_path / "k.h5")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "k.h5").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("name", ["recipe 300k lists", "recipe 100k keys"])
def test_a_bloated_header_is_not_read(tmp_path, monkeypatch, name):
    """Trap 6: it took 7 s to find out."""
    path = tmp_path / "k.h5"
    make.cache_at(path)
    make.reforge(path, MORE_EDITS[name])
    monkeypatch.setattr(header_reader.json, "loads", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(CacheFormatError, match="the header has more than 32768 commas"):
        SealedFile(path)


def test_many_blocks_are_refused_before_their_ids_are_computed(tmp_path, monkeypatch):
    """Ids of all blocks take time that grows with the square of their number."""
    path = tmp_path / "k.h5"
    make.cache_at(path)
    make.reforge(path, MORE_EDITS["blocks by the hundred"])
    monkeypatch.setattr(header_reader, "block_id", lambda *_: pytest.fail("it was computed"))
    with pytest.raises(CacheFormatError, match="the header has more than 64 blocks"):
        SealedFile(path)


def test_only_the_limited_child_parses_hdf5(root):
    """Traps 9 and 11: no SWMR, nothing opened by name; one module parses, in a limited child."""
    users = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            calls = re.findall(r"h5py\.File\(|h5f\.open\(|swmr|libver=", path.read_text("utf-8"))
            if calls:
                users[path.name] = calls
    assert set(users) <= {"foreign_hdf5.py"}
    assert all(call == "h5py.File(" for calls in users.values() for call in calls)


def test_no_large_data_set_starts_on_a_page(tmp_path):
    """Trap 12: copies out of page-aligned data are five times slower on some processors."""
    with drafting(tmp_path) as draft:
        made = make.header(blocks={"embedded": make.BLOCKS["embedded"]})
        content = made.content("knowledge")
        rows = 100_000  # 2.8 MB
        sources = made.sources() | {
            f"embedded__{name}": Source.of(np.zeros((1, 32), "u1"))
            for name in ("keys", "digests", "sources")
        }
        sources |= {f"embedded__{n}": Source.of(np.zeros(1, "<i8")) for n in ("class", "item")}
        sources["embedded__offsets"] = Source.of(np.array([0, rows], "<i8"))
        sources["embedded__values"] = Source.of(np.zeros((rows, 7), "<f4"))
        pack(draft, content, sources)
        draft.publish(tmp_path / "k.h5", replace=True)
    with SealedFile(tmp_path / "k.h5") as sealed:
        extent = sealed.header.extents["embedded__values"]
        assert extent.nbytes > 1 << 20
        assert extent.offset % 4096 != 0


def test_json_of_a_file_is_strict():
    """Trap 5, for what stands in data sets and run folders."""
    deep = b"[" * 32 + b"]" * 32
    assert strict_json(deep) is not None
    for raw in (b"[" + deep + b"]", b"[" * 100000, b'{"a":1,"a":1}', b"NaN", b"-Infinity",
                b"1e999", b"9" * 5000, b"\xff", b'"\xed\xa0\x80"', b"", "1".encode("utf-16"),
                b"\xef\xbb\xbf1"):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            strict_json(raw)
    assert strict_json(b'{"a": [1, -0.5, 1e3, null, true]}') == {"a": [1, -0.5, 1000.0, None, True]}


def test_a_forged_file_keeps_what_it_does_not_change(tmp_path):
    """The tools of this folder do what they say: all digests right, nothing else touched."""
    path = tmp_path / "k.h5"
    make.cache_at(path)
    raw = path.read_bytes()
    forge.seal_over(path, raw, lambda _: None)
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(raw).digest()
