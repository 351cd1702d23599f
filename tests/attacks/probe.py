"""A child that opens hostile files and reports, one JSON line each, what happened.

`python probe.py FOLDER open|verify < LIST` where LIST has one path per line. The marks it leaves in
a trace of its system calls are names that do not exist: `/mark/NUMBER`.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cache import KnowledgeCache, verify
from cache.errors import CacheError, StorageError

PAGE = os.sysconf("SC_PAGE_SIZE")
MEBIBYTE = 1 << 20


class Watch:
    """Every file, program or connection that this process asks Python for."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        watched = ("open", "socket.connect", "subprocess.Popen", "os.exec", "os.system", "import")
        if self.on and event in watched:
            self.seen.append(f"{event} {arguments[0]}")


def read_everything(path: Path) -> int:
    """Number of data sets read through the reader; each is compared with the header's digest."""
    with KnowledgeCache.open(path) as found:
        for name, extent in found.sealed.header.extents.items():
            array = found.sealed.array(name)
            if hashlib.sha256(array.tobytes()).hexdigest() != extent.sha256:
                msg = f"{name} was given out with another digest than the header's"
                raise AssertionError(msg)
        for block in found.blocks.values():
            for entry in block.entries():
                len(entry.values)
        _ = found.recipe, found.provenance, found.classes
        return len(found.sealed.header.extents)


def _call(job: Any, path: Path) -> dict[str, Any]:
    try:
        job(path)
    except (CacheError, StorageError) as error:
        text = str(error)
        clear = "\n" not in text and 10 < len(text) < 1000
        return {"refused": type(error).__name__, "text": text, "clear": clear}
    except Exception as error:  # noqa: BLE001 - the point is to see any other class
        return {"refused": None, "other": type(error).__name__, "text": str(error)[:300]}
    return {"refused": None, "other": None, "text": ""}


def _open_only(path: Path) -> None:
    KnowledgeCache.open(path).close()


def naive(path: Path) -> None:
    """What this project never does; shows that the trace sees what it would do."""
    import h5py

    with h5py.File(path, "r") as file, suppress(OSError, KeyError):
        for name in file:
            file[name][()]


JOBS = {
    "naive": (naive,),
    "open": (_open_only, read_everything),
    "verify": (_open_only, read_everything, verify),
}


def main() -> None:
    """Probes every path of the list."""
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    jobs = JOBS[mode]
    for job in jobs:
        job(folder / "sound.h5")  # whatever is imported is imported now
    watch = Watch()
    statm = os.open("/proc/self/statm", os.O_RDONLY)
    peak = os.open("/proc/self/status", os.O_RDONLY)
    clear = -1
    with suppress(OSError):
        clear = os.open("/proc/self/clear_refs", os.O_WRONLY)

    def resident() -> int:
        return int(os.pread(statm, 200, 0).split()[1]) * PAGE

    def highest() -> int:
        line = next(x for x in os.pread(peak, 8192, 0).splitlines() if x.startswith(b"VmHWM"))
        return int(line.split()[1]) * 1024

    for number, line in enumerate(sys.stdin):
        path = Path(line.rstrip("\n"))
        watch.seen = []
        if clear >= 0:
            with suppress(OSError):
                os.pwrite(clear, b"5", 0)  # the peak starts again here
        before, result = resident(), {"path": str(path)}
        with suppress(OSError):
            Path(f"/mark/{number}").stat()
        for job in jobs:
            began = time.process_time()
            watch.on = True
            result[job.__name__] = _call(job, path)
            watch.on = False
            result[job.__name__]["seconds"] = time.process_time() - began
        with suppress(OSError):
            Path("/mark/end").stat()
        result["mib"] = max(0, highest() - before) / MEBIBYTE
        result["opened"] = sorted(set(watch.seen) - {f"open {path}"})
        result["h5py"] = "h5py" in sys.modules
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
