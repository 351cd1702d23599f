"""Run folders: trainable tensors in safetensors, everything else in JSON; no pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cache.durable import write_atomic
from cache.errors import RunError

RUN, WEIGHTS, STATE = "run.json", "weights.safetensors", "state.safetensors"


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


def load_state(folder: Path, *, recipe_digest: str) -> TrainState | None:
    """The saved training state, or None where there is none.

    Raises:
        RunError: the state is damaged or belongs to another recipe.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        saved, epoch, step = header["recipe"], int(header["epoch"]), int(header["step"])
        notes = json.loads(header["notes"])
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        what = f"the training state cannot be read ({error.__class__.__name__})"
        raise RunError(what, where=path, do="Delete the run folder and start again.") from error
    if saved != recipe_digest:
        what = "the run folder holds an unfinished run of another recipe"
        raise RunError(what, where=folder, do="Choose another --out, or pass --overwrite.")
    return TrainState(epoch, step, tensors, notes)


def load_weights(path: Path, into: Mapping[str, nn.Parameter]) -> None:
    """Copies saved tensors into parameters; names and shapes must agree exactly.

    Raises:
        RunError: missing, damaged, or not made for this method.
    """
    try:
        saved = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        what = f"the weights cannot be read ({error.__class__.__name__})"
        raise RunError(what, where=path) from error
    for name in sorted(set(saved) ^ set(into)):
        what = f"tensor {name!r} is {'unexpected' if name in saved else 'missing'}"
        raise RunError(what, where=path, do="The weights belong to another recipe.")
    with torch.no_grad():
        for name, parameter in into.items():
            value = saved[name]
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                what = f"tensor {name!r} does not fit"
                found = f"{list(value.shape)} {value.dtype}"
                wanted = f"{list(parameter.shape)} {parameter.dtype}"
                raise RunError(what, where=path, found=found, wanted=wanted)
            if not torch.isfinite(value).all():
                raise RunError(f"tensor {name!r} has non-finite values", where=path)
            parameter.copy_(value)


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON, numbers as numbers, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json` of a run folder.

    Raises:
        RunError: not a run folder, or damaged.
    """
    path = folder / RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError("not a run folder", where=folder, wanted=RUN) from error
    except (OSError, ValueError) as error:
        raise RunError("damaged run.json", where=folder) from error
    if not isinstance(run, dict) or "recipe" not in run:
        raise RunError("damaged run.json", where=folder)
    return run
