"""Times the sealed cache side by side with other ways to store the same hidden states.

    python bench/cache.py --mib 256 --mib 1024 --json cache-bench.json

Every other layout is measured in turns with the sealed cache, so that noise hits both; the number
after each time is how many times longer it takes than the sealed cache in the same turns. Times are
medians of processor time, except where a disk or a network is waited for. `--json` also keeps best
and wall-clock times. Needs four times the largest size of disk space.
"""

import argparse
import gc
import hashlib
import importlib.util
import json
import mmap
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cache import (
    BlockSpec,
    ClassRecord,
    Entry,
    ExtractionHeader,
    KnowledgeCache,
    ShardFolder,
    seal,
    verify,
)
from cache.sharing.ranges import open_remote

LAYERS, WIDTH, CLASSES, BATCH = 32, 4096, 16, 32
ENTRY = LAYERS * WIDTH * 2
LAYER = 20
Samples = dict[str, dict[str, list[tuple[float, float]]]]  # operation, layout: (wall, cpu)


def states(entries: int) -> Iterator[np.ndarray]:
    """Hidden states as a decoder gives them: channels of very different scale, layers that grow."""
    random = np.random.default_rng(0)
    scale = np.exp(random.standard_normal(WIDTH, "f4")) * 0.3
    growth = np.linspace(0.1, 3.0, LAYERS, dtype="f4")[:, None]
    for start in range(0, entries, BATCH):
        count = min(BATCH, entries - start)
        yield (random.standard_normal((count, LAYERS, WIDTH), "f4") * scale * growth).astype("f2")


def place(row: int, entries: int) -> tuple[str, int]:
    """Class id and item of a row."""
    items = -(-entries // CLASSES)
    return f"class{row // items:02d}", row % items


class Sealed:
    name = "sealed"

    def __init__(self, path: Path, entries: int) -> None:
        self.path, self.entries = path, entries

    def open(self) -> None:
        self.cache_file = KnowledgeCache.open(self.path)
        self.block = self.cache_file.blocks["layers"]

    def close(self) -> None:
        self.cache_file.close()

    def entry(self, row: int) -> np.ndarray:
        return np.array(self.block.array(*place(row, self.entries))[0])

    def layer(self) -> np.ndarray:
        return np.ascontiguousarray(self.block.layer(LAYER))

    def full(self) -> torch.Tensor:
        return torch.from_numpy(self.block.read())


class Map:
    """What cannot be beaten: the bytes, mapped, at a place that is known."""

    name = "memory map"

    def __init__(self, origin: Path, entries: int) -> None:
        self.path, self.entries = origin, entries
        self.start = origin.stat().st_size - entries * ENTRY

    def open(self) -> None:
        with self.path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        raw = np.frombuffer(self.map, "<f2", offset=self.start)
        self.values = raw.reshape(self.entries, LAYERS, WIDTH)

    def close(self) -> None:
        del self.values, self.map

    def entry(self, row: int) -> np.ndarray:
        return np.array(self.values[row])

    def layer(self) -> np.ndarray:
        return np.ascontiguousarray(self.values[:, LAYER])

    def full(self) -> torch.Tensor:
        return torch.from_numpy(np.array(self.values))


class Npy(Map):
    name = ".npy"

    def open(self) -> None:
        self.map = self.values = np.load(self.path, mmap_mode="r")

    def full(self) -> torch.Tensor:
        return torch.from_numpy(np.load(self.path))


class Safetensors:
    name = "safetensors"

    def __init__(self, origin: Path, entries: int) -> None:
        self.path, self.entries = origin.with_name("k.safetensors"), entries
        save_file({"values": np.load(origin, mmap_mode="r")}, self.path)

    def open(self) -> None:
        self.file = safe_open(self.path, "numpy")
        self.values = self.file.get_slice("values")

    def close(self) -> None:
        del self.file, self.values

    def entry(self, row: int) -> np.ndarray:
        return self.values[row]

    def layer(self) -> np.ndarray:
        return self.values[:, LAYER]

    def full(self) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor("values").clone()  # the file is mapped until it is copied


class Contiguous:
    name = "h5py contiguous"
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, origin: Path, entries: int) -> None:
        self.path, self.entries = origin.with_name("other.h5"), entries
        with h5py.File(self.path, "w") as file:
            shape = (entries, LAYERS, WIDTH)
            values = file.create_dataset("values", shape, "<f2", **self.options)
            for start, piece in pieces(origin):
                values[start : start + len(piece)] = piece

    def open(self) -> None:
        self.file = h5py.File(self.path)
        self.values = self.file["values"]

    def close(self) -> None:
        self.file.close()

    def entry(self, row: int) -> np.ndarray:
        return self.values[row]

    def layer(self) -> np.ndarray:
        return self.values[:, LAYER]

    def full(self) -> torch.Tensor:
        out = np.empty(self.values.shape, self.values.dtype)
        self.values.read_direct(out)
        return torch.from_numpy(out)


