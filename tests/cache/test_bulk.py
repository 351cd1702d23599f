"""Whole blocks at once: views, copies, alignment, and the fast check for finite values."""

import numpy as np
import pytest

from cache import KnowledgeCache
from cache.blocks import all_finite
from cache.errors import CacheFormatError, MissingKnowledgeError, ValueRefusedError
from cache.sealed import PAGE, empty_pages


def test_values_hold_all_entries_in_file_order(sealed):
    with KnowledgeCache.open(sealed) as found:
        for name in ("layers", "embedded"):
            block = found.blocks[name]
            values, offsets = block.values(), block.offsets()
            entries = [entry.values["values"] for entry in block.entries()]
            np.testing.assert_array_equal(values, np.concatenate(entries))
            assert np.diff(offsets).tolist() == [len(entry) for entry in entries]
            assert not values.flags.writeable
        layers = found.blocks["layers"]
        for axis, number in enumerate(layers.layers):
            np.testing.assert_array_equal(layers.layer(number), layers.values()[:, axis])
        assert layers.layer(30).base is not None
        with pytest.raises(MissingKnowledgeError, match=r"no layer 3; found layers \[1, 2, 30\]"):
            layers.layer(3)
        with pytest.raises(MissingKnowledgeError, match="no layer 1"):
            found.blocks["embedded"].layer(1)
        for action in ("values", "offsets", "read"):
            with pytest.raises(MissingKnowledgeError, match="a block of texts holds no arrays"):
                getattr(found.blocks["answers"], action)()


def test_a_copy_is_writable_starts_on_a_page_and_outlives_the_cache(sealed):
    with KnowledgeCache.open(sealed) as found:
        block = found.blocks["layers"]
        copy, again = block.read(), np.empty(block.values().shape, "<f2")
        assert block.read(again) is again
        np.testing.assert_array_equal(copy, block.values())
    np.testing.assert_array_equal(copy, again)
    copy[:] = 0
    # Whatever the file's own alignment is: copying from the start of a page to 16 bytes after one
    # is five times slower on some processors, and HDF5 puts large datasets at any multiple of 64.
    assert copy.ctypes.data % PAGE == 0
    assert empty_pages((5, 3), np.dtype("f4")).ctypes.data % PAGE == 0
    with pytest.raises(CacheFormatError, match="the cache was closed"):
        block.read()


def test_a_copy_is_digested_where_it_is_handed_out(make, sealed):
    at = make.body_of(sealed)["layout"]["layers__values"]
    raw = bytearray(sealed.read_bytes())
    raw[at + 5] ^= 1
    sealed.write_bytes(raw)
    with KnowledgeCache.open(sealed) as found:
        with pytest.raises(CacheFormatError, match="dataset layers__values is damaged"):
            found.blocks["layers"].read()
        found.blocks["embedded"].read()
        assert found.sealed._verified >= {"embedded__values"}
        assert "layers__values" not in found.sealed._verified


def test_a_large_dataset_is_read_in_steps(make, sealed, monkeypatch):
    monkeypatch.setattr("cache.sealed.READ_STEP", 7)
    with KnowledgeCache.open(sealed) as found:
        copy = found.blocks["layers"].read()
        np.testing.assert_array_equal(copy, found.blocks["layers"].values())
    with KnowledgeCache.open(sealed) as found:
        at = make.body_of(sealed)["layout"]["layers__values"]
        with sealed.open("r+b") as file:
            file.truncate(at + 9)
        with pytest.raises(CacheFormatError, match="the file changed its size while it was open"):
            found.blocks["layers"].read()


@pytest.mark.parametrize(
    "out",
    [
        lambda shape: np.empty(shape, "f4"),
        lambda shape: np.empty((*shape[:2], shape[2] + 1), "f2"),
        lambda shape: np.empty(shape, "f2", order="F"),
        lambda shape: np.frombuffer(bytes(2 * int(np.prod(shape))), "f2").reshape(shape),
    ],
)
def test_an_array_that_does_not_fit_is_refused(sealed, out):
    with KnowledgeCache.open(sealed) as found:
        wrong = out(found.blocks["layers"].values().shape)
        with pytest.raises(ValueRefusedError, match="the array to read into does not fit"):
            found.blocks["layers"].read(wrong)


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_finite_is_what_numpy_says(dtype):
    if dtype == "f2":
        every = np.arange(1 << 16, dtype=np.uint16).view("f2")
    else:
        random = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
        every = np.concatenate([random.view("f4"), np.array([np.inf, -np.inf, np.nan], "f4")])
    for value in every:
        assert all_finite(np.array([0, value], dtype)) is bool(np.isfinite(value))
    finite = every[np.isfinite(every)]
    assert all_finite(finite)
    assert all_finite(finite[::2])
    assert all_finite(np.empty((0, 3), dtype))
