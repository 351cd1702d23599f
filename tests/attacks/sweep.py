"""Builds every attack, probes it in a child process and reads the trace of its system calls."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5_files
import headers
import make
import numpy as np
from hdf5_files import Attack

HERE = Path(__file__).resolve().parent
QUIET = {"stat", "lstat", "newfstatat", "statx", "access", "faccessat2", "readlink", "getcwd"}
_CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\((.*)$")
_NAME = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Outcome:
    """What one attack met."""

    attack: Attack
    probe: dict[str, Any]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Opening, reading everything and, if asked for, verifying."""
        names = ("_open_only", "read_everything", "verify")
        return [self.probe[name] for name in names if name in self.probe]

    @property
    def refused_by(self) -> str | None:
        """`open`, `read` (at first touch) or `verify`; None if nothing refused it."""
        names = ("open", "read", "verify")
        return next((n for n, s in zip(names, self.steps, strict=False) if s["refused"]), None)

    @property
    def seconds(self) -> float:
        """Processor time of the slowest step."""
        return max(float(step["seconds"]) for step in self.steps)

    @property
    def label(self) -> str:
        """Form and name."""
        return f"{self.attack.form}: {self.attack.name}"


def build_all(folder: Path) -> list[Attack]:
    """Every hostile file, in `folder`, beside a sound cache and a file that none may open."""
    make.cache_at(folder / "first.h5")
    sealed = (folder / "first.h5").read_bytes()
    victim = folder / "victim.h5"
    with h5py.File(victim, "w") as file:
        file["x"] = np.arange(4, dtype="f4")
    os.mkfifo(folder / "pipe")
    return hdf5_files.build(folder, victim, sealed) + headers.build(folder, sealed)


def probe(
    folder: Path, attacks: list[Attack], mode: str, trace: Path | None = None
) -> list[Outcome]:
    """What happens to every attack in a fresh child; `mode` is `open` or `verify`."""
    command = [sys.executable, str(HERE / "probe.py"), str(folder), mode]
    if trace is not None:
        command = ["strace", "-f", "-s", "4096", "-e", "trace=%file,%network,%process", "-o",
                   str(trace), *command]  # fmt: skip
    # The plug-in folder is one the HDF5 library would search for unknown filters.
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    environment["HDF5_PLUGIN_PATH"] = str(folder / "plugins")
    lines = "".join(f"{attack.path}\n" for attack in attacks)
    done = subprocess.run(
        command, input=lines, text=True, capture_output=True, env=environment, check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(found) != len(attacks):
        at = attacks[min(len(found), len(attacks) - 1)].name
        msg = f"the reader died with {done.returncode} at {at!r}: {done.stderr[-2000:]}"
        raise AssertionError(msg)
    return [Outcome(a, p) for a, p in zip(attacks, found, strict=True)]


def strangers(trace: Path, attacks: list[Attack]) -> list[str]:
    """Every call of a traced probe that touched more than the file it was given."""
    found, current, marks = [], None, 0
    for line in trace.read_text("utf-8", "replace").splitlines():
        match = _CALL.match(line)
        if match is None:
            continue
        call, rest = match[1], match[2]
        names = _NAME.findall(rest)
        mark = next((n for n in names if n.startswith("/mark/")), None)
        if mark is not None:
            current = None if mark == "/mark/end" else attacks[int(mark.removeprefix("/mark/"))]
            marks += current is not None
        elif current is not None and call not in QUIET:
            read_only = call == "openat" and "O_RDONLY" in rest and "O_CREAT" not in rest
            if not (read_only and names == [str(current.path)]):
                found.append(f"{current.form}: {current.name}: {call}({rest[:200]}")
    if marks != len(attacks):
        msg = f"{marks} marks in the trace for {len(attacks)} attacks"
        raise AssertionError(msg)
    return found