class Gzip(Contiguous):
    name = "h5py gzip"
    options: ClassVar = {"chunks": (1, LAYERS, WIDTH), "compression": "gzip", "shuffle": True}


class PerEntry(Contiguous):
    name = "h5py dataset per entry"

    def __init__(self, origin: Path, entries: int) -> None:
        self.path, self.entries = origin.with_name("other.h5"), entries
        with h5py.File(self.path, "w") as file:
            for start, piece in pieces(origin):
                for row, values in enumerate(piece, start):
                    file.create_dataset("/".join(map(str, place(row, entries))), data=values)

    def open(self) -> None:
        self.file = h5py.File(self.path)

    def _names(self) -> list[str]:
        return ["/".join(map(str, place(row, self.entries))) for row in range(self.entries)]

    def entry(self, row: int) -> np.ndarray:
        return self.file["/".join(map(str, place(row, self.entries)))][()]

    def layer(self) -> np.ndarray:
        return np.stack([self.file[name][LAYER] for name in self._names()])

    def full(self) -> torch.Tensor:
        out = np.empty((self.entries, LAYERS, WIDTH), "<f2")
        for row, name in enumerate(self._names()):
            self.file[name].read_direct(out[row])
        return torch.from_numpy(out)


OTHERS = (Npy, Safetensors, Contiguous, Gzip, PerEntry)


def pieces(origin: Path) -> Iterator[tuple[int, np.ndarray]]:
    values = np.load(origin, mmap_mode="r")
    for start in range(0, len(values), BATCH):
        yield start, values[start : start + BATCH]


