"""A CILMP step against the same method written plainly, in one run.

    python bench/tune.py [--batch 4 8 16 64] [--classes 2 8 20 100] [--max-gb 12] [--max-minutes 20]

Contenders with the same parameters: `ours`, `batched` (plain, loop-free) and `literal` (image by
image and row by row, as the published code is organised), on OpenAI's ViT-B/16 with random weights,
32 rows of width 4096, depth 12 and 12, without dropout; `ours` also with the published dropout.
Per part (text, image, whole; image at the first number of classes only), for one forward and
backward: processor seconds (best of the repeats; contenders take turns), matmul GFLOP as torch
counts them (attention's products too, the causal half not taken off), bytes kept for the backward,
highest memory, operations that are no views. Logits of all contenders are compared first.

What would not fit is predicted, not run: GFLOP and kept bytes from one small count (both are
straight lines in images and in images x classes), highest memory as 1.5 times those bytes, seconds
from the speed of what was measured. The floor is the time that the counted GFLOP take at the speed
of one large matrix product. Prints Markdown tables and, with --json, writes everything.
"""

import argparse
import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/cache.py is not our cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import prompt_tune  # noqa: F401 - makes torchvision importable
from prompt_tune.seeds import make_deterministic

ROWS, WIDTH, DROPOUT = 32, 4096, 0.1
NAMES = ("cell", "red cell", "small round nucleus", "lesion with irregular border")
WAYS = ("ours", "ours with dropout", "batched", "literal")
OVER = 1.5  # the highest memory of a step against what it keeps for the backward
IDLE = ("_unsafe_view", "empty", "promote_types", "_local_scalar_dense")
Forward = Callable[[], Tensor]
Shape = Sequence[int]


