"""Several processes, each with the whole model on a device of its own, share the units of a plan.

Every process commits into the same folder, which needs no lock; this one hands out the units, shows
progress and seals. Requests and replies are lines of JSON on the pipes of `worker`.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cache import errors
from cache.errors import SystemRefusedError, VademecumError
from knowledge_extract.crew import Crew, Done, OneProcess, Workplace, model_key
from knowledge_extract.engine import Fp16OverflowError
from knowledge_extract.job import Job
from knowledge_extract.model import pick_device
from knowledge_extract.settings import RunSettings
from knowledge_extract.units import Unit

# -P: a folder called `cache` where the user stands must not be imported.
WORKER = ("-P", "-m", "knowledge_extract.worker")
PATIENCE = 10.0  # seconds a process is given to leave by itself


def crew_for(run: RunSettings) -> Crew:
    """This process, or as many as the run asks for.

    Raises:
        SystemRefusedError: more processes than GPUs, or beside a device map.
    """
    return OneProcess(run) if run.processes == 1 else Processes(run)


def devices_for(run: RunSettings) -> list[str]:
    """The device of each process.

    Raises:
        SystemRefusedError: see `crew_for`.
    """
    if run.processes < 1:
        what, wanted = "the number of processes is wrong", "1 or more"
        raise SystemRefusedError(what, found=run.processes, wanted=wanted)
    if run.device_map is not None:
        what = "a device map spreads one model over all devices, so there can be but one process"
        do = "Leave out one of the two."
        raise SystemRefusedError(what, found=f"{run.processes} processes", do=do)
    device = pick_device(run.device)
    if device == "cpu":
        return [device] * run.processes
    there = torch.cuda.device_count()
    if device != "cuda" or run.processes > there:
        what, do = "there must be a GPU for every process", "Use --device cuda, or fewer processes."
        found = f"{run.processes} processes for {there} GPUs, device {device}"
        raise SystemRefusedError(what, found=found, do=do)
    return [f"cuda:{number}" for number in range(run.processes)]


class _Process:
    """One process and the unit it works on."""

    def __init__(self, run: RunSettings, name: str) -> None:
        self.name = name
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = asdict(run) | {"models": str(run.models) if run.models else None}
        self._popen = subprocess.Popen(  # noqa: S603
            [sys.executable, *WORKER, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(run.threads)},
        )
        assert self._popen.stdin is not None  # noqa: S101 - pipes were asked for
        assert self._popen.stdout is not None  # noqa: S101
        self._requests, self.replies = self._popen.stdin, self._popen.stdout

    @property
    def pid(self) -> int:
        """Of the operating system."""
        return self._popen.pid

    def ask(self, request: dict[str, Any]) -> None:
        """Sends a request.

        Raises:
            SystemRefusedError: the process is gone.
        """
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError as error:
            raise self._gone() from error

    def answer(self) -> Done:
        """The reply to a unit.

        Raises:
            VademecumError: what went wrong there, or the process is gone.
            Fp16OverflowError: a value that only float32 holds.
        """
        line = self.replies.readline()
        if not line.endswith(b"\n"):
            raise self._gone()
        reply = json.loads(line)
        if "error" not in reply:
            return Done(**reply)
        if reply["error"] == Fp16OverflowError.__name__:
            raise Fp16OverflowError(reply["message"])
        kind = getattr(errors, reply["error"], None)
        if kind is not None:
            refusal: VademecumError = kind(reply["message"])
            raise refusal
        what, do = "an extraction process failed", "What was committed stays."
        found = f"{reply['error']}: {reply['message']}"
        raise SystemRefusedError(what, where=self.name, found=found, do=do)

    def end(self) -> None:
        """Ends it, at work or not; what it committed stays."""
        with suppress(OSError):
            self._requests.close()
        self._popen.terminate()
        try:
            self._popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self.replies.close()

    def _gone(self) -> SystemRefusedError:
        code = self._popen.wait()
        what = f"an extraction process ended with code {code}"
        if code < 0:
            what = f"an extraction process was ended by {signal.Signals(-code).name}"
        do = "What was committed stays; run again, with fewer processes if memory ran out."
        return SystemRefusedError(what, where=self.name, do=do)


class Processes:
    """As many processes as the run asks for, started when there is work.

    Args:
        run: where to compute; CPU threads are divided unless their number is given.

    Raises:
        SystemRefusedError: see `crew_for`.
    """

    def __init__(self, run: RunSettings) -> None:
        self.devices: list[str] = []
        self.load_seconds = 0.0
        self._devices = devices_for(run)
        threads = run.threads or max(1, torch.get_num_threads() // run.processes)
        self._run = replace(run, processes=1, threads=threads)
        self._processes: list[_Process] = []
        self._held: tuple[str, str, str] | None = None

    @property
    def pids(self) -> list[int]:
        """Of the processes that were started."""
        return [process.pid for process in self._processes]

    def holds(self, job: Job, quantisation: str) -> bool:
        """True if the model was the last one they were asked for."""
        return self._held == model_key(job, quantisation)

    def work(
        self, place: Workplace, quantisation: str, units: Sequence[Unit], limit: int
    ) -> Iterator[Done]:
        """Hands out units until all are committed; see `Crew`."""
        self._held = model_key(place.job, quantisation)
        place.job.source.weights()  # fetched or converted once, not by each
        order = {unit: number for number, unit in enumerate(place.job.units)}
        numbers = [order[unit] for unit in units]
        try:
            yield from self._hand_out(numbers, _opening(place, quantisation, limit))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends every process."""
        for process in self._processes:
            process.end()
        self._processes.clear()
        self._held = None

    def _hand_out(self, numbers: list[int], opening: dict[str, Any]) -> Iterator[Done]:
        """One unit at a time to each process."""
        self._start(len(numbers))
        with selectors.DefaultSelector() as waiting:
            for process in self._processes[: len(numbers)]:
                process.ask({"open": opening, "unit": numbers.pop(0)})
                waiting.register(process.replies, selectors.EVENT_READ, process)
            while waiting.get_map():
                for key, _ in waiting.select():
                    process = key.data
                    done = process.answer()
                    if numbers:
                        process.ask({"unit": numbers.pop(0)})
                    else:
                        waiting.unregister(process.replies)
                    yield done

    def _start(self, wanted: int) -> None:
        for device in self._devices[len(self._processes) : wanted]:
            name = f"process {len(self._processes) + 1} on {device}"
            self._processes.append(_Process(replace(self._run, device=device), name))
        self.devices = self._devices[: len(self._processes)]


def _opening(place: Workplace, quantisation: str, limit: int) -> dict[str, Any]:
    """What a process needs to open the same workplace; of a folder's model, the digests too."""
    source = place.job.source
    found = None
    if source.conversion is None:
        found = {k: v for k, v in vars(source).items() if k != "conversion"}
    return {
        "recipe": place.job.recipe.model_dump(mode="json"),
        "source": found,
        "folder": str(place.folder),
        "wide": place.wide,
        "quantisation": quantisation,
        "limit": limit,
    }