def timed(samples: Samples, what: str, layout: str, action: Callable[[], Any], count: int = 1):
    """Runs `action` and notes the time of one of its `count` parts."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    samples[what][layout].append((wall / count, cpu / count))
    return result


def drop(path: Path) -> None:
    """Asks the system to forget the cached pages of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def hashed(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        return hashlib.sha256(raw).hexdigest()


def open_many(layout: Any, count: int) -> None:
    for _ in range(count):
        layout.open()
        layout.close()


def cold_entry(layout: Any, row: int) -> None:
    """Opens a file and reads one entry; the sealed cache by ranges, against the entry's digest."""
    if layout.name == "sealed":
        with open_remote(str(layout.path)) as found:
            found.blocks["layers"].array(*place(row, layout.entries))
        return
    layout.open()
    layout.entry(row)
    layout.close()


def open_full(layout: Any) -> None:
    layout.open()
    layout.full()
    layout.close()


def compare(samples: Samples, layouts: list[Any], origin: Path, repeats: int) -> None:
    """Every operation, the layouts taking turns."""
    rows = np.random.default_rng(1).integers(0, layouts[0].entries, 100).tolist()
    truth = np.load(origin, mmap_mode="r")

    def turns(
        what: str, action: Callable[[Any], Any], count: int = 1, *, cold: bool = False
    ) -> None:
        for turn in range(repeats):
            for layout in layouts if turn % 2 else layouts[::-1]:
                if cold:
                    drop(layout.path)
                timed(samples, what, layout.name, lambda one=layout: action(one), count)

    turns("open", lambda one: open_many(one, 20), 20)
    turns("open and one entry, cold", lambda one: cold_entry(one, rows[0]), cold=True)
    turns("open, full read, cold", open_full, cold=True)
    turns("open, full read", open_full)
    for layout in layouts:
        layout.open()
        if layout.name == "sealed":
            layout.block.values()  # from here on it is digested, as once in every process
        assert all(np.array_equal(layout.entry(row), truth[row]) for row in rows[:3]), layout.name
        assert np.array_equal(layout.layer(), truth[:, LAYER]), layout.name
    turns("random entry", lambda one: [one.entry(row) for row in rows], len(rows))
    turns("one layer", lambda one: one.layer())
    turns("full read", lambda one: one.full())
    for layout in layouts:
        layout.close()


def entries_of(origin: Path, entries: int) -> Iterator[list[Entry]]:
    for start, piece in pieces(origin):
        yield [
            Entry("layers", *place(row, entries), {"values": values[None]}, f"{row:064x}")
            for row, values in enumerate(piece, start)
        ]


def write(samples: Samples, origin: Path, entries: int) -> Path:
    """Commits and seals; beside it the same batches into one HDF5 file, flushed and synced."""
    blocks = {"layers": BlockSpec("states", {"model": "none"}, "f2", tuple(range(LAYERS)), WIDTH)}
    classes = tuple(ClassRecord(f"class{n:02d}", f"class {n}") for n in range(CLASSES))
    header = ExtractionHeader("bench", classes, blocks, {}, {})
    folder = ShardFolder(origin.with_name("k.parts"), header=header)
    rival = origin.with_name("rival.h5")
    what = "commit a batch of 8 MiB"
    with h5py.File(rival, "w") as file:
        values = file.create_dataset("values", (entries, LAYERS, WIDTH), "<f2")
        for number, batch in enumerate(entries_of(origin, entries)):
            stacked = np.concatenate([entry.values["values"] for entry in batch])
            start = number * BATCH

            def ours(batch: list[Entry] = batch) -> None:
                folder.commit(batch, batch_shape=(len(batch),))

            def theirs(start: int = start, stacked: np.ndarray = stacked) -> None:
                values[start : start + len(stacked)] = stacked
                file.flush()
                os.fsync(file.id.get_vfd_handle())

            def plain(stacked: np.ndarray = stacked) -> None:
                with origin.with_name("batch.npy").open("wb") as out:
                    np.save(out, stacked)
                    os.fsync(out.fileno())

            for name, action in (
                ("sealed", ours), ("h5py contiguous", theirs), (".npy", plain),
            ):  # fmt: skip
                timed(samples, what, name, action)
    rival.unlink()
    origin.with_name("batch.npy").unlink()
    target = origin.with_name("k.h5")
    timed(samples, "seal", "sealed", lambda: seal(folder, target))
    timed(samples, "seal", ".npy", lambda: copy(target, origin.with_name("copy.h5")))
    origin.with_name("copy.h5").unlink()
    return target


def copy(source: Path, target: Path) -> None:
    """What sealing cannot beat: a copy that is synced."""
    shutil.copyfile(source, target)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def check(samples: Samples, path: Path, repeats: int) -> None:
    """Verification against a bare SHA-256 of the same bytes."""

    def full() -> None:
        KnowledgeCache.open(path, verify="full").close()

    for _ in range(repeats):
        timed(samples, "verify every byte and the structure", "memory map", lambda: hashed(path))
        timed(samples, "verify every byte and the structure", "sealed", full)
        timed(samples, "`cache verify` (also every entry)", "memory map", lambda: hashed(path))
        timed(samples, "`cache verify` (also every entry)", "sealed", lambda: verify(path))


def remote(path: Path, entries: int, latency: float, count: int) -> list[dict[str, Any]]:
    """Requests, bytes and seconds for opening over HTTP and reading `count` random entries."""
    import fsspec

    spec = importlib.util.spec_from_file_location(
        "range_server", ROOT / "tests" / "cache" / "range_server.py"
    )
    server_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server_module)
    rows = np.random.default_rng(2).integers(0, entries, count).tolist()
    found = []

    def sealed(url: str) -> None:
        with open_remote(url) as opened:
            for row in rows:
                opened.blocks["layers"].array(*place(row, entries))

    def tool(kind: str) -> Callable[[str], None]:
        def action(url: str) -> None:
            with fsspec.open(url, "rb", cache_type=kind) as raw, h5py.File(raw) as opened:
                for row in rows:
                    if "values" in opened:
                        _ = opened["values"][row]
                    else:
                        _ = opened["/".join(map(str, place(row, entries)))][()]

        return action

    with server_module.serving(path.parent, latency) as server:
        jobs = [("sealed", path, sealed)]
        for layout in ("contiguous.h5", "perentry.h5"):
            jobs += [
                (f"h5py {layout[:-3]}, fsspec {kind}", path.with_name(layout), tool(kind))
                for kind in ("none", "readahead")
            ]
        sealed(f"{server.url}/{path.name}")  # whatever is imported is imported now
        for name, file, action in jobs:
            server.requests = server.sent = 0
            start = time.perf_counter()
            action(f"{server.url}/{file.name}")
            seconds = time.perf_counter() - start
            found.append(
                {"layout": name, "requests": server.requests, "bytes": server.sent, "s": seconds}
            )
    return found


