"""Damage, exhaustive and random, and one table of everything in this folder.

`python tests/attacks/corruption.py --table [--edits 100000] [--processes 2]` prints the table. A
worker keeps the file in memory (memfd) and is killed after 10 s on one case; a dead worker counts
as a crash and another goes on behind the case.
"""

import argparse
import copy
import hashlib
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for _folder in (HERE, HERE.parent / "cache", HERE.parent.parent):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

import forge  # noqa: E402
import make  # noqa: E402

from cache import verify  # noqa: E402
from cache.errors import CacheError, CacheMismatchError, StorageError  # noqa: E402
from cache.header import MAGIC, block_id  # noqa: E402
from cache.recipe import canonical_json  # noqa: E402

LIMIT = 10.0  # seconds for one case
COUNTS = ("cases", "accepted", "refused", "other_sound", "other_exceptions", "crashed")
AT, MICROSECONDS, KIBIBYTES, BAD = range(len(COUNTS), len(COUNTS) + 4)
Case = Callable[[int], bytes]


class Seed:
    """A sound cache as bytes, with what an attacker knows about it."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "k.h5"
            path.write_bytes(raw)
            self.body, self.text = make.body_of(path), forge.header_text(path)
        self.userblock = int(self.body["userblock"])
        self.spans = forge.spans(self.body)
        self.content_id = hashlib.sha256(canonical_json(self.body["content"])).hexdigest()

    def with_header(self, text: bytes, raw: bytes | None = None) -> bytes:
        """The file with another header, length and digest right."""
        prefix = MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest()
        block = (prefix + text)[: self.userblock].ljust(self.userblock, b"\0")
        return block + (self.raw if raw is None else raw)[self.userblock :]

    def with_body(self, body: dict[str, Any], raw: bytes | None = None) -> bytes:
        """The file with another header, the ids of its blocks right too."""
        try:
            for name, block in body["content"]["blocks"].items():
                block["id"] = block_id(body["content"], name)
        except (KeyError, TypeError, AttributeError):
            pass  # the edit broke more than that
        return self.with_header(canonical_json(body), raw)


def seeds() -> list[Seed]:
    """The smallest cache, and a small one with every kind of block."""
    with tempfile.TemporaryDirectory() as folder:
        tiny, full = Path(folder) / "tiny.h5", Path(folder) / "full.h5"
        make.tiny_cache_at(tiny)
        make.cache_at(full)
        return [Seed(tiny.read_bytes()), Seed(full.read_bytes())]


# ---- edits; each returns other bytes for a file


def _bit(seed: Seed, draw: random.Random) -> bytes:
    raw, at = bytearray(seed.raw), draw.randrange(len(seed.raw))
    raw[at] ^= 1 << draw.randrange(8)
    return bytes(raw)


def _some_bytes(seed: Seed, draw: random.Random) -> bytes:
    raw = bytearray(seed.raw)
    for _ in range(draw.randint(1, 8)):
        raw[draw.randrange(len(raw))] = draw.choice((0, 255, 127, 128, draw.randrange(256)))
    return bytes(raw)


def _word(seed: Seed, draw: random.Random) -> bytes:
    raw, at = bytearray(seed.raw), draw.randrange(len(seed.raw) - 8)
    value = draw.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, draw.getrandbits(64)))
    raw[at : at + 8] = value.to_bytes(8, "little")
    return bytes(raw)


def _copied(seed: Seed, draw: random.Random) -> bytes:
    raw, size = bytearray(seed.raw), draw.randint(1, 512)
    source, target = (draw.randrange(len(raw) - size) for _ in range(2))
    raw[target : target + size] = raw[source : source + size]
    return bytes(raw)


def _swapped(seed: Seed, draw: random.Random) -> bytes:
    raw, size = bytearray(seed.raw), 64 * draw.randint(1, 8)
    a, b = (64 * draw.randrange((len(raw) - size) // 64) for _ in range(2))
    raw[a : a + size], raw[b : b + size] = seed.raw[b : b + size], seed.raw[a : a + size]
    return bytes(raw)


def _blanked(seed: Seed, draw: random.Random) -> bytes:
    raw, size = bytearray(seed.raw), draw.choice((16, 64, 512, 4096))
    at = draw.randrange(len(raw) - size)
    raw[at : at + size] = draw.choice((b"\0", b"\xff")) * size
    return bytes(raw)


def _moved(seed: Seed, draw: random.Random) -> bytes:
    at, size = draw.randrange(len(seed.raw)), draw.randint(1, 64)
    if draw.random() < 0.5:
        return seed.raw[:at] + seed.raw[at + size :]
    return seed.raw[:at] + draw.randbytes(size) + seed.raw[at:]


def _cut(seed: Seed, draw: random.Random) -> bytes:
    return seed.raw[: draw.randrange(len(seed.raw))]


def _longer(seed: Seed, draw: random.Random) -> bytes:
    return seed.raw + draw.choice((bytes, draw.randbytes))(draw.randint(1, 4096))


def _header_bytes(seed: Seed, draw: random.Random) -> bytes:
    text = bytearray(seed.text)
    for _ in range(draw.randint(1, 3)):
        at, size = draw.randrange(len(text)), draw.choice((0, 1, 1, 1, 4))
        text[at : at + size] = draw.choice(
            (bytes([draw.randrange(32, 127)]), b'"', b"{}", b"[", b"0", b"99", b"-", b"null", b"")
        )
    return seed.with_header(bytes(text))


_JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 63, 64, 4096, 8192, 2**31, 2**47, 2**53 - 1, 2**53, 2**63, "",
    "x", "f2", "f4", "u1", "../x", "/etc/passwd", "\u202e", "ab" * 32, "states", [], [0], [1, 32],
    {}, {"a": 1}, [[]], "shard", "extraction",
)  # fmt: skip


def _header_values(seed: Seed, draw: random.Random) -> bytes:
    body = copy.deepcopy(seed.body)
    for _ in range(draw.randint(1, 2)):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.9:
                place = place[key]
                continue
            how = draw.random()
            if how < 0.15 and isinstance(place, dict):
                del place[key]
            elif how < 0.3 and isinstance(place, dict):
                place[draw.choice(("x", "filters", "id", "layers__values"))] = copy.deepcopy(
                    place[key]
                )
            elif how < 0.5 and isinstance(place[key], int):
                place[key] += draw.choice((-64, -8, -1, 1, 8, 64, 4096))
            else:
                place[key] = copy.deepcopy(draw.choice(_JUNK))
            break
    return seed.with_body(body)


def _digested_data(seed: Seed, draw: random.Random) -> bytes:
    """Other bytes in a data set, the digests of the header made right."""
    names = [n for n, d in seed.body["content"]["datasets"].items() if forge.length(d)]
    name = draw.choice(names)
    body, raw = copy.deepcopy(seed.body), bytearray(seed.raw)
    start, size = body["layout"][name], forge.length(body["content"]["datasets"][name])
    raw[start + draw.randrange(size)] ^= 1 << draw.randrange(8)
    found = hashlib.sha256(raw[start : start + size]).hexdigest()
    body["content"]["datasets"][name]["sha256"] = found
    return seed.with_body(body, bytes(raw))


def _digested_structure(seed: Seed, draw: random.Random) -> bytes:
    """Other bytes in the HDF5 part, `rest` made right."""
    inside = {at for first, last in seed.spans for at in range(first, last)}
    places = [at for at in range(seed.userblock, len(seed.raw)) if at not in inside]
    raw, body = bytearray(seed.raw), copy.deepcopy(seed.body)
    for _ in range(draw.randint(1, 4)):
        raw[draw.choice(places)] = draw.randrange(256)
    body["rest"] = forge.rest_of(bytes(raw), body)
    return seed.with_body(body, bytes(raw))


EDITS: tuple[tuple[int, Callable[[Seed, random.Random], bytes]], ...] = (
    (20, _bit), (20, _some_bytes), (8, _word), (8, _copied), (6, _swapped), (6, _blanked),
    (6, _moved), (5, _cut), (3, _longer), (7, _header_bytes), (7, _header_values),
    (2, _digested_data), (2, _digested_structure),
)  # fmt: skip


def random_case(seed: Seed, draw: random.Random) -> bytes:
    """A random edit that is one."""
    weights, edits = zip(*EDITS, strict=True)
    while (raw := draw.choices(edits, weights)[0](seed, draw)) == seed.raw:
        pass
    return raw


# ---- workers


class _Tally:
    """Counts that live in memory shared with the workers, so that a dead one loses none."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 4096)

    def __getitem__(self, slot: int) -> int:
        return int(struct.unpack_from("<q", self._map, 8 * slot)[0])

    def __setitem__(self, slot: int, value: int) -> None:
        struct.pack_into("<q", self._map, 8 * slot, value)