def _fused(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _fused_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


FUSED = {  # what torch counts on GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
}


@dataclass
class Case:
    """One problem and the ways to its logits."""

    method: Any
    dropped: Any
    plain: Any
    literal: Any
    images: Tensor
    labels: Tensor
    features: Tensor
    bf16: bool


def backbone_of(device: str, precision: Any = "fp32", *, compiled: bool = False) -> Any:
    """ViT-B/16 with random weights and every bias and gain randomised."""
    import logging

    import open_clip

    from prompt_tune.backbone import Backbone
    from prompt_tune.execution import Execution, executing
    from prompt_tune.preprocess import Preprocess

    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    name = "ViT-B-16-quickgelu"
    model = open_clip.create_model(name, pretrained=None)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("ln" in key or "bias" in key):
                parameter.add_(0.1 * torch.randn_like(parameter))
    backbone = Backbone.of(
        model,
        open_clip.get_tokenizer(name),
        name="random ViT-B/16",
        config=open_clip.get_model_config(name),
        preprocess=Preprocess.from_open_clip(model.visual.preprocess_cfg),
        notes={},
        device=device,
    )
    return executing(backbone, Execution(precision, compiled=compiled))


def case_of(backbone: Any, batch: int, classes: int, device: str, rows: int = ROWS) -> Case:
    """A method with and without dropout, its plain twins, and a batch."""
    from bench.plain_cilmp import PlainCilmp
    from prompt_tune.method import KnowledgeRows, Problem
    from prompt_tune.methods.cilmp import CILMP, CilmpConfig

    names = tuple(f"{NAMES[k % len(NAMES)]} {k}" for k in range(classes))
    torch.manual_seed(1)
    hidden = torch.randn(classes, rows, WIDTH)
    hidden[:, :, :8] *= 20  # language models have a few loud channels
    known = KnowledgeRows(tuple(hidden))
    problem = Problem(backbone=backbone, class_names=names, rows=known, seed=1)

    def method(dropout: float) -> Any:
        torch.manual_seed(2)
        return CILMP(CilmpConfig(dropout=dropout), problem).to(device).train()

    ours, config = method(0.0), CilmpConfig()
    tower = ours.layout
    shared = dict(
        clip=backbone.model, parameters=ours.trainable(), rows=hidden.to(device),
        tails=[[*ids, tower.end_id] for ids in tower.name_ids], start=tower.start_id,
        prefix=config.prefix, suffix=config.suffix,
    )  # fmt: skip
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.arange(batch, device=device) % classes
    features = torch.nn.functional.normalize(torch.randn(batch, backbone.embed_dim), dim=-1)
    return Case(
        ours, method(DROPOUT), PlainCilmp(**shared), PlainCilmp(**shared, form="literal"),
        images, labels, features.to(device), backbone.image.execution.precision == "bf16",
    )  # fmt: skip


def work(case: Case, way: str, part: str) -> Forward:
    """Forward of one part by one contender, ending in a scalar."""
    from prompt_tune.method import Batch

    method = {"ours": case.method, "ours with dropout": case.dropped}.get(way)
    plain = case.literal if way == "literal" else case.plain

    def text(v: Tensor) -> Tensor:
        if method is None:
            with torch.autocast(v.device.type, torch.bfloat16, enabled=case.bf16):
                return plain.logits(v).float()
        return method.cosine_logits(v, method.text_features(v))

    def image() -> Tensor:
        if method is None:
            with torch.autocast(case.images.device.type, torch.bfloat16, enabled=case.bf16):
                return plain.image_features(case.images).float()
        return method.image_features(Batch(labels=case.labels, images=case.images))

    def run() -> Tensor:
        if part == "image":
            return image().square().sum()
        # the gradient reaches the features too, as in a whole step
        v = case.features.clone().requires_grad_() if part == "text" else image()
        return torch.nn.functional.cross_entropy(text(v), case.labels)

    return run


class Saved:
    """Counts, while a forward runs, the bytes it keeps for the backward in distinct storages.

    Parameters and inputs are left out.
    """

    def __init__(self, case: Case) -> None:
        inputs = [case.images, case.plain.hidden, *case.method.backbone.model.parameters()]
        for method in (case.method, case.dropped):
            inputs += [*method.parameters(), *method.buffers()]
        self._fixed = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self._kept: dict[int, int] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._fixed:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def hooks(self) -> Any:
        """The context in which a forward runs."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def gb(self) -> float:
        """So far."""
        return sum(self._kept.values()) / 1e9


class Operations(TorchDispatchMode):
    """Counts the operations that compute or move something: about so many kernels on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += not (func.is_view or any(word in name for word in IDLE))
        return func(*args, **(kwargs or {}))


def counted(case: Case, way: str, part: str) -> dict[str, float]:
    """What of one forward and backward does not depend on the machine's speed."""
    forward, saved = work(case, way, part), Saved(case)
    with FlopCounterMode(display=False, custom_mapping=FUSED) as flops, Operations() as operations:
        with saved.hooks():
            loss = forward()
        gb = saved.gb
        loss.backward()
    forget(case)
    gflop = flops.get_total_flops() / 1e9
    return {"gflop": gflop, "saved_gb": gb, "operations": operations.count}


def forget(case: Case) -> None:
    """Drops the gradients."""
    for method in (case.method, case.dropped):
        method.zero_grad(set_to_none=True)


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Seconds of `work`: on a GPU the clock's, otherwise the processor's, all threads together."""
    if device != "cuda":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def resident(field: str) -> float:
    """A line of /proc/self/status, in GB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(field))


def peak_gb(work: Callable[[], Any], device: str) -> float:
    """The highest memory during `work` above that before it; 0 where the system does not say."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    if sys.platform != "linux":
        work()
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest so far
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def timed(case: Case, part: str, ways: list[str], repeats: int, device: str) -> dict[str, Any]:
    """Per contender, seconds and peak GB of one forward and backward; they take turns."""
    found: dict[str, Any] = {way: {"seconds": float("inf"), "peak_gb": 0.0} for way in ways}
    for turn in range(repeats):
        for way in ways if turn % 2 == 0 else ways[::-1]:
            forward, cell = work(case, way, part), found[way]

            def step(forward: Forward = forward, cell: Any = cell) -> None:
                seconds = seconds_of(lambda: forward().backward(), device)
                cell["seconds"] = min(cell["seconds"], seconds)

            cell["peak_gb"] = max(cell["peak_gb"], peak_gb(step, device))
            forget(case)
    return found


def matmul_rate(device: str, precision: str = "fp32", size: int = 2048) -> float:
    """GFLOP per second of a large matrix product, best of a few."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds_of(lambda: torch.mm(a, b), device) for _ in range(5))
    return 2 * size**3 / best / 1e9


