"""Checks crash states of the scenes; used by the tests and by the long run."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from checking import Checker, Verdict, final_ids, lookup
from crash_states import State, crashes, open_points, power_cuts
from syscall_trace import Snapshot, record, snapshot
from workload import SCENES


@dataclass
class Recording:
    """One scene, played once under strace."""

    scene: str
    start: Snapshot
    operations: list[tuple]
    checker: Checker


def recording(scene: str, scratch: Path, control: str | None = None) -> Recording:
    """Plays a scene. The folder has the same name each time, so recordings can be compared."""
    scratch.mkdir(parents=True)
    root = scratch / "played"
    root.mkdir()
    SCENES[scene].prepare(root)
    (scratch / "final").mkdir()
    checker = Checker(scene, root, final_ids(scratch / "final"))
    start = snapshot(root)
    operations = record(scene, root, scratch, control)
    *_, last = crashes(start, operations, random.Random(0), tears=0)
    if last.looks() != State(snapshot(root), last.acks, "").looks():
        raise RuntimeError(f"{scene}: the trace does not lead to what is on the disk")
    return Recording(scene, start, operations, checker)


def check_states(found: Recording, states, scratch: Path, *, go_on_every: int) -> Verdict:
    """The verdict over many states; equal ones are looked at once and counted each time."""
    total, known = Verdict(), {}
    for number, state in enumerate(states):
        digest = hash(state.looks())
        go_on = number % go_on_every == 0
        if digest not in known or (go_on and not known[digest][0]):
            known[digest] = go_on, _check(found, state, scratch, go_on=go_on)
        total += known[digest][1]
    total.distinct = len(known)
    return total


def _check(found: Recording, state: State, scratch: Path, *, go_on: bool) -> Verdict:
    root = lookup(scratch, "state")
    state.write(root)
    verdict = found.checker.check(root, state.acks, f"{found.scene}, {state.label}", go_on=go_on)
    shutil.rmtree(root)
    return verdict


def crash_verdict(found: Recording, scratch: Path, *, seed: int, tears: int) -> Verdict:
    """All states a killed process can leave."""
    states = crashes(found.start, found.operations, random.Random(seed), tears)
    return check_states(found, states, scratch, go_on_every=9)


def power_verdict(found: Recording, scratch: Path, *, seed: int, count: int) -> Verdict:
    """At least `count` states that a power cut can leave, spread over all points."""
    each = max(1, -(-count // open_points(found.start, found.operations)))
    states = power_cuts(found.start, found.operations, random.Random(seed), each)
    return check_states(found, states, scratch, go_on_every=7)
