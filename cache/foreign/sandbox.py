"""Reading foreign files in a child process that can do nothing else.

The child gets the file as its standard input and gives back one line of plain data. It has 2 GiB of
address space, 10 s of processor time, no environment, an empty working folder, and it may write no
file and start no process. Before it looks at the first byte it gives up opening anything at all: no
file, no socket. Whatever happens to it becomes one clear error here.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cache.durable import storage_errors
from cache.errors import CacheFormatError, SystemRefusedError
from cache.foreign.sandbox_child import READY

TASKS = {
    "tensor": ("cache.foreign.legacy_pth", "read_tensor"),
    "hdf5": ("cache.foreign.foreign_hdf5", "walk"),
}
LIMITS = {"AS": 2 << 30, "CPU": 10, "FSIZE": 0, "NPROC": 0, "CORE": 0}
SECONDS = 30.0  # on the clock, the start of Python included
LARGEST_ANSWER = 4 << 20

_HERE = Path(__file__).resolve().parent
_HOME = _HERE.parents[1]  # where the package `cache` lies
_PATHS: tuple[str, ...] = ()  # more folders with modules for the child; for tests
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # a Python may need them to start
_SET = {
    "HDF5_PLUGIN_PRELOAD": "::",  # no filter plugin is ever looked for
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_DO = "Nothing was imported; the file is damaged, hostile or of another kind."


def _refused(what: str, path: Path) -> CacheFormatError:
    return CacheFormatError(what, where=path, do=_DO)


def _start(job: Mapping[str, Any], fd: int, folder: str) -> subprocess.Popen[bytes]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    command = [sys.executable, "-I", "-B", str(_HERE / "sandbox_child.py"), json.dumps(job)]
    return subprocess.Popen(  # noqa: S603 - our own script under our own Python
        command,
        stdin=fd,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=kept | _SET,
        start_new_session=True,
    )


def _collect(pipe: int, path: Path, end: float) -> bytes:
    """Everything the child writes, within the limits."""
    raw = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            left = end - time.monotonic()
            if left <= 0 or not selector.select(left):
                raise _refused(f"reading it takes more than {SECONDS:.0f} s", path)
            piece = os.read(pipe, 1 << 16)
            if not piece:
                return bytes(raw)
            raw += piece
            if len(raw) > LARGEST_ANSWER:
                raise _refused("reading it gives far more than such a file holds", path)


def _how_it_ended(status: int) -> str:
    if status in {-signal.SIGXCPU, -signal.SIGKILL}:
        return f"reading it takes more than {LIMITS['CPU']} s of processor time, or was killed"
    if status < 0:
        return f"reading it crashed the process that tried ({signal.Signals(-status).name})"
    return "the process that read it failed"


def _answer(raw: bytes, status: int, path: Path) -> Any:
    if not raw.startswith(READY):
        what, do = "the process that reads foreign files did not start", "Check `ulimit -a`."
        raise SystemRefusedError(what, where=path, found=f"exit status {status}", do=do)
    if status != 0:
        raise _refused(_how_it_ended(status), path)
    try:
        answer = json.loads(raw[len(READY) :])
    except (ValueError, RecursionError) as error:
        raise _refused("reading it gave no sound answer", path) from error
    if type(answer) is dict and set(answer) == {"ok"}:
        return answer["ok"]
    if type(answer) is dict and set(answer) == {"refused"}:
        text = "".join(c if c.isprintable() else "�" for c in str(answer["refused"])[:600])
        raise CacheFormatError(text, where=path)
    raise _refused("reading it gave no sound answer", path)


def run_limited(task: str, path: Path, fd: int, arguments: Mapping[str, Any] | None = None) -> Any:
    """What one of `TASKS` says about a foreign file, as plain data that is still to be checked.

    Args:
        task: a key of `TASKS`; its function takes a file descriptor and the arguments.
        path: of the file, for messages only.
        fd: the file, open for reading.
        arguments: plain data.

    Raises:
        CacheFormatError: the file was refused; or reading it crashed, took too long or too much.
        SystemRefusedError: no such process can be started here.
    """
    module, function = TASKS[task]
    job = {
        "module": module,
        "function": function,
        "arguments": dict(arguments or {}),
        "limits": LIMITS,
        "home": str(_HOME),
        "paths": _PATHS,
    }
    with storage_errors(path), tempfile.TemporaryDirectory() as folder:
        child, end, finished = _start(job, fd, folder), time.monotonic() + SECONDS, 0.0
        try:
            raw = _collect(child.stdout.fileno(), path, end)  # type: ignore[union-attr]
            finished = end
        finally:
            status = _end(child, finished)
        return _answer(raw, status, path)


def _end(child: subprocess.Popen[bytes], until: float) -> int:
    """The exit status, after ending the child and whatever it may have started."""
    look = os.WEXITED | os.WNOWAIT | os.WNOHANG  # not reaped yet: its number stays its own
    while time.monotonic() < until and os.waitid(os.P_PID, child.pid, look) is None:
        time.sleep(0.002)
    with suppress(ProcessLookupError, PermissionError), child:
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()