class Predictions:
    """GB and minutes of a step that is not run.

    GFLOP and saved bytes are counted once for 4 classes, whose names are of all lengths, at one
    image and at two; dropout and loops change next to nothing in them. Seconds are GFLOP over the
    machine's matmul rate and over the share of it that the contender reached where it was last
    measured.
    """

    def __init__(self, backbone: Any, device: str, rate: float) -> None:
        self.rate, self.share = rate, {}
        one, two = (case_of(backbone, n, 4, device) for n in (1, 2))
        self.counts = {}
        for way, like in (("ours", "ours with dropout"), ("batched", "literal")):
            for part in ("text", "image"):
                found = counted(one, way, part), counted(two, way, part)
                self.counts[way, part] = self.counts[like, part] = found
            forward = work(two, way, "whole")
            seconds = seconds_of(lambda f=forward: f().backward(), device)
            self.learn(way, "whole", seconds, 2, 4)
            self.learn(like, "whole", seconds, 2, 4)

    def of(self, key: str, way: str, part: str, batch: int, classes: int) -> float:
        """`gflop` or `saved_gb`."""
        if part == "whole":
            return sum(self.of(key, way, one, batch, classes) for one in ("text", "image"))
        one, two = (count[key] for count in self.counts[way, part])
        units = batch * classes / 4 if part == "text" else batch
        return one + (two - one) * (units - 1)

    def learn(self, way: str, part: str, seconds: float, batch: int, classes: int) -> None:
        """Takes a measured step into account."""
        share = self.of("gflop", way, part, batch, classes) / self.rate / seconds
        self.share[way, part] = self.share[way, ""] = share

    def minutes(self, way: str, part: str, batch: int, classes: int) -> float:
        """Of one step."""
        share = self.share.get((way, part), self.share[way, ""])
        return self.of("gflop", way, part, batch, classes) / self.rate / share / 60


def measure(case: Case, part: str, options: Any, foresee: Predictions) -> dict[str, Any]:
    """The cell of every contender: what was measured, or the prediction of what does not fit."""
    place = (len(case.images), len(case.method.class_names))
    cells: dict[str, Any] = {}
    for way in WAYS:
        if part == "image" and way in {"ours with dropout", "literal"}:
            continue  # nothing about them is special
        gb = OVER * foresee.of("saved_gb", way, part, *place)
        minutes = foresee.minutes(way, part, *place)
        cells[way] = {"predicted_gb": gb, "predicted_minutes": minutes}
        if gb < options.max_gb and minutes * (options.repeats + 1) < options.max_minutes:
            cells[way] |= counted(case, way, part)
    ways = [way for way, cell in cells.items() if "gflop" in cell]
    for way, cell in timed(case, part, ways, options.repeats, options.device).items():
        cells[way] |= cell
        foresee.learn(way, part, cell["seconds"], *place)
    return cells


