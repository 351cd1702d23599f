"""Run folders: trainable tensors in safetensors, everything else in JSON; no pickle.

A run folder may come from a stranger. What a file may hold is known before it is read, from the
recipe's own model: names, types, shapes, and with them its size. Nothing else is accepted.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cache.durable import write_atomic
from cache.errors import RunError
from cache.plain import strict_json

RUN, WEIGHTS, STATE = "run.json", "weights.safetensors", "state.safetensors"
FORMAT = 1  # of run.json
LARGEST_JSON = 16 << 20
LARGEST_HEADER = 1 << 20
START_AGAIN = "Delete the run folder and start again."
_DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


@dataclass(frozen=True)
class TrainState:
    """Where training stands after a step; enough to continue bit for bit.

    Attributes:
        epoch: the epoch being trained, counted from 1.
        step: steps of that epoch already done.
        tensors: `trainable/`, `momentum/`, `average/`, `best/` and `loss_sum`.
        notes: history and selection so far.
    """

    epoch: int
    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def save_state(folder: Path, state: TrainState, *, recipe_digest: str) -> None:
    """Writes the training state in one atomic step."""
    header = {
        "epoch": str(state.epoch),
        "step": str(state.step),
        "recipe": recipe_digest,
        "notes": json.dumps(state.notes),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.tensors.items()}
    write_atomic(folder / STATE, safetensors.torch.save(tensors, metadata=header))


def load_state(
    folder: Path, *, recipe_digest: str, like: Mapping[str, Tensor], required: frozenset[str]
) -> TrainState | None:
    """The saved training state, or None where there is none.

    Args:
        folder: the run folder.
        recipe_digest: what the state must have been saved with.
        like: every tensor a state may hold, by name; only type and shape are used.
        required: the names it must hold.

    Raises:
        RunError: the state is damaged or belongs to another recipe.
    """
    path = folder / STATE
    try:
        with _regular(path) as file:
            header = _header(file, path)
            notes = header.pop("__metadata__", {})
            if notes.get("recipe") != recipe_digest:
                what = "the run folder holds an unfinished run of another recipe"
                do = "Choose another --out, or pass --overwrite."
                raise RunError(what, where=folder, do=do)
            epoch, step, history = _progress(notes, path)
            tensors = _tensors(file, path, header, like, required)
    except FileNotFoundError:
        return None
    return TrainState(epoch, step, tensors, history)


def load_weights(path: Path, into: Mapping[str, nn.Parameter]) -> None:
    """Copies saved tensors into parameters; names, types and shapes must agree exactly.

    Raises:
        RunError: missing, damaged, or not made for this method.
    """
    try:
        with _regular(path) as file:
            header = _header(file, path)
            header.pop("__metadata__", None)
            saved = _tensors(file, path, header, into, frozenset(into))
    except FileNotFoundError as error:
        what = "the weights cannot be read (FileNotFoundError)"
        raise RunError(what, where=path) from error
    with torch.no_grad():
        for name, parameter in into.items():
            parameter.copy_(saved[name])


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading; never waits for a FIFO or a device."""
    try:
        with open(path, "rb", opener=_opener) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RunError("not a regular file", where=path)
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        what = f"cannot be read ({error.strerror or error.__class__.__name__})"
        raise RunError(what, where=path) from error


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """The header of a safetensors file: its tables of tensors and its texts."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= LARGEST_HEADER:
        what = "damaged, or not safetensors: the length of the header is impossible"
        raise RunError(what, where=path, found=length, wanted=f"2 to {LARGEST_HEADER}")
    try:
        header = strict_json(file.read(length))
    except ValueError as error:
        raise RunError(f"damaged: its header is not JSON ({error})", where=path) from error
    tables = isinstance(header, dict) and all(isinstance(v, dict) for v in header.values())
    if not tables or not all(
        isinstance(text, str) for text in header.get("__metadata__", {}).values()
    ):
        raise RunError("damaged: its header is not a table of tables", where=path)
    return dict(header)


def _tensors(
    file: BinaryIO,
    path: Path,
    header: Mapping[str, Mapping[str, Any]],
    like: Mapping[str, Tensor],
    required: frozenset[str],
) -> dict[str, Tensor]:
    """The tensors of an open safetensors file, which must be of `like`; all is checked first."""
    unknown, missing = sorted(set(header) - set(like)), sorted(required - set(header))
    for name in (unknown + missing)[:1]:
        what = f"tensor {ascii(name)[:100]} is {'unexpected' if unknown else 'missing'}"
        raise RunError(what, where=path, do="The weights belong to another recipe.")
    size = file.tell()
    for name, found in header.items():
        wanted = like[name]
        if found.get("dtype") != _DTYPES[wanted.dtype] or found.get("shape") != [*wanted.shape]:
            have = f"{ascii(found.get('shape'))[:60]} {ascii(found.get('dtype'))[:20]}"
            need = f"{[*wanted.shape]} {_DTYPES[wanted.dtype]}"
            raise RunError(f"tensor {name!r} does not fit", where=path, found=have, wanted=need)
        size += wanted.numel() * wanted.element_size()
    on_disk = os.fstat(file.fileno()).st_size
    if on_disk != size:
        what = "damaged: another size than its header says"
        raise RunError(what, where=path, found=on_disk, wanted=size)
    file.seek(0)
    try:
        tensors = safetensors.torch.load(file.read(size))
    except safetensors.SafetensorError as error:
        what = f"the weights cannot be read ({error.__class__.__name__})"
        raise RunError(what, where=path) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RunError(f"tensor {name!r} has non-finite values", where=path)
    return tensors


def _progress(notes: Mapping[str, str], path: Path) -> tuple[int, int, dict[str, Any]]:
    """Epoch, step and history of a training state."""
    try:
        numbers = [notes[name] for name in ("epoch", "step")]
        history = strict_json(notes["notes"].encode())
        sound = (
            all(text.isdecimal() and text.isascii() and len(text) < 10 for text in numbers)
            and set(history) - {"seconds"} == {"history", "best_epoch", "best_score"}
            and type(history.setdefault("seconds", 0.0)) is float
            and all(isinstance(entry, dict) for entry in history["history"])
            and type(history["best_epoch"]) is int
            and type(history["best_score"]) in {int, float}
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or numbers[0].strip("0") == "":
        what = "the training state cannot be read: its notes are damaged"
        raise RunError(what, where=path, do=START_AGAIN)
    return int(numbers[0]), int(numbers[1]), history


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON, numbers as numbers, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A table from a JSON file in a run folder: strict, and of a bounded size.

    Raises:
        FileNotFoundError: there is none.
        RunError: damaged.
    """
    with _regular(path) as file:
        raw = file.read(LARGEST_JSON + 1)
    try:
        table = strict_json(raw) if len(raw) <= LARGEST_JSON else None
    except ValueError as error:
        raise RunError(f"damaged {path.name} ({error})", where=path.parent) from error
    if not isinstance(table, dict):
        what = f"damaged {path.name}"
        wanted = f"a table of at most {LARGEST_JSON >> 20} MiB"
        raise RunError(what, where=path.parent, wanted=wanted)
    return table


_FIELDS = {"digest": str, "status": str, "recipe": dict, "bindings": dict, "local": dict}
_FINISHED = {"parameters": dict, "training": dict}


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json` of a run folder.

    Raises:
        RunError: not a run folder, or damaged.
    """
    try:
        run = read_json(folder / RUN)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError("not a run folder", where=folder, wanted=RUN) from error
    if run.get("format") != FORMAT:
        what = f"{RUN} is of another format"
        raise RunError(what, where=folder, found=ascii(run.get("format"))[:30], wanted=FORMAT)
    fields = _FIELDS | (_FINISHED if run.get("status") == "finished" else {})
    wrong = [name for name, kind in fields.items() if not isinstance(run.get(name), kind)]
    places = [run["local"].get(name) for name in ("data", "knowledge")] if not wrong else []
    if wrong or not isinstance(places[0], str) or not isinstance(places[1], str | None):
        what = f"damaged {RUN}: {(wrong or ['local'])[0]}"
        raise RunError(what, where=folder)
    return run
