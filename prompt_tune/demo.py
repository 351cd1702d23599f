"""The demo: a list of the same commands a user types, read from a file."""

import logging
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cache.recipe import RecipePart, read_yaml, validate

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


def commands(out: Path, *, full: bool = False) -> list[Command]:
    """The demo's commands with `{out}` filled in; makes `out`.

    The list is `presets/demo/short.yaml`, or `full.yaml` with all splits and published budgets.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = LISTS / ("full.yaml" if full else "short.yaml")
    found = []
    for row in read_yaml(path):
        step = validate(Step, {"run": row} if isinstance(row, str) else row, where=path)
        line = step.run.format(out=shlex.quote(str(out)))
        found.append(Command(line, shlex.split(line), step))
    return found


def predicted_seconds(steps: list[Command], *, device: str = "cpu") -> float:
    """Seconds the image tower will need, from its measured speed on this machine.

    A ViT-B/16 with random weights encodes, and encodes and differentiates, a batch of 4. Text
    towers and the language model are left out: with 8 classes they are a tenth of the work.
    """
    import open_clip
    import torch

    logging.disable(logging.WARNING)  # random weights are meant here; open_clip warns of them
    try:
        tower = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).visual.to(device)
    finally:
        logging.disable(logging.NOTSET)
    pixels = torch.zeros(4, 3, 224, 224, device=device)
    with torch.inference_mode():
        tower(pixels)
        began = time.perf_counter()
        tower(pixels)
        forward = (time.perf_counter() - began) / 4
    pixels.requires_grad_()
    tower.requires_grad_(requires_grad=False)
    began = time.perf_counter()
    tower(pixels).sum().backward()
    both = (time.perf_counter() - began) / 4
    return sum(c.step.encodes * forward + c.step.trains * both for c in steps)


def describe_prediction(seconds: float) -> str:
    """The prediction as one line."""
    hours = seconds / 3600
    shown = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
    return f"predicted: {shown} of image encoding and training on this machine; resumable"
