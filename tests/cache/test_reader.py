"""The independent reader in docs/ agrees with ours, and refuses what ours refuses."""

import importlib.util

import numpy as np
import pytest

from cache import BlockSpec, ExtractionHeader, KnowledgeCache, ShardFolder, seal
from cache.blocks import KINDS
from cache.errors import CacheError, MissingKnowledgeError
from cache.sealed import SealedFile


@pytest.fixture(scope="module")
def reader(root):
    spec = importlib.util.spec_from_file_location("read_cache", root / "docs" / "read_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(path):
    """What our reader sees, in the words of the other."""
    with KnowledgeCache.open(path) as found:
        plain = {}
        for block in found.blocks.values():
            for entry in block.entries():
                values = {
                    name: tuple(v.reshape(-1).tolist()) if isinstance(v, np.ndarray) else v
                    for name, v in entry.values.items()
                }
                plain[block.name, entry.class_id, entry.item] = values
        return found.content_id, plain


def test_it_reads_what_we_read(reader, sealed):
    identity, entries = reader.read(sealed)
    assert (identity, entries) == ours(sealed)
    assert len(entries) == 24
    assert reader.read(sealed, expect=identity)[0] == identity
    with pytest.raises(ValueError, match="another content id"):
        reader.read(sealed, expect="0" * 64)


def test_it_reads_every_dtype_gaps_and_empty_blocks(reader, make, tmp_path):
    blocks = {
        "wide": BlockSpec("states", {}, "f4", (0, 7), 3),
        "half": BlockSpec("embeddings", {}, "f2", (), 2),
        "none": BlockSpec("embeddings", {}, "f4", (), 2),
        "silent": BlockSpec("texts", {}),
    }
    assert {spec.kind for spec in blocks.values()} < set(KINDS)
    header = ExtractionHeader("toy", make.CLASSES, blocks, {}, {})
    folder = ShardFolder(tmp_path / "k.parts", header=header)
    tiny = np.array([[1.5, -65504.0], [6e-8, 0.1]], "f2")
    states = np.linspace(-1, 1, 6, dtype="f4").reshape(1, 2, 3)
    entry = make.Entry
    folder.commit(
        [
            entry("half", "ig", 3, {"values": tiny}, "1" * 64),
            entry("wide", "ig", 0, {"values": states}, "2" * 64),
            entry("wide", "basophil", 5, {"values": states[::-1] * 3}, "3" * 64),
            entry(
                "silent",
                "ig",
                0,
                {
                    "text": "",
                    "prompt": "日本語 \U0001f9ec",
                    "prompt_tokens": -1,
                    "text_tokens": 2**62,
                },
                "4" * 64,
            ),
        ],
        batch_shape=(),
    )
    seal(folder, tmp_path / "k.h5")
    identity, entries = reader.read(tmp_path / "k.h5")
    assert (identity, entries) == ours(tmp_path / "k.h5")
    assert entries["half", "ig", 3]["values"] == tuple(tiny.reshape(-1).tolist())
    assert len(entries) == 4
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        np.testing.assert_array_equal(found.blocks["half"].array("ig", 3), tiny)
        np.testing.assert_array_equal(found.blocks["wide"].array("basophil", 5), states[::-1] * 3)
        for name, class_id, item in (("half", "ig", 0), ("half", "basophil", 0), ("wide", "ig", 1)):
            with pytest.raises(MissingKnowledgeError, match=f"no item {item}"):
                found.blocks[name].array(class_id, item)


def test_it_refuses_every_damage_that_we_refuse(reader, make, tmp_path):
    path, spoilt = tmp_path / "k.h5", tmp_path / "spoilt.h5"
    make.tiny_cache_at(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        raw = bytearray(whole)
        raw[at] ^= 1 << at % 8
        spoilt.write_bytes(raw)
        with pytest.raises(ValueError, match="refused"):
            reader.read(spoilt)
        with pytest.raises(CacheError), SealedFile(spoilt) as sealed:
            sealed.verify_bytes()
    spoilt.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="a wrong header, size or kind"):
        reader.read(spoilt)
    make.rewrite(path, "embedded__digests", np.zeros((2, 32), "u1"))
    with pytest.raises(ValueError, match="an entry of block embedded is damaged"):
        reader.read(path)
