"""Tensors in `.pth` files are read as data: real ones come back, hostile ones run nothing."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cache import KnowledgeCache, verify
from cache.errors import (
    CacheFormatError,
    CacheMismatchError,
    MissingKnowledgeError,
    RecipeError,
    StorageError,
    ValueRefusedError,
)
from cache.foreign.export_cilmp import pickle_of, pth_bytes
from cache.foreign.import_cilmp import import_cilmp
from cache.foreign.importing import Labels, Place, read_class_table, slug
from cache.foreign.legacy_pth import read_tensor

torch = pytest.importorskip("torch")
LABELS = Labels("toy", "layers", modality="endoscopy")


def place_of(path: Path) -> dict:
    """What the child would say, without the child."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_tensor(fd)
    finally:
        os.close(fd)


def read(path: Path) -> np.ndarray:
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in place_of(path).items()}
    with path.open("rb") as file:
        place = Place.checked(said, path.stat().st_size, path)
        return place.read(file.fileno(), path)


def refused(path: Path, match: str) -> None:
    with pytest.raises(CacheFormatError, match=match) as caught:
        place_of(path)
    assert "\n" not in str(caught.value)


def archive(path: Path, members: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, raw in members.items():
            file.writestr(name, raw)
    return path


def pth(path: Path, pickle: bytes, storage: bytes = bytes(4 * 6), **more: bytes) -> Path:
    """A file with this pickle and a storage of six float32."""
    return archive(path, {"archive/data.pkl": pickle, "archive/data/0": storage, **more})


GOOD = pickle_of((2, 3), "f4")


@pytest.fixture(scope="module")
def tensors() -> dict:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 7, 9, generator=generator)
    return {
        "contiguous": base[0],
        "transposed": base[1].T,
        "offset": base[2][2:],
        "columns": base[3][:, 1::3],
        "slice": base[:, 3, 2:5],
        "one row": base[4][:1],
        "needs gradient": base[5].clone().requires_grad_(),
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_real_files_come_back_bit_for_bit(tmp_path, tensors, dtype):
    for name, tensor in tensors.items():
        for protocol in (2, 3, 4, 5):
            made = tensor.detach().to(getattr(torch, dtype)).requires_grad_(tensor.requires_grad)
            path = tmp_path / f"{name}.pth"
            torch.save(made, path, pickle_protocol=protocol)
            found = read(path)
            wanted = made.detach()
            wanted = wanted if dtype == "float16" else wanted.float()
            assert found.dtype == wanted.numpy().dtype
            assert found.tobytes() == wanted.contiguous().numpy().tobytes(), (name, protocol)


def test_a_view_keeps_its_strides_in_the_file(tmp_path):
    base = torch.arange(42.0).reshape(6, 7)
    torch.save(base.T[2:], tmp_path / "t.pth")
    assert place_of(tmp_path / "t.pth")["strides"] == (1, 7)
    np.testing.assert_array_equal(read(tmp_path / "t.pth"), base.T[2:].numpy())


def folder_of(tmp_path: Path, tensors: dict) -> Path:
    folder = tmp_path / "llm_representations" / "kvasir"
    folder.mkdir(parents=True)
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pth")
    return folder


def test_a_folder_becomes_a_sealed_cache(tmp_path):
    names = ["normal cecum", "polyps", "Dyed_lifted-Polyps"]
    tensors = {name: torch.randn(4, 10) for name in names}
    folder = folder_of(tmp_path, tensors)
    (folder / "metadata.json").write_text("{}")
    out = tmp_path / "k.h5"
    report = import_cilmp(folder, out, LABELS)
    verify(out)
    assert report.ignored == ("metadata.json",)
    assert (report.layers, report.width, report.dtype) == ((1, 2, 3, 4), 10, "f4")
    assert "licence of the model: unknown" in report.describe()
    assert not (tmp_path / "k.h5.parts").exists()
    with KnowledgeCache.open(out, expect=report.content_id) as found:
        assert {c.id: c.name for c in found.classes} == {slug(n): n for n in names}
        assert {c.modality for c in found.classes} == {"endoscopy"}
        block = found.blocks["layers"]
        for name in names:
            np.testing.assert_array_equal(block.array(slug(name))[0], tensors[name].numpy())
        assert dict(block.spec) == {"from": "cilmp", "model": "unknown", "source": "imported"}
        assert set(found.recipe["imported"]["files"]) == {f"{name}.pth" for name in names}
        assert found.provenance["model_licence"] == "unknown"
        assert str(tmp_path) not in str([found.recipe, found.provenance])
    again = import_cilmp(folder, out, LABELS)
    assert again.content_id == report.content_id


def test_what_the_user_says_is_recorded(tmp_path):
    folder = folder_of(tmp_path, {"a": torch.randn(3, 4), "b": torch.randn(3, 4)})
    table = tmp_path / "classes.yaml"
    table.write_text("first: a\nb: the second\n")
    labels = Labels(
        "toy", "states", licence="llama3", model="meta-llama/Meta-Llama-3-8B", first_layer=0
    )
    report = import_cilmp(folder, tmp_path / "k.h5", labels, classes=read_class_table(table))
    assert report.classes == {"b": "the second", "first": "a"}
    assert report.layers == (0, 1, 2)
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        assert found.provenance["model_licence"] == "llama3"
        assert found.blocks["states"].spec["model"] == "meta-llama/Meta-Llama-3-8B"


def test_a_table_of_classes_chooses_and_is_complete(tmp_path):
    folder = folder_of(tmp_path, {"a": torch.randn(3, 4), "b": torch.randn(3, 4)})
    report = import_cilmp(folder, tmp_path / "k.h5", LABELS, classes={"a": "a"})
    assert report.ignored == ("b.pth",)
    with pytest.raises(MissingKnowledgeError, match=r"class 'c' \(see\) has no files.*see.pth"):
        import_cilmp(folder, tmp_path / "l.h5", LABELS, classes={"c": "see"})
    for text in ("- a", "a: 1", "{}"):
        (tmp_path / "t.yaml").write_text(text)
        with pytest.raises(RecipeError, match=r"lines of the form `id: name`"):
            read_class_table(tmp_path / "t.yaml")


def test_ids_are_made_as_data_sets_make_them():
    declaration = pytest.importorskip("prompt_tune.data.declaration")
    for name in ("Normal_Cecum", "Ångström  x", "a.b-", "z-line (dyed)", "日本"):
        assert slug(name) == declaration.slug(name)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"a": (3, 4), "b": (4, 4)}, CacheFormatError, r"class 'b': another shape.*\[3, 4\]"),
        ({"a": (3, 4), "b": (3, 5)}, CacheFormatError, r"class 'b': another shape"),
        ({"a": (3, 1, 4)}, CacheFormatError, r"a\.pth: .*found \[3, 1, 4\], wanted \[layers"),
        ({"a": (5000, 1)}, CacheFormatError, r"more layers than any model has; found 5000"),
        ({"a": (4,)}, CacheFormatError, r"tensor of layers and width"),
        ({"a b": (3, 4), "a-b": (3, 4)}, ValueRefusedError, r"class stands twice; found a-b"),
        ({"日本": (3, 4)}, ValueRefusedError, r"no class id can be made.*Give a table"),
        ({}, CacheFormatError, r"no file is called <class>\.pth"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, tensors, error, message):
    folder = folder_of(tmp_path, {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(error, match=message):
        import_cilmp(folder, tmp_path / "k.h5", LABELS)
    assert not (tmp_path / "k.h5").exists()


def test_values_are_checked(tmp_path):
    tensor = torch.randn(3, 4)
    tensor[1, 2] = float("nan")
    folder = folder_of(tmp_path, {"polyps": tensor})
    with pytest.raises(ValueRefusedError, match=r"class polyps, item 0, layer 2.*not finite"):
        import_cilmp(folder, tmp_path / "k.h5", LABELS)
    assert not list(tmp_path.glob("k.h5*"))
    torch.save(torch.randn(3, 4, dtype=torch.float64), folder / "polyps.pth")
    with pytest.raises(ValueRefusedError, match=r"polyps.pth: float64 values that float32 cannot"):
        import_cilmp(folder, tmp_path / "k.h5", LABELS)
    with pytest.raises(StorageError, match="no such folder"):
        import_cilmp(tmp_path / "nowhere", tmp_path / "k.h5", LABELS)


def test_another_cache_is_replaced_only_on_purpose(tmp_path):
    folder = folder_of(tmp_path, {"a": torch.zeros(3, 4)})
    first = import_cilmp(folder, tmp_path / "k.h5", LABELS).content_id
    torch.save(torch.ones(3, 4), folder / "a.pth")
    with pytest.raises(CacheMismatchError, match=r"another knowledge cache .* pass --replace"):
        import_cilmp(folder, tmp_path / "k.h5", LABELS)
    assert import_cilmp(folder, tmp_path / "k.h5", LABELS, replace=True).content_id != first


# hostile pickles

OS = b"cos\nsystem\n"
SHELL = b"X\x10\x00\x00\x00touch made-by-it"
STORAGE = GOOD[GOOD.index(b"((X") + 1 : GOOD.index(b"K\x00K")]  # MARK ... BINPERSID
PICKLES = {
    "REDUCE": (b"\x80\x02" + OS + SHELL + b"\x85R.", r"names something it may not.*os\.system"),
    "builtins": (b"\x80\x02cbuiltins\neval\n" + SHELL + b"\x85R.", r"builtins\.eval"),
    "STACK_GLOBAL": (
        b"\x80\x04\x8c\x02os\x8c\x06system\x93" + SHELL + b"\x85R.",
        r"found 'os\.system'",
    ),
    "dotted": (b"\x80\x04\x8c\x0btorch._util\x8c\x14s._rebuild_tensor_v2\x93.", r"may not; found"),
    "INST": (b"\x80\x02(" + SHELL + b"ios\nsystem\n.", r"opcode INST"),
    "OBJ": (b"\x80\x02(" + OS + SHELL + b"o.", r"os\.system"),
    "OBJ of ours": (b"\x80\x02(ctorch\nFloatStorage\no.", r"opcode OBJ"),
    "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", r"opcode NEWOBJ"),
    "NEWOBJ_EX": (b"\x80\x04ccollections\nOrderedDict\n))\x92.", r"opcode NEWOBJ_EX"),
    "BUILD": (b"\x80\x02ccollections\nOrderedDict\n)R)b.", r"opcode BUILD"),
    "EXT1": (b"\x80\x02\x82\x01.", r"opcode EXT1"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", r"opcode EXT4"),
    "PERSID": (b"\x80\x02Pstorage\n.", r"opcode PERSID"),
    "a list": (b"\x80\x02]q\x00.", r"opcode EMPTY_LIST.*Save the bare tensor"),
    "a table": (b"\x80\x02}q\x00.", r"opcode EMPTY_DICT.*Save the bare tensor"),
    "a buffer": (b"\x80\x05\x97.", r"opcode NEXT_BUFFER"),
    "an unknown opcode": (b"\x80\x02\xff.", r"opcode 0xff"),
    "a long integer": (b"\x80\x02\x8a\x08" + b"\x7f" * 8 + b".", r"opcode LONG1"),
    "a parameter": (b"\x80\x02ctorch._utils\n_rebuild_parameter\n.", r"_rebuild_parameter"),
    "a call of a storage": (b"\x80\x02ctorch\nFloatStorage\n)R.", r"calls a name with what"),
    "hooks with items": (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", r"calls a name with"),
    "a call of a number": (b"\x80\x02K\x01)R.", r"calls something that is no name"),
    "no arguments": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", r"in a way torch does not"),
    "an empty stack": (b"\x80\x02R.", r"takes from an empty stack"),
    "below the mark": (b"\x80\x02K\x01(\x85.", r"takes from an empty stack"),
    "no mark": (b"\x80\x02t.", r"closes what it did not open"),
    "a huge memo": (b"\x80\x02K\x01r\xff\xff\xff\xff.", r"remembers what is not there"),
    "a mark in the memo": (b"\x80\x02(q\x00.", r"remembers what is not there"),
    "nothing to recall": (b"\x80\x02h\x07.", r"recalls what it did not"),
    "deep tuples": (b"\x80\x02K\x01" + b"\x85" * 4000 + b".", r"not hold a bare tensor"),
    "deep marks": (b"\x80\x02" + b"(" * 60000 + b".", r"more steps than a bare tensor"),
    "a long text": (b"\x80\x02X\xff\xff\xff\x7f.", r"text longer than"),
    "a cut text": (b"\x80\x02X\x20\x00\x00\x00a.", r"ends in the middle"),
    "a name without end": (b"\x80\x02c" + b"a" * 300, r"a name without an end"),
    "no stop": (GOOD[:-1], r"ends in the middle"),
    "more behind": (GOOD + b".", r"bytes follow the end"),
    "a late protocol": (b"K\x01\x80\x02.", r"unknown protocol"),
    "protocol 9": (b"\x80\x09.", r"unknown protocol"),
    "a frame too long": (b"\x80\x04\x95" + b"\xff" * 8 + b".", r"ends in the middle"),
    "two results": (GOOD[:-1] + b"K\x01.", r"not hold a bare tensor"),
    "only a name": (b"\x80\x02ctorch\nFloatStorage\n.", r"not hold a bare tensor"),
    "an empty pickle": (b"", r"ends in the middle"),
    "a text as storage": (b"\x80\x02X\x01\x00\x00\x000Q.", r"something that is no storage"),
    "another storage": (GOOD.replace(b"FloatStorage", b"LongStorage"), r"torch\.LongStorage"),
    "a storage of no type": (
        GOOD.replace(b"ctorch\nFloatStorage\nq\x02", b"ccollections\nOrderedDict\nq\x02"),
        r"storage of an unknown type",
    ),
    "a path as key": (
        GOOD.replace(b"X\x01\x00\x00\x000q\x03", b"X\x05\x00\x00\x00../..q\x03"),
        r"in a way torch does not",
    ),
    "another key": (
        GOOD.replace(b"X\x01\x00\x00\x000q\x03", b"X\x01\x00\x00\x007q\x03"),
        r"does not hold the one storage.*found data/0",
    ),
    "an odd device": (GOOD.replace(b"cpuq", b"/..q"), r"in a way torch does not"),
    "negative strides": (
        GOOD.replace(b"K\x03K\x01\x86q\x07", b"J\xfd\xff\xff\xffK\x01\x86q\x07"),
        r"are no counts",
    ),
    "a negative offset": (GOOD.replace(b"QK\x00K", b"QJ\xff\xff\xff\xffK"), r"are no counts"),
    "a true offset": (GOOD.replace(b"QK\x00K", b"Q\x88K"), r"are no counts"),
    "a beginning beyond": (GOOD.replace(b"QK\x00K", b"QK\x01K"), r"beyond its storage"),
    "rows beyond": (GOOD.replace(b"QK\x00K\x02", b"QK\x00K\x03"), r"beyond its storage"),
    "no rows": (GOOD.replace(b"QK\x00K\x02", b"QK\x00K\x00"), r"the tensor is empty"),
    "stride zero": (
        GOOD.replace(b"QK\x00K\x02", b"QK\x00M\xff\xff").replace(
            b"\x86q\x06K\x03", b"\x86q\x06K\x00"
        ),
        r"share their place",
    ),
    "overlapping rows": (GOOD.replace(b"\x86q\x06K\x03", b"\x86q\x06K\x02"), r"share their place"),
    "three strides": (
        GOOD.replace(b"K\x03K\x01\x86q\x07", b"K\x03K\x03K\x01\x87q\x07"),
        r"as many",
    ),
    "a storage too short": (GOOD.replace(b"cpuq\x04K\x06", b"cpuq\x04K\x07"), r"another size than"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles_are_refused_by_name(tmp_path, monkeypatch, name):
    pickle, message = PICKLES[name]
    monkeypatch.chdir(tmp_path)
    assert pickle != GOOD
    refused(pth(tmp_path / "x.pth", pickle), message)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_the_unchanged_pickle_is_read(tmp_path):
    numbers = np.arange(6, dtype="<f4").reshape(2, 3)
    path = pth(tmp_path / "x.pth", GOOD, numbers.tobytes())
    np.testing.assert_array_equal(read(path), numbers)


@pytest.mark.parametrize("name", ["REDUCE", "STACK_GLOBAL", "INST", "OBJ"])
def test_these_files_do_run_something_elsewhere(tmp_path, monkeypatch, name):
    """The canary of the tests above sings when such a file is unpickled."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "toy"
    folder.mkdir()
    version = {"archive/version": b"3\n", "archive/byteorder": b"little"}
    path = pth(folder / "x.pth", PICKLES[name][0], **version)
    with pytest.raises(CacheFormatError, match=r"x\.pth: the pickle"):
        import_cilmp(folder, tmp_path / "k.h5", LABELS)
    assert not (tmp_path / "made-by-it").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "made-by-it").exists()


# hostile archives

SIX = bytes(4 * 6)
WHOLE = {"archive/data.pkl": GOOD, "archive/data/0": SIX}
ARCHIVES = {
    "path traversal": ({**WHOLE, "archive/../../x": b""}, r"a member that a bare tensor does not"),
    "absolute": ({**WHOLE, "/etc/passwd": b""}, r"do not share one folder"),
    "dots": ({"../data.pkl": GOOD, "../data/0": SIX}, r"do not share one folder"),
    "no folder": ({"data.pkl": GOOD, "data/0": SIX}, r"do not share one folder"),
    "two folders": ({**WHOLE, "other/version": b"3"}, r"do not share one folder"),
    "a script": ({**WHOLE, "archive/code/x.py": b""}, r"a member that a bare tensor does not"),
    "constants": ({**WHOLE, "archive/constants.pkl": b""}, r"a member that a bare tensor does not"),
    "two storages": ({**WHOLE, "archive/data/1": SIX}, r"does not hold the one storage"),
    "no storage": ({"archive/data.pkl": GOOD}, r"does not hold the one storage.*none"),
    "no pickle": ({"archive/data/0": SIX}, r"no data\.pkl"),
    "big-endian": ({**WHOLE, "archive/byteorder": b"big"}, r"not little-endian"),
    "a large pickle": ({"archive/data.pkl": GOOD + bytes(1 << 17)}, r"a member .* too large"),
    "many members": (
        {**WHOLE, **{f"archive/data/{i}": b"" for i in range(1, 40)}},
        r"more members than",
    ),
    "empty": ({}, r"not a file that torch.save wrote"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_hostile_archives_are_refused(tmp_path, name):
    members, message = ARCHIVES[name]
    refused(archive(tmp_path / "x.pth", members), message)


def test_compressed_members_are_refused(tmp_path):
    bomb = {"archive/data.pkl": GOOD, "archive/data/0": bytes(50 << 20)}
    path = archive(tmp_path / "x.pth", bomb, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    refused(path, r"compressed or encrypted; found 'data.pkl'")
    raw = bytearray(archive(path, WHOLE).read_bytes())
    raw[raw.rindex(b"PK\x01\x02") + 10] = zipfile.ZIP_DEFLATED  # of the storage, sizes equal
    path.write_bytes(raw)
    refused(path, r"compressed or encrypted; found 'data/0'")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as file:
        for name, raw in [*WHOLE.items(), ("archive/data/0", SIX)]:
            file.writestr(name, raw)
    refused(path, r"or twice; found 'archive/data/0'")


def test_damaged_archives_are_refused(tmp_path):
    torch.save(torch.randn(3, 4), tmp_path / "good.pth")
    raw = (tmp_path / "good.pth").read_bytes()
    path = tmp_path / "x.pth"
    storage = place_of(tmp_path / "good.pth")["first"]
    directory = raw.index(b"PK\x01\x02")
    where = raw.index(b"good/data/0", directory) - 46  # of the storage in the directory
    for edit, message in {
        "prefix": (b"#!/bin/sh\n" + raw, r"not a file that torch.save wrote"),
        "polyglot": (raw[:30] + b"x" * 30 + raw[30:], r"damaged|overlap|no header"),
        "flipped": (raw[:storage] + b"\xff" + raw[storage + 1 :], r"damaged \(BadZipFile\)"),
        "cut": (raw[:-30], r"damaged"),
        "encrypted": (
            raw[: where + 8] + b"\x01" + raw[where + 9 :],
            r"compressed or encrypted|damaged",
        ),
        "empty": (b"", r"not a file"),
        "text": (b"hello", r"not a file that torch.save wrote"),
    }.values():
        path.write_bytes(edit)
        refused(path, message)


def test_a_member_inside_another_is_refused(tmp_path):
    path = archive(tmp_path / "x.pth", WHOLE)
    raw = path.read_bytes()
    inner = raw[raw.index(b"PK\x03\x04", 4) : raw.index(b"PK\x01\x02")]  # header and numbers
    members = {**WHOLE, "archive/version": inner}
    raw = bytearray(archive(path, members).read_bytes())
    place_of(path)
    entry = raw.index(b"archive/data/0", raw.index(b"PK\x01\x02")) - 46
    raw[entry + 42 : entry + 46] = raw.rindex(inner).to_bytes(4, "little")
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as sound:
        assert sound.testzip() is None
    refused(path, r"members of the archive overlap")


def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path):
    """A checksum covers data and pickle; the rest may hold bytes that mean nothing here."""
    raw = pth_bytes(np.arange(6, dtype="<f4").reshape(2, 3))
    path, refusals = tmp_path / "x.pth", 0
    for position in range(0, len(raw), 3):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            found = read(path)
        except CacheFormatError:
            refusals += 1
            continue
        np.testing.assert_array_equal(found, np.arange(6).reshape(2, 3))
    assert refusals > len(raw) // 9


def test_the_old_format_is_refused_by_name(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(torch.zeros(2, 3), path, _use_new_zipfile_serialization=False)
    refused(path, r"torch wrote before 1\.6.*save it again")


def test_other_things_than_bare_tensors_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    for value, message in [
        ([torch.zeros(2)], "EMPTY_LIST"),
        ({"x": torch.zeros(2)}, "EMPTY_DICT"),
        (torch.nn.Parameter(torch.zeros(2)), "_rebuild_parameter"),
        (torch.zeros(2, dtype=torch.int64), r"torch\.LongStorage"),
        (torch.zeros(1, 3).expand(5, 3), "share their place"),
        (torch.zeros(0, 3), "empty"),
        (torch.zeros(2, dtype=torch.complex64), "ComplexFloatStorage"),
        (torch.tensor([1 + 1j]).conj().imag, "opcode EMPTY_DICT|may not"),
    ]:
        torch.save(value, path)
        refused(path, message)


def test_what_a_child_says_is_checked_again(tmp_path):
    good = {"dtype": "Float", "shape": [2, 3], "strides": [3, 1], "first": 10, "nbytes": 24}
    Place.checked(good, 34, tmp_path)
    for change in (
        {"dtype": "Long"},
        {"shape": [2, 4]},
        {"shape": [2]},
        {"shape": "23"},
        {"shape": [0, 3]},
        {"strides": [3, -1]},
        {"first": 11},
        {"first": -1},
        {"first": True},
        {"nbytes": 25},
        {"more": 1},
    ):
        with pytest.raises(CacheFormatError, match="gave no sound answer"):
            Place.checked({**good, **change}, 34, tmp_path)
    large = {**good, "shape": [1 << 15, 1 << 14], "strides": [1 << 14, 1], "nbytes": 1 << 31}
    with pytest.raises(
        CacheFormatError, match=r"too large for .* one class; found 2147483648 bytes"
    ):
        Place.checked(large, 1 << 40, tmp_path)
    (tmp_path / "f").write_bytes(bytes(34))
    with (tmp_path / "f").open("rb") as file:
        place = Place.checked({**good, "strides": [1000, 1]}, 34, tmp_path)
        with pytest.raises(CacheFormatError, match="gave no sound answer"):
            place.read(file.fileno(), tmp_path)
        with pytest.raises(CacheFormatError, match="changed while it was read"):
            Place.checked(good, 100, tmp_path / "f").__class__(
                "Float", (2, 3), (3, 1), 20, 24
            ).read(file.fileno(), tmp_path / "f")


def test_fifos_and_folders_are_not_waited_for(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    os.mkfifo(folder / "a.pth")
    with pytest.raises(CacheFormatError, match=r"a\.pth: not a regular file"):
        import_cilmp(folder, tmp_path / "k.h5", LABELS)
    (folder / "a.pth").unlink()
    (folder / "a.pth").mkdir()
    with pytest.raises(CacheFormatError, match=r"a\.pth: not a regular file"):
        import_cilmp(folder, tmp_path / "k.h5", LABELS)
