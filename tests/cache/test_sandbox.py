"""The child process that reads foreign files: what it may do, and what becomes of it."""

import errno
import os
import re
import time
from pathlib import Path

import pytest

import cache as cache_package
from cache.errors import CacheFormatError, SystemRefusedError
from cache.foreign import sandbox
from cache.foreign.sandbox import run_limited

HOSTILE = """
import os, resource, signal, socket, sys, time
import cache
from cache.errors import CacheFormatError

AT_START = {"cwd": os.listdir("."), "env": sorted(os.environ), "path": sys.path[0]}

def loop(fd):
    while True: pass

def sleep(fd):
    time.sleep(60)

def quiet_sleep(fd):
    os.close(1); time.sleep(60)

def allocate(fd):
    return len(bytearray(3 << 30))

def nested(fd):
    return nested(fd)

def crash(fd):
    os.kill(os.getpid(), signal.SIGSEGV)

def fail(fd):
    raise ZeroDivisionError

def large(fd):
    return "x" * (5 << 20)

def fork(fd):
    if os.fork() == 0:
        time.sleep(60)

def garbage(fd):
    os.write(1, b'{"ok": 1}{')

def deep(fd):
    os.write(1, b'{"ok":' + b"[" * 300000); os._exit(0)

def refuse(fd):
    raise CacheFormatError("bad \\x1b[31m" + "y" * 5000)

def both(fd):
    os.write(1, b'{"ok": 1, "refused": 2}'); os._exit(0)

def error_of(call):
    try:
        call()
    except OSError as error:
        return error.errno
    return 0

def look(fd, place):
    names = ("AS", "CPU", "FSIZE", "CORE", "NPROC", "NOFILE")
    return {
        **AT_START,
        "ours": cache.__file__,
        "read": os.pread(fd, 100, 0).decode(),
        "limits": {n: resource.getrlimit(getattr(resource, "RLIMIT_" + n))[1] for n in names},
        "open": error_of(lambda: open(place + "/file")),
        "write": error_of(lambda: open(place + "/made", "w")),
        "socket": error_of(socket.socket),
        "pipe": error_of(os.pipe),
        "exec": error_of(lambda: os.posix_spawn("/bin/true", ["true"], {}) and os.wait()),
        "made": os.path.exists(place + "/made"),
    }
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a function of the hostile module in the child, on a small file."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "hostile.py").write_text(HOSTILE)
    path = tmp_path / "file"
    path.write_text("seven h")
    monkeypatch.setattr(sandbox, "_PATHS", (*sandbox._PATHS, str(folder)))

    def run(function: str, **arguments):
        monkeypatch.setitem(sandbox.TASKS, "hostile", ("hostile", function))
        fd = os.open(path, os.O_RDONLY)
        try:
            return run_limited("hostile", path, fd, arguments)
        finally:
            os.close(fd)

    return run


def test_a_child_can_do_nothing_but_read_its_file(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = run("look", place=str(tmp_path))
    assert found["read"] == "seven h"
    assert found["ours"] == cache_package.__file__
    assert found["cwd"] == []
    assert "HF_TOKEN" not in found["env"] and "HOME" not in found["env"]
    assert "HDF5_PLUGIN_PRELOAD" in found["env"] and sandbox._SET["HDF5_PLUGIN_PRELOAD"] == "::"
    assert str(tmp_path) not in found["path"]
    assert found["limits"] == {**sandbox.LIMITS, "NOFILE": 3}
    assert found["open"] == found["write"] == found["socket"] == found["pipe"] == errno.EMFILE
    assert not (tmp_path / "made").exists() and not found["made"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("allocate", r"file: reading it needs more memory than a foreign file is given"),
        ("nested", r"file: it is nested too deeply"),
        ("crash", r"reading it crashed the process that tried \(SIGSEGV\). Nothing was imported"),
        ("fail", r"file: the process that read it failed"),
        ("large", r"gives far more than such a file holds"),
        ("garbage", r"gave no sound answer"),
        ("deep", r"gave no sound answer"),
        ("both", r"gave no sound answer"),
        ("refuse", r"file: bad \ufffd\[31my+$"),
    ],
)
def test_whatever_happens_to_it_is_one_line(run, function, message):
    with pytest.raises(CacheFormatError, match=message) as caught:
        run(function)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_an_endless_loop_is_stopped(run, monkeypatch):
    monkeypatch.setitem(sandbox.LIMITS, "CPU", 1)
    with pytest.raises(CacheFormatError, match="more than 1 s of processor time"):
        run("loop")


def _alive(group: int) -> list[str]:
    """Processes of a process group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(own) == group and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("function", ["sleep", "quiet_sleep", "fork"])
def test_nothing_outlives_the_clock(run, monkeypatch, function):
    started = []
    start = sandbox._start

    def noted(*args):
        started.append(start(*args))
        return started[0]

    monkeypatch.setattr(sandbox, "_start", noted)
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    begin = time.monotonic()
    with pytest.raises(CacheFormatError, match=r"takes more than|was killed|failed"):
        run(function)
    assert time.monotonic() - begin < 10
    deadline = time.monotonic() + 5
    while _alive(started[0].pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _alive(started[0].pid) == []


def test_only_listed_tasks_run(tmp_path):
    assert set(sandbox.TASKS) == {"tensor", "hdf5"}
    with pytest.raises(KeyError):
        run_limited("os.system", tmp_path, 0)


def test_a_machine_that_cannot_start_the_child_is_not_the_file(run, monkeypatch):
    monkeypatch.setitem(sandbox.LIMITS, "AS", 1 << 20)
    with pytest.raises(SystemRefusedError, match=r"did not start; found exit status .*ulimit"):
        run("look", place="")


def test_no_fd_is_left_open(run, tmp_path):
    before = len(list(Path("/dev/fd").iterdir()))
    run("look", place=str(tmp_path))
    with pytest.raises(CacheFormatError, match=re.escape("(SIGSEGV)")):
        run("crash")
    assert len(list(Path("/dev/fd").iterdir())) == before