def _judge(path: Path, seed: Seed) -> str:
    """What verification says about a file that is not the seed."""
    try:
        report = verify(path)
    except (CacheError, StorageError):
        return "refused"
    except Exception:  # noqa: BLE001 - any other class is a fault of the reader
        return "other_exceptions"
    if report.content_id == seed.content_id:
        return "accepted"
    try:
        verify(path, expect=seed.content_id)
    except CacheMismatchError:
        return "other_sound"
    return "accepted"


def _work(cases: Case, seed: Seed, numbers: range, tally: _Tally) -> None:
    fd = os.memfd_create("case")
    path = Path(f"/proc/self/fd/{fd}")
    os.pwrite(fd, seed.raw, 0)
    verify(path)  # sound before; whatever is imported is imported now
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        tally[AT] = number
        raw = cases(number)
        os.ftruncate(fd, len(raw))
        os.pwrite(fd, raw, 0)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        began = time.process_time()
        slot = COUNTS.index(_judge(path, seed))
        spent = int((time.process_time() - began) * 1e6)
        tally[0], tally[slot] = tally[0] + 1, tally[slot] + 1
        if COUNTS[slot] in ("accepted", "other_exceptions"):
            tally[BAD] = number + 1
        tally[MICROSECONDS] = max(tally[MICROSECONDS], spent)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
        tally[KIBIBYTES] = max(tally[KIBIBYTES], grown)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _fork(cases: Case, seed: Seed, numbers: range, tally: _Tally) -> int:
    tally[AT] = numbers.start
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _work(cases, seed, numbers, tally)
            code = 0
        except BaseException:  # noqa: BLE001 - a child must never return into the caller
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def run(cases: Case, seed: Seed, count: int, processes: int = 1) -> dict[str, Any]:
    """Verifies cases 0 to `count`; see `random_edits` for what it returns."""
    tallies = [_Tally() for _ in range(min(processes, count))]
    running = {
        _fork(cases, seed, range(n, count, processes), tally): tally
        for n, tally in enumerate(tallies)
    }
    while running:
        pid, status = os.waitpid(next(iter(running)), 0)
        tally = running.pop(pid)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            msg = "the harness failed; its error is above"
            raise AssertionError(msg)
        if status:
            slot, at = COUNTS.index("crashed"), tally[AT]
            tally[0], tally[slot] = tally[0] + 1, tally[slot] + 1
            tally[BAD] = at + 1
            if at + processes < count:
                again = range(at + processes, count, processes)
                running[_fork(cases, seed, again, tally)] = tally
    result: dict[str, Any] = {n: sum(t[i] for t in tallies) for i, n in enumerate(COUNTS)}
    result["bad_case"] = max(t[BAD] for t in tallies) - 1  # one of them, to repeat it; -1 if none
    result["slowest_s"] = max(t[MICROSECONDS] for t in tallies) / 1e6
    result["largest_rss_mib"] = max(t[KIBIBYTES] for t in tallies) / 1024
    return result


