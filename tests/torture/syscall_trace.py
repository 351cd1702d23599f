"""From a run under strace to a list of operations on one folder.

Operations are tuples; files and folders are numbers (inodes of our own), 0 is the root:

    ("write", inode, offset, data)    ("cut", inode, size)      ("sync", inode)
    ("names", [(folder, name, inode or None), ...])             ("ack", text)

A system call that changes the folder and is not known here is an error, never left out.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?|0x[0-9a-f]+)(?: .*)?$")
ACKS = ("batch ", "sealed")
_HARMLESS = set(
    "fstat newfstatat stat lstat statx access faccessat faccessat2 readlink readlinkat lseek read "
    "pread64 getdents64 ioctl mmap statfs fstatfs execve fcntl poll ppoll epoll_ctl flock "
    "fadvise64 getcwd chdir pipe2 dup dup2 dup3 sendfile select pselect6 close_range readv "
    "preadv".split()
)


@dataclass
class Snapshot:
    """Files and folders by number."""

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})


def snapshot(root: Path) -> Snapshot:
    """What lies in `root`."""
    found, numbers = Snapshot(), {root: 0}
    for path in sorted(root.rglob("*")):
        number = numbers[path] = len(numbers)
        found.folders[numbers[path.parent]][path.name] = number
        if path.is_dir():
            found.folders[number] = {}
        else:
            found.files[number] = path.read_bytes()
    return found


def why_not() -> str | None:
    """The reason why nothing can be traced here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    trial = ["strace", "-f", "-o", "/dev/null", "true"]
    done = subprocess.run(trial, check=False, capture_output=True)
    return None if done.returncode == 0 else "strace may not trace here"


def record(scene: str, root: Path, scratch: Path, control: str | None = None) -> list[tuple]:
    """Plays a scene in `root` under strace and returns its operations."""
    start, log = snapshot(root), scratch / "strace.log"
    what = ["-f", "-xx", "-s", "100000000", "-e", "trace=%file,%desc,%process", "-e", "signal=none"]
    script = [sys.executable, "-B", HERE / "workload.py", scene, root]
    script += ["--control", control] if control else []
    command = ["strace", "-o", log, *what, *script]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, env=alone)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    reader = _Reader(root, start)
    for line in whole_lines(log.read_text("ascii").splitlines()):
        reader.take(line)
    log.unlink()
    return reader.operations


def whole_lines(lines):
    """Lines in which a call that was interrupted by another process is one again."""
    begun = {}
    for line in lines:
        pid, _, rest = line.partition(" ")
        rest = rest.lstrip()
        if rest.endswith("<unfinished ...>"):
            begun[pid] = rest.removesuffix("<unfinished ...>")
        elif rest.startswith("<... "):
            yield f"{pid} {begun.pop(pid)}{rest.partition('resumed>')[2]}"
        elif not rest.startswith(("+++", "---")):
            yield f"{pid} {rest}"


def _text(shown: str) -> bytes:
    return bytes.fromhex(shown.strip('"').replace("\\x", ""))


