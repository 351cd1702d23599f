"""Killing, with signal 9 and with gentler ones, children that commit or seal.

The children are forked from a warm parent, so that a kill lands in the work and not in an import.
"""

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import workload
from checking import Checker, Verdict, final_ids, lookup, same
from workload import SCENES, header, make

from cache import ShardFolder
from cache.durable import TEMP
from cache.signals import unwind_on_signals

GENTLE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMIT = 2.0  # seconds to exit after a gentle signal


@dataclass
class Toll(Verdict):
    """A verdict, and what proves that the kills hit the work.

    Args:
        acked: entries that were acknowledged.
        inside: children that were in the middle of a commit: a draft or an unacknowledged shard.
        slowest: seconds from a gentle signal to the exit.
        temps: drafts left behind by a gentle signal.
    """

    acked: int = 0
    inside: int = 0
    slowest: float = 0.0
    temps: int = 0
    exits: dict[int, int] = field(default_factory=dict)


def entry(number: int):
    """The n-th entry of an endless extraction."""
    return make.entry("embedded", "ig", number)


def commit_for_ever(where: Path, pipe: int) -> None:
    """Commits one entry after the other and acknowledges each."""
    folder = ShardFolder(where, header=header())
    for number in range(100_000):
        folder.commit([entry(number)], batch_shape=(1,))
        os.write(pipe, number.to_bytes(4, "little"))


def child(doing, *, gentle: bool = False) -> tuple[int, int]:
    """A child that does something with a pipe; returns its id and the reading end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        assert os.read(reading, 1) == b"r"
        return pid, reading
    code = 1
    try:
        os.close(reading)
        for number in GENTLE:
            signal.signal(number, signal.SIG_DFL)
        if gentle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = lambda _: None  # what a callback swallows
            unwind_on_signals()
        os.write(writing, b"r")  # signals right after a fork may be dropped
        doing(writing)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = stop.code
    except Exception as error:  # noqa: BLE001 - shown
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _seconds(doing) -> float:
    began = time.monotonic()
    doing()
    return time.monotonic() - began


def said(reading: int) -> bytes:
    """Everything a child wrote."""
    raw = b""
    while piece := os.read(reading, 65536):
        raw += piece
    os.close(reading)
    return raw


def check_commits(where: Path, count: int, toll: Toll, label: str) -> None:
    """All that were acknowledged are there and right, and at most one more."""
    temps = where.is_dir() and any(path.name.startswith(TEMP) for path in where.iterdir())
    folder = ShardFolder(where, header=header())
    present = folder.present()
    toll.inside += bool(temps or len(present) > count)
    known = {make.key(entry(n)): entry(n) for n in range(count + 1)}
    lost = [n for n in range(count) if make.key(entry(n)) not in present]
    wrong = [
        key
        for key in present
        if key not in known or not same(folder.entry(key).values, known[key].values)
    ]
    left = [path for path in where.iterdir() if path.name.startswith(TEMP)]
    bad = len(wrong) + len(left) + len(folder.damaged)
    toll.add(len(lost), bad, f"{label}: lost {lost}, wrong {wrong}, left {left}")
    folder.commit([entry(count + 1)], batch_shape=(1,))  # it goes on
    toll.acked += count
    toll.cases += 1


def kill_commits(count: int, seed: int, scratch: Path) -> Toll:
    """Signal 9 at random points of a loop of commits."""
    random_, toll = random.Random(seed), Toll()
    opened = ShardFolder(lookup(scratch, "warm.parts"), header=header())
    usual = _seconds(lambda: opened.commit([entry(0)], batch_shape=(1,)))
    for number in range(count):
        where = lookup(scratch, "kill.parts")
        pid, reading = child(lambda pipe, where=where: commit_for_ever(where, pipe))
        time.sleep(random_.uniform(0.0, 8 * usual))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        check_commits(where, len(said(reading)) // 4, toll, f"kill {number}")
        if not toll.acked:  # busier than when it was measured
            usual *= 1.2
    return toll


def kill_scenes(count: int, seed: int, scratch: Path) -> Toll:
    """Signal 9 at random points of sealing and merging."""
    random_, toll, prepared = random.Random(seed), Toll(), {}
    names = [name for name in SCENES if name.startswith(("seal", "merge")) and "job" not in name]
    for number in range(count):
        name = names[number % len(names)]
        if name not in prepared:
            before = scratch / f"before {name}"
            before.mkdir(parents=True)
            SCENES[name].prepare(before)
            (scratch / "final").mkdir()
            checker = Checker(name, before, final_ids(scratch / "final"))
            shutil.copytree(before, lookup(scratch, "scene"))
            say, workload.say = workload.say, lambda text: None
            usual = _seconds(lambda name=name: SCENES[name].play(scratch / "scene"))
            workload.say = say
            prepared[name] = before, checker, usual
        before, checker, usual = prepared[name]
        root = lookup(scratch, "scene")
        shutil.copytree(before, root)
        before_it = _names(root)

        def play(pipe: int, name=name, root=root) -> None:
            workload.say = lambda text: os.write(pipe, text.encode() + b"\n")
            SCENES[name].play(root)
            time.sleep(10)

        pid, reading = child(play)
        time.sleep(random_.uniform(0.0, 1.5 * usual))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acks = tuple(said(reading).decode().split())
        toll.inside += not acks and _names(root) != before_it
        toll.acked += bool(acks)
        found = checker.check(root, acks, f"kill {number} of {name}", go_on=number % 3 == 0)
        toll += found
    return toll


def _names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def interrupt(count: int, seed: int, scratch: Path) -> Toll:
    """SIGINT, SIGTERM and SIGHUP at random points of a loop of commits."""
    random_, toll = random.Random(seed), Toll()
    opened = ShardFolder(lookup(scratch, "warm.parts"), header=header())
    usual = _seconds(lambda: opened.commit([entry(0)], batch_shape=(1,)))
    for number in range(count):
        where, sent = lookup(scratch, "stop.parts"), GENTLE[number % len(GENTLE)]
        pid, reading = child(lambda pipe, where=where: commit_for_ever(where, pipe), gentle=True)
        time.sleep(random_.uniform(0.0, 10 * usual))
        began = time.monotonic()
        os.kill(pid, sent)
        code = _exit_code(pid, began + 2 * LIMIT)
        took = time.monotonic() - began
        toll.slowest = max(toll.slowest, took)
        wanted = 128 + sent
        toll.add(0, code != wanted or took > LIMIT, f"{sent.name}: exit {code}, {took:.2f} s")
        left = [p for p in where.iterdir() if p.name.startswith(TEMP)] if where.is_dir() else []
        toll.temps += len(left)
        toll.add(0, len(left), f"{sent.name} {number}: left behind {left}")
        check_commits(where, len(said(reading)) // 4, toll, f"{sent.name} {number}")
    return toll


def _exit_code(pid: int, until: float) -> int:
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -9
