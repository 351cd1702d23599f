"""The demo: a list of the same commands a user types, read from a file."""

import json
import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cache.durable import storage_errors
from cache.errors import RecipeError, RunError, StorageError
from cache.recipe import RecipePart, parse_yaml, read_yaml, validate

LISTS = Path(__file__).parent / "presets" / "demo"
Count = Annotated[int, Field(ge=0)]


class Step(RecipePart):
    """One command, and how many images it encodes and trains through the image tower."""

    run: str
    encodes: Count = 0
    trains: Count = 0


@dataclass(frozen=True)
class Command:
    """One command of the demo: the line to show, and its arguments."""

    line: str
    arguments: list[str]
    step: Step

    @property
    def done(self) -> bool:
        """Whether its result is there already, for `align` and `tune`; the others are quick."""
        from prompt_tune.alignment_record import RECORD
        from prompt_tune.checkpoint import read_run

        if self.arguments[0] not in {"align", "tune"} or "--out" not in self.arguments:
            return False
        out = Path(self.arguments[self.arguments.index("--out") + 1])
        try:
            return (out / RECORD).is_file() or read_run(out).get("status") == "finished"
        except RunError:
            return False


def commands(out: Path, *, full: bool = False) -> list[Command]:
    """The demo's commands with `{out}` filled in; makes `out`.

    The list is `presets/demo/short.yaml`, or `full.yaml` with all splits and published budgets.

    Raises:
        StorageError: `out` cannot be a folder.
    """
    if out.is_file():
        raise StorageError("is a file", where=out, wanted="a folder")
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    path = LISTS / ("full.yaml" if full else "short.yaml")
    found = []
    for row in read_yaml(path):
        step = validate(Step, {"run": row} if isinstance(row, str) else row, where=path)
        arguments = _filled(shlex.split(step.run), str(out))
        found.append(Command(shlex.join(arguments), arguments, step))
    return found


def _filled(words: list[str], out: str) -> list[str]:
    """`{out}` filled in, after `--set` as YAML reads it back."""
    filled = []
    for before, word in zip(["", *words], words, strict=False):
        key, equals, value = word.partition("=")
        if before == "--set" and equals and "{out}" in value:
            filled.append(f"{key}={_scalar(value.replace('{out}', out))}")
        else:
            filled.append(word.replace("{out}", out))
    return filled


def _scalar(text: str) -> str:
    """A text as YAML, plain where that is read back as the same text."""
    try:
        return text if parse_yaml(text, where="--set") == text else json.dumps(text)
    except RecipeError:
        return json.dumps(text)


def predicted_seconds(steps: list[Command], *, device: str = "auto") -> float:
    """Seconds the image tower will need for what is not done, from its speed measured here.

    A ViT-B/16 with random weights encodes, and encodes and differentiates, a batch on the device
    that the commands will use. Text towers and the language model are left out: with 8 classes
    they are the smaller part of the work. An unfinished run counts from its start.
    """
    left = [command.step for command in steps if not command.done]
    if not any(step.encodes or step.trains for step in left):
        return 0.0
    import open_clip
    import torch

    from prompt_tune.setup import pick_device

    where = pick_device(device)
    logging.disable(logging.WARNING)  # random weights are meant here; open_clip warns of them
    try:
        tower = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).visual.to(where)
    finally:
        logging.disable(logging.NOTSET)
    tower.requires_grad_(requires_grad=False)
    pixels = torch.zeros(4 if where == "cpu" else 64, 3, 224, 224, device=where)

    def encode() -> None:
        with torch.inference_mode():
            tower(pixels)

    def differentiate() -> None:
        tower(pixels.detach().requires_grad_()).sum().backward()

    forward, both = (_seconds(work, where) / len(pixels) for work in (encode, differentiate))
    return sum(step.encodes * forward + step.trains * both for step in left)


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Seconds of `work`, done once before."""
    import torch

    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def describe_prediction(seconds: float) -> str:
    """The prediction as one line."""
    hours = seconds / 3600
    shown = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
    return (
        f"predicted: {shown} of image encoding and training on this machine, finished runs left "
        "out; resumable"
    )