class _Reader:
    def __init__(self, root: Path, start: Snapshot) -> None:
        self.root = str(root)
        self.folders = {n: dict(names) for n, names in start.folders.items()}
        self.free = 1 + max([0, *start.files, *start.folders])
        self.tables: dict[str, dict[int, int]] = {}
        self.positions: dict[tuple[str, int], int] = {}
        self.main: str | None = None
        self.operations: list[tuple] = []

    def place(self, shown: str) -> tuple[int, str] | None:
        """Folder and name of a path of ours; None if it lies elsewhere."""
        path = _text(shown).decode()
        if path != self.root and not path.startswith(self.root + "/"):
            return None
        *parents, name = ["", *path[len(self.root) :].strip("/").split("/")]
        folder = 0
        for part in filter(None, parents):
            folder = self.folders[folder][part]
        return folder, name

    def inode(self, place: tuple[int, str]) -> int:
        return self.folders[place[0]][place[1]] if place[1] else 0

    def name(self, *changes: tuple[int, str, int | None]) -> None:
        for folder, name, inode in changes:
            if inode is None:
                del self.folders[folder][name]
            else:
                self.folders[folder][name] = inode
        self.operations.append(("names", list(changes)))

    def take(self, line: str) -> None:
        found = _LINE.match(line)
        if found is None:
            if "exit" in line.partition("(")[0]:
                return
            raise ValueError(f"not understood: {line[:200]}")
        pid, call, shown, result = found.groups()
        self.main = self.main or pid
        if pid not in self.tables:
            self.tables[pid] = dict(self.tables.get(self.main, {}))
        if result.startswith("-") or result == "?":
            return  # it changed nothing
        handler = getattr(self, "on_" + call, None)
        arguments = shown.split(", ")
        if handler is not None:
            handler(pid, arguments, int(result, 0))
        elif call not in _HARMLESS and self._ours(pid, arguments):
            raise ValueError(f"a call nobody thought of: {line[:200]}")
        if call == "mmap" and "MAP_SHARED" in shown and "PROT_WRITE" in shown:
            raise ValueError(f"written through memory: {line[:200]}")

    def _ours(self, pid: str, arguments: list[str]) -> bool:
        fd = int(arguments[0]) if arguments[0].isdigit() else -1
        paths = [a for a in arguments if a.startswith('"\\x')]
        return fd in self.tables[pid] or any(self.place(path) for path in paths)

    def on_openat(self, pid, arguments, fd):
        place, flags = self.place(arguments[1]), arguments[2].split("|")
        if place is None:
            self.tables[pid].pop(fd, None)
            return
        if "O_CREAT" in flags and place[1] not in self.folders[place[0]]:
            self.name((*place, self.free))
            self.free += 1
        elif "O_TRUNC" in flags:
            self.operations.append(("cut", self.inode(place), 0))
        self.tables[pid][fd] = self.inode(place)
        self.positions[pid, fd] = 0

    def on_open(self, pid, arguments, fd):
        self.on_openat(pid, ["", *arguments], fd)

    def on_close(self, pid, arguments, _):
        self.tables[pid].pop(int(arguments[0]), None)

    def on_write(self, pid, arguments, count):
        fd, data = int(arguments[0]), _text(arguments[1])[:count]
        if fd in self.tables[pid]:
            at = self.positions[pid, fd]
            self.operations.append(("write", self.tables[pid][fd], at, data))
            self.positions[pid, fd] = at + count
        elif fd == 1:
            said = data.decode("ascii", "replace").split("\n")  # a library may ask `uname` as well
            self.operations += [("ack", text) for text in said if text.startswith(ACKS)]

    def on_pwrite64(self, pid, arguments, count):
        fd = int(arguments[0])
        if fd in self.tables[pid]:
            data = _text(arguments[1])[:count]
            self.operations.append(("write", self.tables[pid][fd], int(arguments[3]), data))

    def on_ftruncate(self, pid, arguments, _):
        if (fd := int(arguments[0])) in self.tables[pid]:
            self.operations.append(("cut", self.tables[pid][fd], int(arguments[1])))

    def on_fsync(self, pid, arguments, _):
        if (fd := int(arguments[0])) in self.tables[pid]:
            self.operations.append(("sync", self.tables[pid][fd]))

    on_fdatasync = on_fsync

    def on_link(self, _, arguments, __):
        old, new = self.place(arguments[0]), self.place(arguments[1])
        if old and new:
            self.name((*new, self.inode(old)))

    def on_linkat(self, pid, arguments, result):
        self.on_link(pid, [arguments[1], arguments[3]], result)

    def on_rename(self, _, arguments, __):
        old, new = self.place(arguments[0]), self.place(arguments[1])
        if old and new:
            self.name((*new, self.inode(old)), (*old, None))

    def on_renameat(self, pid, arguments, result):
        self.on_rename(pid, [arguments[1], arguments[3]], result)

    def on_renameat2(self, pid, arguments, result):
        if arguments[4] != "0":
            raise ValueError(f"renameat2 with {arguments[4]}")
        self.on_renameat(pid, arguments, result)

    def on_unlink(self, _, arguments, __):
        if place := self.place(arguments[0]):
            self.name((*place, None))

    on_rmdir = on_unlink

    def on_unlinkat(self, pid, arguments, result):
        self.on_unlink(pid, [arguments[1]], result)

    def on_mkdir(self, _, arguments, __):
        if place := self.place(arguments[0]):
            number, self.free = self.free, self.free + 1
            self.folders[number] = {}
            self.name((*place, number))

    def on_mkdirat(self, pid, arguments, result):
        self.on_mkdir(pid, [arguments[1]], result)
