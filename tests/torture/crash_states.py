"""Every state a folder can be in after a crash, from the operations on it.

A killed process leaves a prefix of the operations, the last write perhaps torn. A power cut leaves,
of a prefix, everything that was synced (data by a sync of the file, names by a sync of the folder),
and of the rest any subset, in any order, writes torn at sectors of 512 bytes.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from syscall_trace import Snapshot

SECTOR = 512


@dataclass
class State:
    """What is on the disk, and what had been acknowledged before."""

    disk: Snapshot
    acks: tuple[str, ...]
    label: str

    def write(self, root: Path) -> None:
        """Makes this state in a new folder."""
        todo = [(root, 0)]
        while todo:
            path, number = todo.pop()
            path.mkdir()
            for name, inode in self.disk.folders[number].items():
                if inode in self.disk.folders:
                    todo.append((path / name, inode))
                else:
                    (path / name).write_bytes(self.disk.files.get(inode, b""))

    def looks(self) -> tuple:
        """Equal for states that look the same."""

        def seen(number: int):
            if number not in self.disk.folders:
                return self.disk.files.get(number, b"")
            return tuple(sorted((k, seen(n)) for k, n in self.disk.folders[number].items()))

        return seen(0), self.acks


@dataclass
class _Disk:
    """Synced state and what is pending on top of it."""

    files: dict[int, bytearray]
    folders: dict[int, dict[str, int]]
    data: dict[int, list[tuple]] = field(default_factory=dict)
    names: dict[int, list[tuple[str, int | None]]] = field(default_factory=dict)
    acks: list[str] = field(default_factory=list)

    def take(self, operation: tuple) -> None:
        kind = operation[0]
        if kind == "ack":
            self.acks.append(operation[1])
        elif kind == "sync":
            self.sync(operation[1])
        elif kind == "names":
            for folder, name, inode in operation[1]:
                self.names.setdefault(folder, []).append((name, inode))
        else:
            self.data.setdefault(operation[1], []).append(operation)

    def sync(self, number: int) -> None:
        for operation in self.data.pop(number, []):
            _apply(self.files.setdefault(number, bytearray()), operation)
        for name, inode in self.names.pop(number, []):
            _rename(self.folders.setdefault(number, {}), name, inode)


def _apply(raw: bytearray, operation: tuple) -> None:
    if operation[0] == "cut":
        size = operation[2]
        raw[size:] = bytes(max(0, size - len(raw)))
        return
    _, _, offset, data = operation
    if len(raw) < offset + len(data):
        raw.extend(bytes(offset + len(data) - len(raw)))
    raw[offset : offset + len(data)] = data


def _rename(folder: dict[str, int], name: str, inode: int | None) -> None:
    if inode is None:
        folder.pop(name, None)
    else:
        folder[name] = inode


def _after(start: Snapshot, operations: list[tuple]) -> _Disk:
    disk = _Disk(
        {n: bytearray(raw) for n, raw in start.files.items()},
        {n: dict(names) for n, names in start.folders.items()},
    )
    for operation in operations:
        disk.take(operation)
    return disk


def _state(disk: _Disk, label: str) -> State:
    """With everything that is pending."""
    for number in [*disk.data, *disk.names]:
        disk.sync(number)
    folders = _with_empty(disk.folders)
    return State(Snapshot({n: bytes(f) for n, f in disk.files.items()}, folders), (), label)


def _with_empty(folders: dict[int, dict[str, int]]) -> dict[int, dict[str, int]]:
    return {number: dict(names) for number, names in folders.items()}


def _new_folders(operations: list[tuple], start: Snapshot) -> set[int]:
    """Numbers that are folders: they never get data."""
    known = set(start.folders)
    known |= {folder for op in operations if op[0] == "names" for folder, _, _ in op[1]}
    return known


def crashes(
    start: Snapshot, operations: list[tuple], random_: random.Random, tears: int = 1
) -> Iterator[State]:
    """Every state a killed process can leave."""
    folders = _new_folders(operations, start)
    for count in range(len(operations) + 1):
        done = operations[:count]
        torn = [done]
        if done and done[-1][0] == "write" and len(done[-1][3]) > 1:
            kind, inode, offset, data = done[-1]
            for _ in range(tears):
                cut = random_.randrange(1, len(data))
                torn.append([*done[:-1], (kind, inode, offset, data[:cut])])
        for number, some in enumerate(torn):
            disk = _after(start, some)
            for folder in folders:
                disk.folders.setdefault(folder, {})
            state = _state(disk, f"killed after {count}" + (", torn" if number else ""))
            state.acks = tuple(disk.acks)
            yield state


def open_points(start: Snapshot, operations: list[tuple]) -> int:
    """How many prefixes leave something that is not synced."""
    disk, found = _after(start, []), 0
    for operation in operations:
        disk.take(operation)
        found += bool(disk.data or disk.names)
    return found


def power_cuts(
    start: Snapshot, operations: list[tuple], random_: random.Random, each: int
) -> Iterator[State]:
    """For every prefix, some of the states that a power cut can leave; one if all is synced."""
    folders = _new_folders(operations, start)
    for count in range(len(operations) + 1):
        base = _after(start, operations[:count])
        for folder in folders:
            base.folders.setdefault(folder, {})
        pending = bool(base.data or base.names)
        for number in range(each if pending else 1):
            yield _cut(base, random_, f"cut after {count}, {number}", number)


_STYLES = [("none", "all"), ("all", "none"), ("none", "none"), ("some", "all")]


def _cut(base: _Disk, random_: random.Random, label: str, number: int) -> State:
    data_style, name_style = _STYLES[number] if number < len(_STYLES) else ("some", "some")
    files = {n: bytes(raw) for n, raw in base.files.items()}
    for inode, pending in base.data.items():
        raw = bytearray(base.files.get(inode, b""))
        for operation in _chosen(pending, data_style, random_):
            for piece in _torn(operation, random_) if data_style == "some" else [operation]:
                _apply(raw, piece)
        if data_style == "some" and random_.random() < 0.3:
            _lengthen(raw, pending, random_)
        files[inode] = bytes(raw)
    names = {n: dict(found) for n, found in base.folders.items()}
    for folder, pending in base.names.items():
        for name, inode in _chosen(pending, name_style, random_, shuffle=False):
            _rename(names[folder], name, inode)
    return State(Snapshot(files, names), tuple(base.acks), label)


def _chosen(pending: list, style: str, random_: random.Random, *, shuffle: bool = True) -> list:
    if style != "some":
        return pending if style == "all" else []
    share = random_.random()
    some = [one for one in pending if random_.random() < share]
    if shuffle:
        random_.shuffle(some)
    return some


def _torn(operation: tuple, random_: random.Random) -> list[tuple]:
    """The sectors of a write that arrived."""
    if operation[0] != "write" or random_.random() < 0.5:
        return [operation]
    kind, inode, offset, data = operation
    pieces, at = [], 0
    while at < len(data):
        end = min(len(data), at + SECTOR - (offset + at) % SECTOR)
        if random_.random() < 0.5:
            pieces.append((kind, inode, offset + at, data[at:end]))
        at = end
    return pieces


def _lengthen(raw: bytearray, pending: list[tuple], random_: random.Random) -> None:
    """The size arrived and the data did not: zeros, or what was on the disk before."""
    size = max((o[2] + len(o[3]) for o in pending if o[0] == "write"), default=0)
    if size > len(raw):
        missing = size - len(raw)
        raw.extend(bytes(missing) if random_.random() < 0.5 else random_.randbytes(missing))
