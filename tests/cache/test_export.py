"""Export: every dataset as a tensor, with the content id, always the same bytes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from cache import KnowledgeCache
from cache.errors import CacheFormatError, CacheMismatchError, MissingExtraError
from cache.sharing.export import export_safetensors

safetensors = pytest.importorskip("safetensors")


def test_every_dataset_is_a_tensor(make, sealed, tmp_path):
    out = export_safetensors(sealed, tmp_path / "k.safetensors")
    with KnowledgeCache.open(sealed) as found, safetensors.safe_open(out, "numpy") as tensors:
        metadata = tensors.metadata()
        assert metadata["vademecum_content_id"] == found.content_id
        assert metadata["vademecum_dataset"] == "toy"
        assert json.loads(metadata["vademecum_blocks"]) == found.sealed.header.content["blocks"]
        assert set(tensors.keys()) == set(found.sealed.header.extents)
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            wanted = found.sealed.array(name)
            got = tensors.get_tensor(name)
            assert got.dtype == wanted.dtype and np.array_equal(got, wanted)
        block = found.blocks["layers"]
        offsets = tensors.get_tensor("layers__offsets")
        rows = tensors.get_tensor("layers__values")[offsets[3] : offsets[4]]
        assert np.array_equal(rows, block.array("basophil", 1))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["k.h5", "k.safetensors"]


def test_its_folder_is_made(sealed, tmp_path):
    assert export_safetensors(sealed, tmp_path / "new" / "k.safetensors").is_file()


def test_the_same_cache_gives_the_same_bytes(sealed, tmp_path):
    code = (
        "import sys, pathlib; from cache.sharing.export import export_safetensors as e\n"
        "e(*map(pathlib.Path, sys.argv[1:]))"
    )
    found = set()
    for seed in ("1", "2", "3"):
        out = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, sealed, out], check=True, env=environment)
        found.add(out.read_bytes())
    assert len(found) == 1


def test_what_stops_an_export(make, sealed, tmp_path, monkeypatch):
    out = tmp_path / "k.safetensors"
    out.write_text("mine")
    with pytest.raises(CacheMismatchError, match=r"this file exists\. Choose another name"):
        export_safetensors(sealed, out)
    assert out.read_text() == "mine"
    (tmp_path / "x.h5").write_text("no")
    with pytest.raises(CacheFormatError, match="not a knowledge cache"):
        export_safetensors(tmp_path / "x.h5", tmp_path / "y")
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(MissingExtraError, match=r"needs the package .safetensors'.*pip install"):
        export_safetensors(sealed, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_cache_without_entries_is_exported(make, tmp_path):
    from cache import ShardFolder, seal

    folder = ShardFolder(tmp_path / "p", header=make.header())
    seal(folder, tmp_path / "k.h5")
    out = export_safetensors(tmp_path / "k.h5", tmp_path / "k.safetensors")
    with safetensors.safe_open(out, "numpy") as tensors:
        assert tensors.get_tensor("layers__values").shape == (0, 3, 5)
