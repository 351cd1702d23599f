"""Where the time of a training step goes: torch's profile, by kind of operation.

    python bench/profiles.py [--batch 8] [--classes 8] [--aligned FOLDER --data bloodmnist]

The text side, the image side and the whole of a CILMP step as in bench/tune.py; with --aligned also
a CoOp step of 32 images on cached features of that backbone, in fp32 and in bf16. Shares are of the
processor time (of the GPU's on a GPU) that operations take themselves, without what they call.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/cache.py is not our cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.tune import FUSED, backbone_of, case_of, seconds_of, work
from prompt_tune.seeds import make_deterministic

KINDS = {
    "matrix products": ("mm", "linear", "conv", "matmul"),
    "attention": ("attention", "softmax"),
}


def kind_of(name: str) -> str:
    """What an operation is counted as."""
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "all else"


def profiled(step: Callable[[], Any], repeats: int = 3) -> dict[str, Any]:
    """Shares of a step's time by kind, the largest of all else, its seconds and GFLOP."""
    step()
    gpu = torch.cuda.is_available()
    best = min(seconds_of(step, "cuda" if gpu else "cpu") for _ in range(repeats))
    with FlopCounterMode(display=False, custom_mapping=FUSED) as flops:
        step()
    with torch.profiler.profile() as profile:
        for _ in range(repeats):
            step()
    own = {
        event.key: event.self_device_time_total if gpu else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    whole, shares = sum(own.values()), dict.fromkeys((*KINDS, "all else"), 0.0)
    for name, taken in own.items():
        shares[kind_of(name)] += taken / whole
    rest = sorted((n for n in own if kind_of(n) == "all else"), key=lambda n: -own[n])[:3]
    largest = ", ".join(f"{n.removeprefix('aten::')} {own[n] / whole:.0%}" for n in rest)
    return {
        "seconds": best, "gflop": flops.get_total_flops() / 1e9, "shares": shares,
        "largest": largest,
    }  # fmt: skip


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    shares = " | ".join(f"{share:.0%}" for share in found["shares"].values())
    numbers = f"{found['seconds']:.3g} | {found['gflop']:.3g}"
    return f"| {name} | {numbers} | {shares} | {found['largest']} |"


def coop_steps(folder: Path, data: str, batch: int = 32) -> dict[str, Callable[[], Any]]:
    """A CoOp step on cached features, by precision."""
    from prompt_tune.backbone import BackboneSpec, load_backbone
    from prompt_tune.data.source import load_data
    from prompt_tune.execution import Execution, executing
    from prompt_tune.method import Batch, Problem
    from prompt_tune.methods import METHODS

    whole = load_backbone(BackboneSpec(aligned=str(folder)))
    names = tuple(c.name for c in load_data(data).classes)
    labels = torch.arange(batch) % len(names)
    features = torch.nn.functional.normalize(torch.randn(batch, whole.embed_dim), dim=-1)
    steps = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        problem = Problem(executing(whole, Execution(precision)), names)
        method = METHODS["coop"](METHODS["coop"].Config(name="coop"), problem).train()
        given = Batch(labels=labels, features=features)
        steps[f"CoOp, {precision}"] = lambda method=method, given=given: method.backward(given)
    return steps


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--aligned", type=Path)
    parser.add_argument("--data", default="bloodmnist")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make_deterministic(device)
    case = case_of(backbone_of(device, options.precision), options.batch, options.classes, device)
    parts = {f"CILMP, {part}": work(case, "ours", part) for part in ("text", "image", "whole")}
    steps: dict[str, Callable[[], Any]] = {
        name: lambda forward=forward: forward().backward() for name, forward in parts.items()
    }
    if options.aligned:
        steps |= coop_steps(options.aligned, options.data)
    kinds = " | ".join((*KINDS, "all else"))
    print(f"| step | seconds | GFLOP | {kinds} | largest of all else |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for name, step in steps.items():
        print(line(name, profiled(step)), flush=True)


if __name__ == "__main__":
    main()
