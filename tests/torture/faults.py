"""The n-th call to the operating system fails, once or for ever, for every n."""

import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import workload
from checking import Checker, Verdict, final_ids, lookup, quick
from workload import SCENES, STALE

from cache.durable import TEMP
from cache.errors import VademecumError

WRITING = ("open", "pwrite", "fsync", "link", "replace", "rename", "mkdir")
CALLS = (*WRITING, "unlink", "rmdir", "pread", "stat", "lstat", "scandir", "listdir", "statvfs")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EINTR)
HOW = ("once", "writing", "all", "short", "killed", "torn")
PLAYED = [name for name in SCENES if "killed" not in name and "race" not in name]


class Died(BaseException):
    """The process is gone."""


class System:
    """Counts the calls to the operating system and interferes at the n-th.

    Args:
        at: the number of the call, from 1.
        how: `once` or `all` fails it, or it and all later ones; `writing` fails only calls that
            write, so that cleaning up works; `short` writes half from then on; `killed` lets
            nothing happen from then on; `torn` writes half and dies.
        number: of the error.
    """

    def __init__(self, at: int, how: str, number: int = errno.EIO) -> None:
        self.at, self.how, self.number = at, how, number
        self.count, self.down, self.failed = 0, False, []

    @contextmanager
    def interfering(self) -> Iterator[None]:
        """Inside, the calls go through here."""
        real = {name: getattr(os, name) for name in CALLS}
        for name, call in real.items():
            setattr(os, name, self._wrap(name, call))
        try:
            yield
        finally:
            for name, call in real.items():
                setattr(os, name, call)

    def _wrap(self, name: str, real):
        counted = {"torn": ("pwrite",), "short": ("pwrite",), "writing": WRITING}
        mine = name in counted.get(self.how, CALLS)

        def call(*arguments, **named):
            if self.down:
                raise Died
            if not mine:
                return real(*arguments, **named)
            self.count += 1
            if self.count < self.at or (self.how == "once" and self.count > self.at):
                return real(*arguments, **named)
            if self.how == "killed":
                self.down = True
                raise Died
            if self.how in ("torn", "short"):
                fd, data, offset = arguments
                done = real(fd, bytes(data)[: max(1, len(data) // 2)], offset)
                if self.how == "torn":
                    self.down = True
                    raise Died
                self.failed.append(name)
                return done
            self.failed.append(name)
            raise OSError(self.number, os.strerror(self.number))

        return call


class Sweep:
    """All failures of one scene."""

    def __init__(self, scene: str, scratch: Path) -> None:
        self.scene, self.scratch = scene, scratch
        self.before = scratch / "before"
        self.before.mkdir(parents=True)
        SCENES[scene].prepare(self.before)
        (scratch / "final").mkdir()
        self.checker = Checker(scene, self.before, final_ids(scratch / "final"))

    def run(self, how: str, numbers=ERRORS, *, stride: int = 1, rotate: bool = False) -> Verdict:
        """The verdict over every n (or every `stride`-th), for each error or for one in turn."""
        total = Verdict()
        for at in itertools.count(1, stride):
            some = [numbers[at % len(numbers)]] if rotate else numbers
            reached = False
            for number in some if how in ("once", "writing", "all") else [errno.EIO]:
                verdict, reached = self.one(at, how, number)
                total += verdict
            if not reached:
                return total
            if at > 2000:
                raise AssertionError("the scene never ends")
        return total

    def one(self, at: int, how: str, number: int) -> tuple[Verdict, bool]:
        """Plays the scene with one interference; False if it was never reached."""
        root, acks, raised = lookup(self.scratch, "played"), [], None
        shutil.copytree(self.before, root)
        system, say = System(at, how, number), workload.say
        workload.say = acks.append
        try:
            with quick(), system.interfering():
                SCENES[self.scene].play(root)
        except (Died, Exception) as error:  # noqa: BLE001 - what it is, is judged below
            raised = error
        finally:
            workload.say = say
        label = f"{self.scene}, call {at} {how} {errno.errorcode[number]} {system.failed[:1]}"
        verdict = Verdict()
        self._judge(root, system, raised, label, verdict)
        verdict += self.checker.check(root, tuple(acks), label, go_on=at % 5 == 0)
        shutil.rmtree(root)
        return verdict, system.count >= at

    def _judge(self, root: Path, system: System, raised, label: str, verdict: Verdict) -> None:
        """One clear line or none, no failed fsync passed over, nothing left behind."""
        if raised is not None and not isinstance(raised, VademecumError | Died):
            verdict.add(0, 1, f"{label}: {type(raised).__name__}: {raised}")
        if isinstance(raised, VademecumError) and "\n" in str(raised):
            verdict.add(0, 1, f"{label}: more than a line")
        if raised is None and "fsync" in system.failed:
            verdict.add(0, 1, f"{label}: a failed fsync was passed over")
        if raised is not None and system.how == "short":
            verdict.add(0, 1, f"{label}: a short write is no error: {raised}")
        cleaning = system.how == "writing" or (
            system.how == "once" and system.failed and system.failed[0] != "unlink"
        )
        left = [p.name for p in root.rglob(TEMP + "*") if p.name != STALE]
        if left and (cleaning or raised is None):
            verdict.add(0, 1, f"{label}: left behind {left}")
