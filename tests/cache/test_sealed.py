"""Damaged, foreign and hostile files: every one is refused, none is parsed by HDF5."""

import json
import os
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from cache import KnowledgeCache, verify
from cache.errors import CacheError, CacheFormatError, StorageError
from cache.header import PREFIX
from cache.sealed import SealedFile, is_sealed

LIES = "the HDF5 structure is not the one its header describes"


def test_every_flipped_byte_is_refused(make, tmp_path):
    path = tmp_path / "k.h5"
    make.tiny_cache_at(path)
    size, accepted = path.stat().st_size, []
    with path.open("r+b", buffering=0) as file:
        for at in range(size):
            old = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([old[0] ^ (1 << at % 8)]), at)
            try:
                with SealedFile(path) as sealed:
                    sealed.verify_bytes()
                accepted.append(at)
            except CacheError:
                pass
            os.pwrite(file.fileno(), old, at)
    assert size > 8000
    assert accepted == []
    verify(path)


def test_every_truncation_is_refused(make, tmp_path):
    path = tmp_path / "k.h5"
    make.tiny_cache_at(path)
    whole = path.read_bytes()
    for length in range(len(whole) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(CacheFormatError):
            SealedFile(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(
        CacheFormatError, match=f"another size than when sealed; found {len(whole) + 1}"
    ):
        SealedFile(path)
    path.write_bytes(whole)
    verify(path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (0, "not a knowledge cache"),
        (7, "an unknown version, or a damaged one"),
        (14, "the length of the header is impossible"),
        (PREFIX + 30, "the header is damaged: its digest differs"),
    ],
)
def test_damage_is_named(sealed, part, message):
    raw = bytearray(sealed.read_bytes())
    raw[part] ^= 0x55
    sealed.write_bytes(raw)
    with pytest.raises(CacheFormatError, match=f"^{sealed}: .*{message}"):
        KnowledgeCache.open(sealed)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_damage_in_data_is_found_at_first_touch_and_named(make, sealed):
    flip(sealed, make.body_of(sealed)["layout"]["layers__values"] + 3)
    with KnowledgeCache.open(sealed) as found:
        found.blocks["embedded"].array("ig")
        with pytest.raises(
            CacheFormatError, match="dataset layers__values is damaged: its digest differs"
        ):
            found.blocks["layers"].array("ig")
    with pytest.raises(CacheFormatError, match="dataset layers__values is damaged"):
        verify(sealed)


def test_damage_in_padding_and_structure_is_found(make, sealed):
    body, whole = make.body_of(sealed), sealed.read_bytes()
    flip(sealed, body["userblock"] - 1)
    with pytest.raises(CacheFormatError, match="the padding after the header is not zero"):
        verify(sealed)
    sealed.write_bytes(whole)
    flip(sealed, body["userblock"] + 20)
    with pytest.raises(CacheFormatError, match="the HDF5 structure is damaged: its digest differs"):
        verify(sealed)


def graft(make, sealed: Path, change) -> None:
    """Changes the HDF5 part with an HDF5 library and makes every digest right."""
    import hashlib

    body = make.body_of(sealed)
    change(sealed)
    raw = sealed.read_bytes()
    spans = sorted(
        (
            body["layout"][n],
            body["layout"][n]
            + int(np.prod(d["shape"])) * {"u1": 1, "i8": 8, "f2": 2, "f4": 4}[d["dtype"]],
        )
        for n, d in body["content"]["datasets"].items()
        if body["layout"][n]
    )
    rest, at = hashlib.sha256(), body["userblock"]
    for first, last in [*spans, (len(raw), len(raw))]:
        rest.update(raw[at:first])
        at = last

    def edit(found):
        found["rest"], found["size"] = rest.hexdigest(), len(raw)

    make.reforge(sealed, edit)


def _attribute(path):
    with h5py.File(path, "r+") as file:
        file.attrs["note"] = 1


def _hidden(path):
    with h5py.File(path, "r+") as file:
        file["hidden"] = np.zeros(3)


def _external_link(path):
    with h5py.File(path, "r+") as file:
        file["out"] = h5py.ExternalLink("/etc/passwd", "/")


def _soft_link(path):
    with h5py.File(path, "r+") as file:
        file["loop"] = h5py.SoftLink("/loop")


def _external_storage(path):
    with h5py.File(path, "r+") as file:
        file.create_dataset("x", (16,), "u1", external=[("/etc/passwd", 0, 16)])


def _compressed(path):
    with h5py.File(path, "r+") as file:
        file.create_dataset("packed", data=np.zeros(1000, "u1"), compression="gzip")


def _swapped(path):
    with h5py.File(path, "r+") as file:
        file.move("layers__keys", "x")
        file.move("layers__digests", "layers__keys")
        file.move("x", "layers__digests")


@pytest.mark.parametrize(
    "change",
    [_attribute, _hidden, _external_link, _soft_link, _external_storage, _compressed, _swapped],
)
def test_an_hdf5_part_that_hides_something_is_refused(make, sealed, change):
    graft(make, sealed, change)
    KnowledgeCache.open(sealed).close()  # the lazy reader never looks at it
    with SealedFile(sealed) as opened:
        opened.verify_bytes()  # and every digest is right
        with pytest.raises(CacheFormatError, match=LIES):
            opened.verify_structure()


def test_an_untouched_file_survives_the_same_treatment(make, sealed):
    graft(make, sealed, lambda path: None)
    verify(sealed)


def test_foreign_hdf5_files_are_refused(tmp_path):
    plain, linked, padded = (tmp_path / name for name in ("plain.h5", "linked.h5", "padded.h5"))
    with h5py.File(plain, "w") as file:
        file["layers__values"] = np.zeros((2, 3))
    with h5py.File(linked, "w") as file:
        file["recipe"] = h5py.ExternalLink(str(plain), "/")
    with h5py.File(padded, "w", userblock_size=4096) as file:
        file["x"] = np.zeros(3)
    for path in (plain, linked, padded):
        for reader in (KnowledgeCache.open, verify):
            with pytest.raises(CacheFormatError, match=f"^{path}: not a knowledge cache"):
                reader(path)
        assert not is_sealed(path)


def test_reading_opens_one_file_and_no_hdf5_library_parses_it(make, sealed):
    opened = []

    def hook(event, arguments):
        if event == "open" and watching:
            opened.append(os.fspath(arguments[0]) if not isinstance(arguments[0], int) else "fd")

    watching = False
    sys.addaudithook(hook)
    verify(sealed)  # whatever is imported is imported now
    watching = True
    verify(sealed)
    with KnowledgeCache.open(sealed) as found:
        found.blocks["layers"].array("ig")
    watching = False
    assert set(opened) == {str(sealed)}


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_at_once(tmp_path):
    fifo, start = tmp_path / "fifo", time.monotonic()
    os.mkfifo(fifo)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, message in (
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "absent.h5", "there is no such file. Check the path."),
        (fifo / "under", "there is no such file"),
    ):
        with pytest.raises(CacheFormatError, match=f"^{path}: {message}"):
            KnowledgeCache.open(path)
        assert not is_sealed(path)
    with pytest.raises(StorageError, match="symbolic links"):
        KnowledgeCache.open(loop)
    with pytest.raises(StorageError, match="the name is too long"):
        KnowledgeCache.open(tmp_path / ("x" * 300))
    assert time.monotonic() - start < 2