def shown(cells: Any, way: str, key: str, *, against: str = "ours") -> str:
    """How many times `against` a contender needs, or under seconds what it is predicted to need."""
    cell, other = cells.get(way), cells[against]
    if cell is None:
        return ""
    if "seconds" not in cell:
        gb, minutes = cell["predicted_gb"], cell["predicted_minutes"]
        return f"does not fit: {gb:.0f} GB, {minutes:.1f} min" if key == "seconds" else ""
    if way != against and "seconds" in other:
        return f"×{cell[key] / other[key]:.2f}"
    return f"{cell[key]:,.0f}" if cell[key] >= 100 else f"{cell[key]:.3g}"


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: time and work, then memory; one line per classes, batch and part."""
    titles = (
        "classes|batch|part|ours, s|share of floor|dropout adds|batched|literal"
        "|ours, GFLOP|batched|operations|batched|literal",
        "classes|batch|part|ours saves, GB|batched|ours at most, GB|dropout|batched|literal",
    )
    lines: list[list[str]] = [[], []]
    for title, out in zip(titles, lines, strict=True):
        out.append(f"| {title.replace('|', ' | ')} |")
        out.append("|---:|---:|---" + "|---:" * (title.count("|") - 2) + "|")
    for row in rows:
        cells, place = row["cells"], [str(row[k]) for k in ("classes", "batch", "part")]
        ours, dropped = cells["ours"], cells.get("ours with dropout", {})
        share = f"{row['floor_share']:.0%}" if "seconds" in ours else ""
        adds = ""
        if "seconds" in ours and "seconds" in dropped:
            adds = f"{dropped['seconds'] / ours['seconds'] - 1:+.0%}"
        time_of = [shown(cells, way, "seconds") for way in ("ours", "batched", "literal")]
        work_of = [shown(cells, way, "gflop") for way in ("ours", "batched")]
        number = [shown(cells, way, "operations") for way in ("ours", "batched", "literal")]
        saved = [shown(cells, way, "saved_gb") for way in ("ours", "batched")]
        ways = ("ours", "ours with dropout", "batched", "literal")
        peak = [shown(cells, way, "peak_gb") for way in ways]
        lines[0].append(
            f"| {' | '.join([*place, time_of[0], share, adds, *time_of[1:], *work_of, *number])} |"
        )
        lines[1].append(f"| {' | '.join([*place, *saved, *peak])} |")
    return "\n\n".join("\n".join(out) for out in lines)


def main() -> None:
    """Measures every cell that fits and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 8, 20, 100])
    parser.add_argument("--parts", nargs="+", default=["text", "image", "whole"])
    parser.add_argument("--max-gb", type=float, default=12, help="of a step's highest memory")
    parser.add_argument("--max-minutes", type=float, default=20, help="for one contender's cell")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="ours, by torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    make_deterministic(options.device)  # as `tune` does
    backbone = backbone_of(options.device, options.precision, compiled=options.compile)
    rate = matmul_rate(options.device, options.precision)
    foresee = Predictions(backbone, options.device, rate)
    rows: list[dict[str, Any]] = []
    for classes in options.classes:
        for batch in options.batch:
            case = case_of(backbone, batch, classes, options.device)
            small = batch * classes <= 64 and options.precision == "fp32"
            worst = compare(case) if small else None
            for part in options.parts:
                if part == "image" and classes != options.classes[0]:
                    continue  # the image tower knows nothing of classes
                cells = measure(case, part, options, foresee)
                rate = max(rate, matmul_rate(options.device, options.precision))
                row = {"classes": classes, "batch": batch, "part": part, "cells": cells}
                if "seconds" in (ours := cells["ours"]):
                    row["floor_share"] = ours["gflop"] / rate / ours["seconds"]
                rows.append({**row, "logits_max_abs": worst})
                print(tables(rows[-1:]).splitlines()[2], flush=True)
    print(f"\n{tables(rows)}")
    floor = zero_shot(backbone, options.device)
    unit = "second" if options.device == "cuda" else "processor second"
    print(f"\nzero-shot on the same tower: {floor:.2f} images per {unit}")
    print(f"a matrix product of 2048: {rate:.0f} GFLOP per {unit}")
    if options.json:
        facts = {
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "device": options.device, "precision": options.precision,
            "compiled": options.compile, "machine": platform.machine(), "matmul_gflops": rate,
            "zero_shot_images_per_second": floor, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=2))


def compare(case: Case) -> float:
    """The largest difference between the logits of ours and of both rivals."""
    with torch.no_grad():
        case.method.eval()
        ours = case.method.cosine_logits(case.features, case.method.text_features(case.features))
        case.method.train()
        others = [plain.logits(case.features) for plain in (case.plain, case.literal)]
    worst = max(float((ours - other).abs().max()) for other in others)
    assert worst < 1e-3, f"the contenders compute different things: {worst}"
    return worst


def zero_shot(backbone: Any, device: str, batch: int = 16) -> float:
    """Images per second through the image tower alone, the floor of every method on pixels."""
    images = torch.randn(batch, 3, 224, 224, device=device)
    with torch.inference_mode():
        backbone.image.encode(images)
        return batch / min(
            seconds_of(lambda: backbone.image.encode(images), device) for _ in range(2)
        )


if __name__ == "__main__":
    main()
