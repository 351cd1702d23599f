"""The child of `cache.foreign.sandbox`: limits itself, then runs one function on standard input.

A script of its own, so that nothing of ours is imported before the limits are set. Standard input
is the foreign file, already open; standard output takes `READY`, then one line of JSON.
"""

import importlib
import json
import os
import resource
import sys
from collections.abc import Mapping

READY = b"ready\n"


def _limit(name: str, wanted: int) -> None:
    """Sets a limit, or as near to it as an existing harder one allows."""
    which = getattr(resource, f"RLIMIT_{name}")
    _, hard = resource.getrlimit(which)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(which, (allowed, allowed))
    except (ValueError, OSError):
        if sys.platform == "linux":
            raise  # elsewhere some limits exist in name only


def _write(raw: bytes) -> None:
    while raw:
        raw = raw[os.write(1, raw) :]


def main(job: Mapping[str, object]) -> None:
    """Runs `job` and writes what it gave, or why the file was refused."""
    from cache.errors import VademecumError  # noqa: PLC0415 - nothing of ours before the limits

    function = getattr(importlib.import_module(str(job["module"])), str(job["function"]))
    _limit("NOFILE", 3)  # from here on nothing can be opened: no file, no socket, no pipe
    _write(READY)
    try:
        answer = {"ok": function(0, **dict(job["arguments"]))}  # type: ignore[call-overload]
    except VademecumError as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"refused": "reading it needs more memory than a foreign file is given"}
    except RecursionError:
        answer = {"refused": "it is nested too deeply"}
    _write(json.dumps(answer).encode("ascii"))


if __name__ == "__main__":
    _job = json.loads(sys.argv[1])
    for _name, _wanted in _job["limits"].items():
        _limit(_name, _wanted)
    sys.path.insert(0, _job["home"])
    importlib.import_module("cache")  # the one that asked, whatever else is installed
    sys.path[:] = [*sys.path[1:], *_job["paths"]]
    main(_job)
