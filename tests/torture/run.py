"""The long torture of the cache; prints one table and fails if anything is lost, wrong or skipped.

python tests/torture/run.py [--short] [--json FILE] [--kills N] [--cuts N] [--edits N] ...
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import real_faults  # noqa: E402
import syscall_trace  # noqa: E402
from checking import Verdict  # noqa: E402
from crowd import crowd, two_jobs  # noqa: E402
from enumerate_states import crash_verdict, power_verdict, recording  # noqa: E402
from faults import HOW, PLAYED, Sweep  # noqa: E402
from kills import interrupt, kill_commits, kill_scenes  # noqa: E402
from workload import ROOT, SCENES, load  # noqa: E402

ATTACKS = ROOT / "tests" / "attacks" / "corruption.py"
NUMBERS = {  # long, short
    "kills": (10_000, 150),
    "cuts": (50_000, 1_000),
    "edits": (1_000_000, 2_000),
    "signals": (1_000, 60),
    "seconds": (120, 5),
    "jobs": (300, 10),
}
CONTROLS = {
    "no fsync": ("commit", "resume", "seal", "merge"),
    "no folder fsync": ("commit", "resume", "seal", "merge"),
    "shards deleted early": ("seal", "seal over an old one"),
}


@dataclass
class Row:
    """One line of the table."""

    what: str
    cases: int = 0
    lost: int = 0
    wrong: int = 0
    control: bool = False
    seconds: float = 0.0
    more: dict = field(default_factory=dict)
    why: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing lost and nothing wrong; or, of a control, something lost."""
        return self.cases > 0 and (self.lost > 0 if self.control else not self.lost + self.wrong)

    def take(self, found: dict) -> None:
        """Adds what one job found."""
        for name in ("cases", "lost", "wrong"):
            setattr(self, name, getattr(self, name) + found.get(name, 0))
        self.seconds += found["seconds"]
        self.why = (self.why + list(found.get("why", ())))[:5]
        for name, value in found.items():
            if name in ("acked", "inside", "temps", "distinct", "generations", "seals"):
                self.more[name] = self.more.get(name, 0) + value
            elif name == "slowest":
                self.more[name] = max(self.more.get(name, 0.0), value)


def _states(kind: str, scene: str, seed: int, count: int, scratch: Path) -> Verdict:
    found = recording(scene, scratch / "recorded")
    if kind == "killed":
        return crash_verdict(found, scratch, seed=seed, tears=count)
    return power_verdict(found, scratch, seed=seed, count=count)


def _control(scene: str, control: str, count: int, scratch: Path) -> Verdict:
    found = recording(scene, scratch / "recorded", control)
    return power_verdict(found, scratch, seed=5, count=count)


def _faults(scene: str, how: str, stride: int, scratch: Path) -> Verdict:
    return Sweep(scene, scratch / "sweep").run(how, stride=stride, rotate=stride > 1)


def _real(fault: str, scratch: Path) -> dict:
    root = scratch / "place"
    root.mkdir()
    for path in (scratch.parent, scratch, root):
        path.chmod(0o755)
    if fault in real_faults.PREPARED:
        real_faults.prepare(root)
    found = real_faults.meet(fault, root)
    root.chmod(0o755)
    return {"cases": 1, "lost": found["lost"], "wrong": found["wrong"], "why": found["lines"][:-1]}


def _edits(count: int, seed: int, scratch: Path) -> dict:
    found = load(ATTACKS).random_edits(count, seed)
    wrong = found["accepted"] + found["crashed"] + found["other_exceptions"]
    return {"cases": found["cases"], "wrong": wrong, "slowest": found["slowest_s"]}


def _crowd(seconds: float, scratch: Path) -> dict:
    found = crowd(seconds, scratch)
    return {**found, "cases": found["reads"]}


def _jobs(rounds: int, seed: int, scratch: Path) -> dict:
    found = two_jobs(rounds, seed, scratch)
    return {**found, "cases": rounds}


