"""Files the published code loads: the same tensors, the same bytes everywhere, and back again."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cache import BlockSpec, ClassRecord, Entry, KnowledgeCache, ShardFolder, seal
from cache.errors import CacheMismatchError, MissingKnowledgeError, ValueRefusedError
from cache.foreign.export_cilmp import export_cilmp, pickle_of, pth_bytes
from cache.foreign.import_cilmp import import_cilmp
from cache.foreign.importing import Labels

torch = pytest.importorskip("torch")
GOLDEN = "ea4f2b0eb2ff78e5cd0f7c74a50053903305cead8e9e62250f7afa09f8f65ba6"


def cache_of(make, path: Path, values: dict[str, np.ndarray], dtype: str = "f4", **more) -> Path:
    """A cache with these arrays as item 0, 1, ... of each class."""
    rows = next(iter(values.values()))
    spec = BlockSpec("states", {}, dtype, tuple(range(1, rows.shape[-2] + 1)), rows.shape[-1])
    classes = tuple(ClassRecord(f"c{i}", name) for i, name in enumerate(values))
    header = make.header(classes=classes, blocks={"layers": spec}, recipe={}, provenance={})
    folder = ShardFolder(path.with_name(path.name + ".parts"), header=header)
    for record, value in zip(classes, values.values(), strict=True):
        array = value[None] if value.ndim == 2 else value
        one = Entry("layers", record.id, 0, {"values": array}, make.digest(record.id))
        folder.commit([one], batch_shape=(1,))
    seal(folder, path)
    return path


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype("f4")


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_torch_loads_what_was_stored(make, tmp_path, dtype):
    values = {"normal cecum": numbers(5, 300), "z-line (a, b)": numbers(5, 300) + 1}
    file = cache_of(make, tmp_path / "k.h5", values, dtype)
    report = export_cilmp(file, tmp_path / "llm" / "kvasir")
    assert sorted(report.files) == ["normal cecum.pth", "z-line (a, b).pth"]
    assert "2 files, 5 layers of width 300" in report.describe()
    assert "needs width 4096" in report.describe()
    for name, wanted in values.items():
        path = tmp_path / "llm" / "kvasir" / f"{name}.pth"
        assert report.files[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
        for options in ({"weights_only": True}, {"weights_only": False}, {"mmap": True}):
            found = torch.load(path, **options)
            assert type(found) is torch.Tensor and found.is_contiguous()
            assert found.shape == (5, 300) and len(found) == 5
            np.testing.assert_array_equal(found.numpy(), wanted.astype("<" + dtype))


@pytest.mark.parametrize("shape", [(1, 1), (32, 4096), (3, 255), (256, 256), (2, 65536)])
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_the_pickle_is_the_one_torch_writes(tmp_path, shape, dtype):
    path = tmp_path / "archive.pth"
    torch.save(torch.zeros(shape, dtype={"f2": torch.float16, "f4": torch.float32}[dtype]), path)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/data.pkl") == pickle_of(shape, dtype)


def test_the_numbers_are_aligned_and_the_zip_is_sound(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(pth_bytes(np.arange(12, dtype="<f4").reshape(3, 4)))
    assert path.read_bytes().index(np.arange(12, dtype="<f4").tobytes()) % 64 == 0
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_there_and_back_is_bit_for_bit(make, tmp_path, dtype):
    values = {"a": numbers(4, 33), "B c": -numbers(4, 33)}
    values["a"][0, :3] = [0.0, -0.0, 6.1e-5]
    file = cache_of(make, tmp_path / "k.h5", values, dtype)
    export_cilmp(file, tmp_path / "toy")
    import_cilmp(tmp_path / "toy", tmp_path / "back.h5", Labels("toy", "layers"))
    with KnowledgeCache.open(file) as first, KnowledgeCache.open(tmp_path / "back.h5") as second:
        assert second.blocks["layers"].dtype == dtype
        assert [c.name for c in second.classes] == ["a", "B c"]
        for one, other in (("c0", "a"), ("c1", "b-c")):
            wanted = first.blocks["layers"].array(one).tobytes()
            assert second.blocks["layers"].array(other).tobytes() == wanted
    export_cilmp(tmp_path / "back.h5", tmp_path / "again")
    for path in (tmp_path / "toy").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_same_bytes_in_another_process():
    code = (
        "import numpy as np, hashlib; from cache.foreign.export_cilmp import pth_bytes;"
        "print(hashlib.sha256(pth_bytes(np.arange(12, dtype='<f2').reshape(3, 4))).hexdigest())"
    )
    environment = {"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    here = pth_bytes(np.arange(12, dtype="<f2").reshape(3, 4))
    assert found.stdout.strip() == hashlib.sha256(here).hexdigest() == GOLDEN


def test_another_type_on_request(make, tmp_path):
    file = cache_of(make, tmp_path / "k.h5", {"a": numbers(2, 3)})
    export_cilmp(file, tmp_path / "half", dtype="f2")
    assert torch.load(tmp_path / "half" / "a.pth").dtype == torch.float16
    big = cache_of(make, tmp_path / "b.h5", {"a": numbers(2, 3), "b": numbers(2, 3) + 1e6})
    with pytest.raises(ValueRefusedError, match=r"class c1, item 0: a value is too large for fl"):
        export_cilmp(big, tmp_path / "big", dtype="f2")
    assert not (tmp_path / "big").exists()
    with pytest.raises(ValueRefusedError, match="found 'f8', wanted f2 or f4"):
        export_cilmp(file, tmp_path / "double", dtype="f8")


@pytest.mark.parametrize(
    "name", ["../x", "a/b", ".hidden", "-rf", "x" * 252, "a\u202eb", "a:b", "a\nb"]
)
def test_names_that_are_no_file_names_are_refused(make, tmp_path, name):
    file = cache_of(make, tmp_path / "k.h5", {"sound": numbers(2, 3), name: numbers(2, 3)})
    with pytest.raises(ValueRefusedError, match="class c1: the name of this class cannot be the"):
        export_cilmp(file, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.h5"]


def test_one_name_for_two_classes_is_refused(make, tmp_path):
    file = cache_of(make, tmp_path / "k.h5", {"Polyp": numbers(2, 3), "polyp": numbers(2, 3)})
    with pytest.raises(ValueRefusedError, match="classes 'c0' and 'c1' have one name"):
        export_cilmp(file, tmp_path / "out")


def test_nothing_is_replaced_by_accident(make, tmp_path):
    file = cache_of(make, tmp_path / "k.h5", {"a": numbers(2, 3), "b": numbers(2, 3)})
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.pth").write_text("precious")
    with pytest.raises(CacheMismatchError, match=r"b\.pth: this file exists.* pass --overwrite"):
        export_cilmp(file, out)
    assert [p.name for p in out.iterdir()] == ["b.pth"]
    assert (out / "b.pth").read_text() == "precious"
    other = tmp_path / "other"
    other.write_text("untouched")
    (out / "a.pth").symlink_to(other)
    export_cilmp(file, out, overwrite=True)
    assert torch.load(out / "b.pth").shape == (2, 3)
    assert other.read_text() == "untouched"


def test_only_tables_of_layers_are_exported(make, sealed, tmp_path):
    with pytest.raises(MissingKnowledgeError, match="a block of embeddings holds no layers"):
        export_cilmp(sealed, tmp_path / "out", block="embedded")
    with pytest.raises(MissingKnowledgeError, match=r"item 0: an entry with \d rows is no table"):
        export_cilmp(sealed, tmp_path / "out")
    with pytest.raises(MissingKnowledgeError, match="nothing"):
        export_cilmp(sealed, tmp_path / "out", block="nothing")
    assert not (tmp_path / "out").exists()
    file = cache_of(make, tmp_path / "k2.h5", {"a": numbers(2, 3)})
    with pytest.raises(MissingKnowledgeError, match="no item 4"):
        export_cilmp(file, tmp_path / "out", item=4)
