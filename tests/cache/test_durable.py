"""Files that are there whole or not at all."""

import errno
import os
import time
from pathlib import Path

import pytest

import cache.durable
from cache.durable import TEMP, drafting, free_space, sweep, write_atomic, write_json_atomic
from cache.errors import StorageError

SOURCE = Path(cache.durable.__file__).parent


def test_a_small_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "run.json"
    assert write_json_atomic(path, {"b": 0.5, "a": [1]})
    assert path.read_bytes() == b'{"a":[1],"b":"0.5"}\n'
    assert write_atomic(path, b"x" * 100_000)
    assert path.read_bytes() == b"x" * 100_000
    assert not write_atomic(path, b"y", replace=False)
    assert path.read_bytes() == b"x" * 100_000
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_colleagues_can_read_what_the_umask_allows(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "x", b"1")
        write_atomic(tmp_path / "x", b"2")
        write_atomic(tmp_path / "y", b"2", replace=False)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o666 & ~umask}


def test_order_of_the_steps(tmp_path, monkeypatch):
    steps, names = [], {}
    real = {name: getattr(os, name) for name in ("open", "pwrite", "fsync", "link", "replace")}

    def opened(path, flags, *rest):
        fd = real["open"](path, flags, *rest)
        names[fd] = "folder" if flags & os.O_DIRECTORY else "file"
        return fd

    def step(name):
        def call(first, *rest, **more):
            steps.append(f"{name} {names[first]}" if first in names else name)
            return real[name](first, *rest, **more)

        return call

    monkeypatch.setattr(os, "open", opened)
    for name in ("pwrite", "fsync", "link", "replace"):
        monkeypatch.setattr(os, name, step(name))
    write_atomic(tmp_path / "x", b"1", replace=False)
    write_atomic(tmp_path / "x", b"1")
    assert steps == [
        *("pwrite file", "fsync file", "link", "fsync folder"),
        *("pwrite file", "fsync file", "replace", "fsync folder"),
    ]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left. Free some space; what was committed is safe."),
        (errno.EDQUOT, "the quota is used up"),
        (errno.EFBIG, "the file would be larger than allowed here"),
        (errno.EACCES, "no permission. Choose another folder"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EIO, "the device failed"),
        (errno.EMFILE, "too many open files"),
        (errno.ESTALE, os.strerror(errno.ESTALE)),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, number, message, call):
    (tmp_path / "x").write_bytes(b"old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=f"^{tmp_path}: {message}"):
        write_atomic(tmp_path / "x", b"new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_short_writes_go_on_and_empty_ones_do_not_loop(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:7], at))
    write_atomic(tmp_path / "x", bytes(range(100)))
    assert (tmp_path / "x").read_bytes() == bytes(range(100))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(StorageError, match="no space left"):
        write_atomic(tmp_path / "x", b"new")


def test_real_refusals(tmp_path):
    with pytest.raises(StorageError, match=r"no such folder. Create it first."):
        write_atomic(tmp_path / "absent" / "x", b"1")
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(StorageError, match="a part of the path is not a folder"):
        write_atomic(tmp_path / "file" / "x", b"1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="is a folder"):
        write_atomic(tmp_path / "folder", b"1")
    with pytest.raises(StorageError, match="the name is too long"):
        write_atomic(tmp_path / ("x" * 300), b"1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_real_file_size_limit(tmp_path):
    child = os.fork()
    if not child:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomic(tmp_path / "x", b"1" * 5000)
        except StorageError as error:
            os._exit(7 if "larger than allowed" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_systems_without_links(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no links")

    monkeypatch.setattr(os, "link", refuse)
    assert write_atomic(tmp_path / "x", b"1", replace=False)
    assert not write_atomic(tmp_path / "x", b"2", replace=False)
    assert (tmp_path / "x").read_bytes() == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_source_package_is_no_place_for_data(tmp_path, monkeypatch):
    for path in (SOURCE / "x.json", SOURCE / "a" / "x.json", Path("cache") / "x.json"):
        monkeypatch.chdir(SOURCE.parent)
        with pytest.raises(StorageError, match="this is the source code of the program"):
            write_atomic(path, b"1")
    link = tmp_path / "link"
    link.symlink_to(SOURCE)
    with pytest.raises(StorageError, match="this is the source code of the program"):
        write_atomic(link / "x.json", b"1")


def test_an_interrupted_draft_leaves_nothing(tmp_path):
    def interrupted():
        with drafting(tmp_path) as draft:
            draft.write_at(b"1", 0)
            assert [p.name for p in tmp_path.iterdir()] == [draft.path.name]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_only_abandoned_drafts_are_swept(tmp_path):
    child = os.fork()
    if not child:
        with drafting(tmp_path):
            os._exit(0)
    os.waitpid(child, 0)
    with drafting(tmp_path) as mine:
        other = tmp_path / f"{TEMP}0123456789ab-1-aa"
        old = tmp_path / f"{TEMP}0123456789ab-1-bb"
        folder = tmp_path / f"{TEMP}folder"
        other.write_bytes(b"")
        old.write_bytes(b"")
        folder.mkdir()
        os.utime(old, (time.time() - 90000,) * 2)
        assert len(list(tmp_path.iterdir())) == 5
        assert sweep(tmp_path) == 2  # the child's, and the one a day old
        assert set(tmp_path.iterdir()) == {mine.path, other, folder}


def test_room_is_checked(tmp_path):
    free_space(tmp_path, 1000)
    with pytest.raises(
        StorageError, match=r"no space left; found [\d.]+ MB, wanted 1050000000000.0 MB"
    ):
        free_space(tmp_path, 10**18)