def _add(results: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {name: sum(r[name] for r in results) for name in COUNTS}
    most = ("bad_case", "slowest_s", "largest_rss_mib")
    return total | {n: max(r[n] for r in results) for n in most}


def random_edits(count: int, seed: int, processes: int = 1) -> dict[str, Any]:
    """What full verification says to `count` random edits of small sealed caches.

    `cases`, `accepted` (must be 0), `refused`, `other_sound` (another sound cache with another
    content id, made by an edit that recomputed every digest; `expect=` refused it), `crashed` and
    `other_exceptions` (must be 0), `slowest_s` (processor time) and `largest_rss_mib`.
    """
    results = []
    for which, one in enumerate(seeds()):

        def case(number: int, one: Seed = one, which: int = which) -> bytes:
            return random_case(one, random.Random((seed << 42) + (which << 41) + number))

        share = count - count // 2 if which == 0 else count // 2
        results.append(run(case, one, share, processes))
    return _add(results)


def every_bit(processes: int = 1) -> dict[str, Any]:
    """Every bit of the smallest cache flipped, one at a time."""
    seed = seeds()[0]

    def case(number: int) -> bytes:
        raw = bytearray(seed.raw)
        raw[number // 8] ^= 1 << number % 8
        return bytes(raw)

    return run(case, seed, 8 * len(seed.raw), processes)


def every_length(processes: int = 1) -> dict[str, Any]:
    """The smallest cache cut at every length."""
    seed = seeds()[0]
    return run(lambda number: seed.raw[:number], seed, len(seed.raw), processes)


# ---- the table


def attack_rows() -> list[tuple[str, ...]]:
    """One row per form of attack, measured in a child and, with strace, in a traced one."""
    import sweep

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        attacks = sweep.build_all(folder)
        outcomes = sweep.probe(folder, attacks, "verify")
        traced = "not traced"
        if shutil.which("strace"):
            sweep.probe(folder, attacks, "verify", folder / "trace")
            traced = str(len(sweep.strangers(folder / "trace", attacks)))
        for form in dict.fromkeys(a.form for a in attacks):
            mine = [o for o in outcomes if o.attack.form == form]
            by = [o.refused_by for o in mine]
            stages = ", ".join(f"{s} {by.count(s)}" for s in ("open", "read", "verify") if s in by)
            refused = sum(b is not None for b in by)
            opened = sum(len(o.probe["opened"]) for o in mine)
            slow, large = max(o.seconds for o in mine), max(o.probe["mib"] for o in mine)
            title = f"hostile files: {form}"
            rows.append((title, str(len(mine)), f"{refused} ({stages})", str(opened), traced,
                         f"{slow:.3f}", f"{large:.1f}"))  # fmt: skip
    return rows


def _row(what: str, result: dict[str, Any]) -> tuple[str, ...]:
    refused = f"{result['refused']}"
    if result["other_sound"]:
        refused += f" (+ {result['other_sound']} other sound caches, refused by expect=)"
    for name in ("accepted", "crashed", "other_exceptions"):
        if result[name]:
            refused += f", {result[name]} {name.upper()}"
    return (what, str(result["cases"]), refused, "", "", f"{result['slowest_s']:.3f}",
            f"{result['largest_rss_mib']:.1f}")  # fmt: skip


HEAD = ("what", "how many", "refused", "other files opened (audit)", "(trace, all)", "slowest, s",
        "memory, MiB")  # fmt: skip


def table(edits: int, processes: int) -> str:
    """Everything in this folder, as a Markdown table."""
    rows = [HEAD, tuple("---" for _ in HEAD), *attack_rows()]
    rows.append(_row("every bit flipped", every_bit(processes)))
    rows.append(_row("every length truncated", every_length(processes)))
    rows.append(_row("random edits", random_edits(edits, 0, processes)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--edits", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    if given.table:
        print(table(given.edits, given.processes))
    else:
        print(random_edits(given.edits, given.seed, given.processes))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
