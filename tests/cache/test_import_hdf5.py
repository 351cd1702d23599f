"""Foreign HDF5: plain datasets of floats come in, everything else is refused unseen."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t

from cache import KnowledgeCache, verify
from cache.errors import CacheError, CacheFormatError, MissingKnowledgeError, ValueRefusedError
from cache.foreign import sandbox
from cache.foreign.import_hdf5 import import_hdf5
from cache.foreign.importing import Labels

LABELS = Labels("toy", "layers")
CANARY = b"canary: root:x:0:0 " * 40
DATA = np.arange(24, dtype="f4").reshape(4, 6)


def made(path: Path, fill: Callable[[h5py.File], object], **options) -> Path:
    with h5py.File(path, "w", **options) as file:
        fill(file)
    return path


def fails(path: Path, match: str, labels: Labels = LABELS, error: type = CacheFormatError) -> None:
    with pytest.raises(error, match=match) as caught:
        import_hdf5(path, path.with_name("out.h5"), labels)
    assert "\n" not in str(caught.value) and "canary" not in str(caught.value)
    assert not list(path.parent.glob("out.h5*"))


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}, {"userblock_size": 1024}])
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_plain_files_come_in(tmp_path, options, dtype):
    values = {"Normal cecum": DATA.astype(dtype), "polyps": -DATA.astype(dtype)}

    def fill(file):
        file.attrs["made"] = "somewhere"
        group = file.create_group("hidden")
        file.create_group("empty")
        for name, value in values.items():
            group.create_dataset(name, data=value).attrs["note"] = "x"

    path, out = made(tmp_path / "f.h5", fill, **options), tmp_path / "k.h5"
    labels = Labels("toy", "layers", licence="apache-2.0", model="org/name", first_layer=0)
    report = import_hdf5(path, out, labels)
    verify(out)
    assert report.to_json()["classes"] == {"normal-cecum": "Normal cecum", "polyps": "polyps"}
    with KnowledgeCache.open(out) as found:
        block = found.blocks["layers"]
        assert (block.layers, block.width, block.dtype) == ((0, 1, 2, 3), 6, dtype)
        np.testing.assert_array_equal(block.array("normal-cecum")[0], values["Normal cecum"])
        np.testing.assert_array_equal(block.array("polyps")[0], values["polyps"])
        assert found.provenance["model_licence"] == "apache-2.0"
        assert list(found.recipe["imported"]["files"]) == ["f.h5"]


def test_rows_and_embeddings(tmp_path):
    def fill(file):
        file["a"] = np.arange(36, dtype="f8").reshape(2, 3, 6)
        file["b"] = np.arange(18, dtype="f8").reshape(1, 3, 6)

    path = made(tmp_path / "f.h5", fill)
    import_hdf5(path, tmp_path / "k.h5", LABELS)
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        assert found.blocks["layers"].array("a").shape == (2, 3, 6)
        assert found.blocks["layers"].array("b").dtype == "f4"
    path = made(tmp_path / "g.h5", lambda f: f.update({"a": DATA, "b": DATA[:1]}))
    labels = Labels("toy", "sentences", "embeddings")
    report = import_hdf5(path, tmp_path / "l.h5", labels, classes={"a": "first"})
    assert report.ignored == ("b",) and report.layers == ()
    with KnowledgeCache.open(tmp_path / "l.h5") as found:
        np.testing.assert_array_equal(found.blocks["sentences"].array("a"), DATA)
    with pytest.raises(MissingKnowledgeError, match=r"class 'c' \(c\) has no datasets; found 'a'"):
        import_hdf5(path, tmp_path / "m.h5", labels, classes={"c": "c"})


def _unwritten(file: h5py.File, name: str, shape: tuple[int, ...]) -> None:
    """A dataset whose bytes are declared and never written."""
    how = h5p.create(h5p.DATASET_CREATE)
    how.set_layout(h5d.CONTIGUOUS)
    how.set_alloc_time(h5d.ALLOC_TIME_LATE)
    how.set_fill_time(h5d.FILL_TIME_NEVER)
    h5d.create(file.id, name.encode(), h5t.IEEE_F32LE, h5s.create_simple(shape), how)


def _external(file: h5py.File) -> None:
    canary = Path(file.filename).with_name("canary")
    file.create_dataset("a", (4, 6), "f4", external=[(str(canary), 0, 96)])


def _virtual(target: str, shape: tuple[int, int], maximum: tuple | None = None) -> Callable:
    def fill(file: h5py.File) -> None:
        layout = h5py.VirtualLayout(shape, "f4", maxshape=maximum)
        layout[: shape[0]] = h5py.VirtualSource(target, "a", shape)
        file.create_virtual_dataset("a", layout)

    return fill


def _hard_cycle(file: h5py.File) -> None:
    group = file.create_group("g")
    group["again"] = group


def _hard_twins(file: h5py.File) -> None:
    file["a"] = DATA
    file["b"] = file["a"]


def _committed(file: h5py.File) -> None:
    file["t"] = np.dtype("f4")
    file.create_dataset("a", data=DATA, dtype=file["t"])


def _flood(file: h5py.File) -> None:
    file["a"] = DATA
    for number in range(100):
        file["a"].attrs[f"x{number}"] = number


def _many(file: h5py.File) -> None:
    for number in range(4100):
        h5py.h5g.create(file.id, b"%d" % number)


def _deep(file: h5py.File) -> None:
    file["a/b/c"] = DATA


def _twice(file: h5py.File) -> None:
    file["one/a"] = DATA
    file["two/a"] = DATA


HOSTILE = {
    "external storage": (_external, r"'/a': a dataset whose values lie in another file"),
    "external link": (
        lambda f: f.update({"a": h5py.ExternalLink("canary.h5", "/a")}),
        r"'/a': a link to another place or file",
    ),
    "external link in a group": (
        lambda f: f.update({"g/a": h5py.ExternalLink("canary.h5", "/a")}),
        r"'/g/a': a link to another",
    ),
    "soft link": (lambda f: f.update({"a": DATA, "b": h5py.SoftLink("/a")}), r"'/b': a link"),
    "soft cycle": (lambda f: f.update({"a": h5py.SoftLink("/a")}), r"'/a': a link"),
    "hard cycle": (_hard_cycle, r"'/g': an object with more than one name"),
    "hard twins": (_hard_twins, r"'/a': an object with more than one name"),
    "virtual": (_virtual("canary.h5", (4, 6)), r"'/a': a virtual dataset"),
    "virtual of itself": (_virtual(".", (4, 6)), r"'/a': a virtual dataset"),
    "virtual without end": (_virtual("canary.h5", (4, 6), (None, 6)), r"'/a': a virtual dataset"),
    "gzip": (
        lambda f: f.create_dataset("a", data=np.zeros((64, 4096), "f4"), compression="gzip"),
        r"'/a': a dataset in chunks. Write it again with `h5repack",
    ),
    "fletcher32": (lambda f: f.create_dataset("a", data=DATA, fletcher32=True), r"in chunks"),
    "chunks": (lambda f: f.create_dataset("a", data=DATA, chunks=(2, 6)), r"in chunks"),
    "a chunk of 2 GiB": (
        lambda f: f.create_dataset("a", (1 << 10, 1 << 19), "f4", chunks=(1 << 10, 1 << 18)),
        r"in chunks",
    ),
    "32 GiB not stored": (lambda f: _unwritten(f, "a", (1 << 20, 1 << 13)), r"not stored whole"),
    "2 TiB not stored": (lambda f: _unwritten(f, "a", (1 << 26, 1 << 13)), r"not stored whole"),
    "texts": (lambda f: f.update({"a": ["x", "y"]}), r"not little-endian floats"),
    "fixed texts": (lambda f: f.update({"a": np.array([b"x"])}), r"not little-endian floats"),
    "ragged": (
        lambda f: f.create_dataset("a", (3,), h5py.vlen_dtype("f4")),
        r"not little-endian floats",
    ),
    "references": (
        lambda f: f.create_dataset("a", data=[f.ref], dtype=h5py.ref_dtype),
        r"not little-endian floats",
    ),
    "compound": (lambda f: f.update({"a": np.zeros(3, "f4,f4")}), r"not little-endian floats"),
    "integers": (lambda f: f.update({"a": DATA.astype("i4")}), r"not little-endian floats"),
    "big-endian": (lambda f: f.update({"a": DATA.astype(">f4")}), r"not little-endian floats"),
    "long double": (lambda f: f.update({"a": DATA.astype("g")}), r"not little-endian floats"),
    "a committed type": (_committed, r"not little-endian floats"),
    "a named type alone": (lambda f: f.update({"t": np.dtype("f4")}), r"'/t': a group inside"),
    "a scalar": (lambda f: f.update({"a": np.float32(1)}), r"an array of shape \[\]"),
    "null": (lambda f: f.update({"a": h5py.Empty("f4")}), r"an array of shape \[\]"),
    "no rows": (lambda f: f.update({"a": DATA[:0]}), r"an array of shape \[0, 6\]"),
    "rank 4": (lambda f: f.update({"a": DATA.reshape(1, 1, 4, 6)}), r"an array of shape \[1, 1"),
    "attributes": (_flood, r"'/a': more than 64 attributes"),
    "objects": (_many, r"'/': 4100 objects, at most 4096 are read"),
    "groups in groups": (_deep, r"'/a/b': a group inside a group"),
    "one name twice": (_twice, r"two groups hold a dataset 'a'"),
    "a control character": (
        lambda f: f.update({"a\x1b[31m": DATA}),
        r"'/a\\x1b\[31m': a name that",
    ),
    "a direction character": (lambda f: f.update({"a\u202eb": DATA}), r"'/a\\u202eb': a name that"),
    "a long name": (lambda f: f.update({"a" * 5000: DATA}), r"a+': a name that is too long"),
    "nothing": (lambda f: None, r"holds no datasets"),
    "one axis": (lambda f: f.update({"a": DATA[0]}), r"'a' is no array of states; found \[6\]"),
    "two shapes": (lambda f: f.update({"a": DATA, "b": DATA[:2]}), r"class 'b': another shape"),
}


def others(folder: Path) -> None:
    """The files that hostile files point to."""
    (folder / "canary").write_bytes(CANARY)
    made(folder / "canary.h5", lambda f: f.update({"a": DATA}))


@pytest.mark.parametrize("name", HOSTILE)
def test_everything_else_is_refused(tmp_path, name):
    others(tmp_path)
    fill, message = HOSTILE[name]
    fails(made(tmp_path / "f.h5", fill), message)


def test_these_files_do_open_others_elsewhere(tmp_path):
    """Read the naive way, the canary of the tests above comes out."""
    others(tmp_path)
    path = made(tmp_path / "f.h5", _external)
    with h5py.File(path) as file:
        assert file["a"][()].tobytes() == CANARY[:96]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_no_other_file_is_opened_while_a_foreign_one_is_parsed(tmp_path):
    others(tmp_path)
    names = [name for name in HOSTILE if "external" in name or "virtual" in name]
    paths = []
    for number, name in enumerate(names):
        paths.append(str(made(tmp_path / f"f{number}.h5", HOSTILE[name][0])))
    code = (
        "import os, sys; from pathlib import Path; from cache.foreign.sandbox import run_limited\n"
        "from cache.errors import CacheFormatError\n"
        "for name in sys.argv[1:]:\n"
        "    try: run_limited('hdf5', Path(name), os.open(name, os.O_RDONLY))\n"
        "    except CacheFormatError as error: print(error)\n"
    )
    trace = tmp_path / "trace"
    calls = "trace=open,openat,openat2,socket,execve,write"
    command = ["strace", "-ff", "-qq", "-e", calls, "-o", str(trace)]
    found = subprocess.run(
        [*command, sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False
    )
    if "ptrace" in found.stderr:
        pytest.skip("strace may not trace here")
    assert found.stdout.count("\n") == len(paths), found.stderr
    children = [t.read_text() for t in tmp_path.glob("trace.*")]
    children = [t for t in children if 'write(1, "ready' in t]
    assert len(children) == len(paths)
    for text in children:
        after = text[text.index('write(1, "ready') :]
        assert "canary" not in text
        assert "open" not in after and "socket" not in after and "execve" not in after


def test_damaged_files_are_refused(tmp_path):
    good = made(tmp_path / "good.h5", lambda f: f.update({"a": DATA, "b": DATA + 1}))
    raw, path = good.read_bytes(), tmp_path / "f.h5"
    for edit, message in (
        (raw[:-40], r"refuses it|beyond the end"),
        (raw[:600], r"refuses it"),
        (b"hello", r"the HDF5 library refuses it \(OSError\)"),
        (b"", r"refuses it"),
    ):
        path.write_bytes(edit)
        fails(path, message)
    with h5py.File(good) as file:
        one, two = (file[n].id.get_offset().to_bytes(8, "little") for n in "ab")
    path.write_bytes(raw.replace(two, one))
    fails(path, r"'b': values that overlap those of another dataset")
    far = (len(raw) - 8).to_bytes(8, "little")
    path.write_bytes(raw.replace(two, far))
    fails(path, r"'b': values beyond the end of the file|refuses it")
    os.mkfifo(tmp_path / "fifo")
    fails(tmp_path / "fifo", r"not a regular file")


def test_values_are_checked(tmp_path):
    bad = DATA.copy()
    bad[2, 3] = np.inf
    path = made(tmp_path / "f.h5", lambda f: f.update({"a": DATA, "b": bad}))
    fails(path, r"class b, item 0, layer 3, row 0, component 3", error=ValueRefusedError)
    path = made(tmp_path / "g.h5", lambda f: f.update({"a": DATA / np.float64(3)}))
    fails(path, r"float64 values that float32 cannot hold", error=ValueRefusedError)
    fails(path, r"only states and embed", Labels("toy", "t", "texts"), error=ValueRefusedError)
    path = made(tmp_path / "h.h5", lambda f: f.update({"日本": DATA}))
    fails(path, r"no class id can be made of the name; found '\\u65e5", error=ValueRefusedError)


def test_mutated_files_never_harm_the_parent(tmp_path):
    """Whatever the library does with them, it does it in the child."""
    good = made(tmp_path / "good.h5", lambda f: f.update({"a": DATA, "g/b": DATA + 1}))
    raw, random = good.read_bytes(), np.random.default_rng(1)
    path, out = tmp_path / "f.h5", tmp_path / "out.h5"
    for _ in range(8):
        edited = bytearray(raw)
        for _ in range(random.integers(1, 9)):
            edited[random.integers(len(raw))] = random.integers(256)
        path.write_bytes(edited)
        try:
            import_hdf5(path, out, LABELS, replace=True)
        except CacheError:
            continue
        verify(out)


def test_the_child_gets_no_plugins():
    assert sandbox._SET["HDF5_PLUGIN_PRELOAD"] == "::"