def work(function, arguments: tuple, place: str) -> dict:
    """Runs one job in a folder of its own."""
    began, scratch = time.monotonic(), Path(tempfile.mkdtemp(prefix="torture-", dir=place))
    try:
        found = function(*arguments, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    plain = found if isinstance(found, dict) else asdict(found)
    return {**plain, "seconds": time.monotonic() - began}


def chunks(total: int, size: int):
    """Numbers that add up to `total`, none above `size`."""
    while total > 0:
        yield min(size, total)
        total -= size


def plan(numbers: dict[str, int], *, short: bool) -> Iterator[tuple[str, Callable, tuple]]:
    """All jobs: the row they belong to, a function and its arguments."""
    counted = [
        ("kill -9 while committing", kill_commits, numbers["kills"], 500),
        ("kill -9 while sealing and merging", kill_scenes, numbers["kills"] // 5, 250),
        ("SIGINT, SIGTERM, SIGHUP", interrupt, numbers["signals"], 50),
        ("two jobs, one recipe", _jobs, numbers["jobs"], 50),
    ]
    if ATTACKS.exists():
        counted.append(("corruptions of a sealed file", _edits, numbers["edits"], 25_000))
    for row, function, total, size in counted:
        for seed, count in enumerate(chunks(total, size)):
            yield row, function, (count, seed)
    yield from _traced(numbers, short=short)
    for scene, how in itertools.product(PLAYED, HOW):
        yield "every n-th call fails", _faults, (scene, how, 7 if short else 1)
    for fault in real_faults.FAULTS:
        yield "real faults", _real, (fault,)


def _traced(numbers: dict[str, int], *, short: bool) -> Iterator[tuple[str, Callable, tuple]]:
    for scene in SCENES:
        row = "every crash state, writes torn"
        yield row, _states, ("killed", scene, 1, 1 if short else 4)
        for seed, count in enumerate(chunks(-(-numbers["cuts"] // len(SCENES)), 2500)):
            yield "power cuts", _states, ("cut", scene, 100 + seed, count)
    for control, scenes in CONTROLS.items():
        for scene in scenes:
            if scene in SCENES:
                yield f"control: {control}", _control, (scene, control, 400)


def skipped() -> list[str]:
    """What cannot be done here; each is a failure."""
    found = [syscall_trace.why_not(), real_faults.why_not()]
    found += [None if ATTACKS.exists() else "tests/attacks/corruption.py is not there"]
    return [why for why in found if why]


def table(rows: list[Row]) -> str:
    """The table, as Markdown."""
    lines = ["| what | how many | lost | wrong |", "|---|---:|---:|---:|"]
    for row in rows:
        lost = f"{row.lost} (must be found)" if row.control else str(row.lost)
        lines.append(f"| {row.what} | {row.cases:,} | {lost} | {row.wrong} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few minutes instead of the whole")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    for name, (long, few) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{long:,} (short: {few:,})")
    return parser.parse_args()


def _say(began: float, text: str) -> None:
    print(f"{time.monotonic() - began:7.0f} s  {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Runs everything; 1 if something is lost, wrong or skipped."""
    given, began, rows = _options(), time.monotonic(), {}
    numbers = {
        name: pair[given.short] if getattr(given, name) is None else getattr(given, name)
        for name, pair in NUMBERS.items()
    }
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    jobs = [job for job in plan(numbers, short=given.short) if given.only in job[0]]
    for row, _, _ in jobs:
        rows.setdefault(row, Row(row, control=row.startswith("control")))
    with ProcessPoolExecutor(given.processes, mp_context=get_context("fork")) as pool:
        waiting = {pool.submit(work, run, arguments, place): row for row, run, arguments in jobs}
        for done, future in enumerate(as_completed(waiting), 1):
            row = rows[waiting[future]]
            try:
                row.take(future.result())
            except Exception as error:  # noqa: BLE001 - a job that fails is a wrong result
                row.take({"wrong": 1, "why": [f"{type(error).__name__}: {error}"], "seconds": 0.0})
            counts = f"{row.cases:,}, {row.lost} lost, {row.wrong} wrong"
            _say(began, f"{done}/{len(jobs)}  {row.what}: {counts}")
    if given.only in (name := "8 readers, 4 writers, seal and replace"):
        rows[name] = Row(name)
        rows[name].take(work(_crowd, (numbers["seconds"],), place))
    return _report(list(rows.values()), given, began)


def _report(rows: list[Row], given: argparse.Namespace, began: float) -> int:
    missing = skipped()
    print(table(rows))
    for row in rows:
        for why in row.why if not row.control and not row.good else ():
            print(f"  {row.what}: {why}")
    for why in missing:
        print(f"  skipped: {why}")
    seconds = round(time.monotonic() - began)
    good = all(row.good for row in rows) and not missing
    print(f"{'good' if good else 'NOT GOOD'}, {seconds} s")
    if given.json:
        plain = [{**asdict(row), "good": row.good} for row in rows]
        record = {"good": good, "seconds": seconds, "skipped": missing, "rows": plain}
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