def test_no_permission_is_one_line(sealed, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cache.sealed.os.open", refuse)
    with pytest.raises(StorageError, match=f"^{sealed}: no permission"):
        KnowledgeCache.open(sealed)


def test_a_file_that_shrinks_under_a_reader_is_refused(sealed):
    with SealedFile(sealed) as opened:
        os.truncate(sealed, 5000)
        with pytest.raises(CacheFormatError, match="the file changed its size while it was open"):
            opened.array("recipe")


def test_an_empty_and_a_short_file(tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(b"")
    with pytest.raises(CacheFormatError, match="not a knowledge cache"):
        KnowledgeCache.open(path)
    path.write_bytes(b"VADEMC\0\x01" + (500).to_bytes(8, "little") + bytes(32) + b"{}")
    with pytest.raises(CacheFormatError, match="the file ends inside its header"):
        KnowledgeCache.open(path)
    path.write_bytes(b"VADEMC\0\x01")
    with pytest.raises(CacheFormatError, match="an unknown version, or a damaged one"):
        KnowledgeCache.open(path)


def test_a_large_header_needs_a_larger_user_block(make, tmp_path):
    recipe = {f"field{n}": "ab" * 40 for n in range(700)}
    make.cache_at(tmp_path / "k.h5", recipe=recipe)
    body = make.body_of(tmp_path / "k.h5")
    assert body["userblock"] == 131072
    assert len(json.dumps(body)) > 65536
    with KnowledgeCache.open(tmp_path / "k.h5", verify="full") as found:
        assert found.recipe == recipe