def summary(samples: Samples) -> dict[str, dict[str, dict[str, float]]]:
    return {
        what: {
            layout: {
                "wall_median": statistics.median(wall for wall, _ in taken),
                "wall_best": min(wall for wall, _ in taken),
                "cpu_median": statistics.median(cpu for _, cpu in taken),
                "cpu_best": min(cpu for _, cpu in taken),
                "n": len(taken),
            }
            for layout, taken in by_layout.items()
        }
        for what, by_layout in samples.items()
    }


def shown(seconds: float) -> str:
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    unit, size = next((pair for pair in units if seconds >= pair[1]), units[-1])
    number = seconds / size
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.2g} {unit}"


def ratios(groups: list[Samples], kind: str) -> dict[str, dict[str, tuple[float, float]]]:
    """For each operation and layout: median time, and the ratio to the sealed cache beside it."""
    table: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for group in groups:
        for what, found in summary(group).items():
            waits = what.endswith("cold") or what.startswith(("commit", "seal"))
            key = "wall_median" if waits else kind
            own = found["sealed"][key]
            for layout, facts in found.items():
                table[what].setdefault(layout, (facts[key], facts[key] / own))
    return table


ORDER = ("sealed", "memory map", *(one.name for one in OTHERS))


def markdown(mib: int, table: dict[str, dict[str, tuple[float, float]]]) -> str:
    lines = [f"| {mib} MiB | " + " | ".join(ORDER) + " |", "|---" * (len(ORDER) + 1) + "|"]
    for what, found in table.items():
        cells = [
            f"{shown(found[name][0])}" + ("" if name == "sealed" else f" ×{found[name][1]:.2g}")
            if name in found
            else ""
            for name in ORDER
        ]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="bench-", dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def one_size(folder: Path, mib: int, options: argparse.Namespace) -> dict[str, Any]:
    entries = mib * (1 << 20) // ENTRY
    origin = folder / "origin.npy"
    values = np.lib.format.open_memmap(origin, "w+", "<f2", (entries, LAYERS, WIDTH))
    for number, piece in enumerate(states(entries)):
        values[number * BATCH :][: len(piece)] = piece
    del values
    first: Samples = defaultdict(lambda: defaultdict(list))
    path = write(first, origin, entries)
    check(first, path, options.repeats)
    groups = [first]
    kept = {"h5py contiguous": "contiguous.h5", "h5py dataset per entry": "perentry.h5"}
    reads: list[dict[str, Any]] = []
    for other in OTHERS:
        group: Samples = defaultdict(lambda: defaultdict(list))
        rival = other(origin, entries)
        compare(
            group, [Sealed(path, entries), Map(origin, entries), rival], origin, options.repeats
        )
        groups.append(group)
        if other.name in kept and options.latency:
            rival.path.rename(folder / kept[other.name])
        elif rival.path != origin:
            rival.path.unlink()
    if options.latency:
        reads = remote(path, entries, options.latency / 1000, 10)
        for name in kept.values():
            (folder / name).unlink()
    offset = KnowledgeCache.open(path).sealed.header.extents["layers__values"].offset
    print(markdown(mib, ratios(groups, "cpu_median")), flush=True)
    if reads:
        print(f"\n| over HTTP, {options.latency:g} ms a request, open and 10 entries | requests "
              "| MB | s | ratio |\n|---|---|---|---|---|")  # fmt: skip
        for one in reads:
            print(f"| {one['layout']} | {one['requests']} | {one['bytes'] / 1e6:.1f} "
                  f"| {one['s']:.2f} | ×{one['s'] / reads[0]['s']:.2g} |")  # fmt: skip
    print(flush=True)
    return {
        "mib": mib,
        "groups": [summary(group) for group in groups],
        "remote": reads,
        "offset_in_page": offset % 4096,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mib", type=int, action="append", help="size; may be given more than once"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--latency", type=float, default=20.0, help="ms a request; 0 leaves HTTP out"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write; the file system that is measured"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()
    results = []
    for mib in options.mib or [256, 1024]:
        with scratch(options.folder) as folder:
            results.append(one_size(folder, mib, options))
    facts = {
        "python": platform.python_version(),
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "results": results,
    }
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
