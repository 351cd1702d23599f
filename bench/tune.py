"""A CILMP step against the same method written plainly, in one run.

    python bench/tune.py [--batch 4 16 64] [--classes 2 8 20 100] [--max-gb 12] [--max-minutes 20]

Three contenders with the same parameters: `ours`, `batched` (plain, loop-free) and `literal` (image
by image and row by row, as the published code is organised), on OpenAI's ViT-B/16 with random
weights, 32 rows of width 4096, depth 12 and 12, dropout off unless said. Per part (text, image,
whole): processor seconds of forward and backward, matmul GFLOP as torch counts them, bytes kept for
the backward. Logits of all contenders are compared first. What would not fit is predicted, not run.
Prints Markdown tables and, with --json, writes everything.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/cache.py is not our cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import prompt_tune  # noqa: F401 - makes torchvision importable

ROWS, WIDTH = 32, 4096
NAMES = ("cell", "red cell", "small round nucleus", "lesion with irregular border")


@dataclass
class Case:
    """One problem and the three ways to its logits."""

    method: Any
    plain: Any
    literal: Any
    images: Tensor
    labels: Tensor
    features: Tensor


def backbone_of(device: str) -> Any:
    """ViT-B/16 with random weights and every bias and gain randomised."""
    import logging

    import open_clip

    from prompt_tune.backbone import Backbone
    from prompt_tune.preprocess import Preprocess

    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    name = "ViT-B-16-quickgelu"
    model = open_clip.create_model(name, pretrained=None)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("ln" in key or "bias" in key):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Backbone.of(
        model,
        open_clip.get_tokenizer(name),
        name="random ViT-B/16",
        config=open_clip.get_model_config(name),
        preprocess=Preprocess.from_open_clip(model.visual.preprocess_cfg),
        notes={},
        device=device,
    )


def case_of(backbone: Any, batch: int, classes: int, device: str, dropout: float) -> Case:
    """A method, its plain twins and a batch."""
    from bench.plain_cilmp import PlainCilmp
    from prompt_tune.method import KnowledgeRows, Problem
    from prompt_tune.methods.cilmp import CILMP, CilmpConfig

    torch.manual_seed(1)
    names = tuple(f"{NAMES[k % len(NAMES)]} {k}" for k in range(classes))
    rows = torch.randn(classes, ROWS, WIDTH)
    rows[:, :, :8] *= 20  # language models have a few loud channels
    problem = Problem(backbone=backbone, class_names=names, rows=KnowledgeRows(tuple(rows)), seed=1)
    config = CilmpConfig(dropout=dropout)
    method = CILMP(config, problem).to(device)
    tower = method.layout
    shared = dict(
        clip=backbone.model, parameters=method.trainable(), rows=rows.to(device),
        tails=[[*ids, tower.end_id] for ids in tower.name_ids], start=tower.start_id,
        prefix=config.prefix, suffix=config.suffix, dropout=dropout,
    )  # fmt: skip
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.arange(batch, device=device) % classes
    features = torch.nn.functional.normalize(torch.randn(batch, backbone.embed_dim), dim=-1)
    return Case(
        method, PlainCilmp(**shared), PlainCilmp(**shared, form="literal"), images, labels,
        features.to(device),
    )  # fmt: skip


def work(case: Case, who: str, part: str) -> Callable[[], Tensor]:
    """Forward of one part by one contender, ending in a scalar."""
    from prompt_tune.method import Batch

    plain = case.literal if who == "literal" else case.plain

    def text(v: Tensor) -> Tensor:
        if who == "ours":
            return case.method.cosine_logits(v, case.method.text_features(v))
        return plain.logits(v)

    def image() -> Tensor:
        if who == "ours":
            return case.method.image_features(Batch(labels=case.labels, images=case.images))
        return plain.image_features(case.images)

    def run() -> Tensor:
        case.method.train()
        if part == "image":
            return image().square().sum() + image_weights(case)
        # the gradient reaches the features too, as in a whole step
        v = case.features.clone().requires_grad_() if part == "text" else image()
        return torch.nn.functional.cross_entropy(text(v), case.labels)

    return run


def image_weights(case: Case) -> Tensor:
    """Nothing, but a scalar every image prompt reaches."""
    return sum(p.sum() for n, p in case.method.trainable().items() if "visual" in n) * 0.0


def saved_bytes(forward: Callable[[], Tensor], fixed: set[int]) -> int:
    """Bytes of distinct storages kept for the backward, parameters and inputs apart."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(kept.values())
    del loss
    return total


def measure(case: Case, who: str, part: str, repeats: int, device: str) -> dict[str, float]:
    """Seconds, GFLOP and saved GB of one forward and backward."""
    forward = work(case, who, part)
    fixed = {p.untyped_storage().data_ptr() for p in case.method.backbone.model.parameters()}
    fixed |= {p.untyped_storage().data_ptr() for p in case.method.parameters()}
    fixed |= {b.untyped_storage().data_ptr() for b in case.method.buffers()}
    fixed |= {t.untyped_storage().data_ptr() for t in (case.images, case.plain.hidden)}
    saved = saved_bytes(forward, fixed)
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter if device == "cuda" else time.process_time
        began = clock()
        forward().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - began)
        for p in case.method.parameters():
            p.grad = None
    return {
        "seconds": best,
        "gflop": counter.get_total_flops() / 1e9,
        "saved_gb": saved / 1e9,
    }


def predicted(batch: int, classes: int, who: str) -> float:
    """GB a plain step keeps: about 34 widths per position and block, text and image, and rows."""
    text = batch * classes * 77 * 512 * 12 * 16 * 4
    rows = batch * classes * 12 * (8 * 5 + 32) * WIDTH * 4
    image = batch * 201 * 768 * 12 * 16 * 4
    return (image + (text + rows if who != "ours" else 0.12 * text)) / 1e9


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per cell and part."""
    lines = [
        "| classes | batch | part | ours s | batched / ours | literal / ours | GFLOP ours | "
        "GFLOP batched / ours | saved GB ours | saved batched / ours |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = row["cells"]
        ours = cells["ours"]

        def ratio(who: str, key: str, cells: Any = cells, ours: Any = ours) -> str:
            other = cells[who]
            return f"{other[key] / ours[key]:.2f}" if isinstance(other, dict) else other

        lines.append(
            f"| {row['classes']} | {row['batch']} | {row['part']} | {ours['seconds']:.3f} | "
            f"{ratio('batched', 'seconds')} | {ratio('literal', 'seconds')} | "
            f"{ours['gflop']:.1f} | {ratio('batched', 'gflop')} | {ours['saved_gb']:.3f} | "
            f"{ratio('batched', 'saved_gb')} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures every cell that fits and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 8, 20, 100])
    parser.add_argument("--parts", nargs="+", default=["text", "image", "whole"])
    parser.add_argument("--max-gb", type=float, default=12)
    parser.add_argument("--max-minutes", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    backbone = backbone_of(options.device)
    rows: list[dict[str, Any]] = []
    rates: dict[str, float] = {}  # minutes per GFLOP, from the cells already measured
    for classes in options.classes:
        for batch in options.batch:
            case = case_of(backbone, batch, classes, options.device, options.dropout)
            worst = compare(case) if batch * classes <= 64 and not options.dropout else None
            for part in options.parts:
                cells: dict[str, Any] = {}
                for who in ("ours", "batched", "literal"):
                    if part == "image" and who == "literal":
                        cells[who] = "-"
                        continue
                    gb = predicted(batch, classes if part != "image" else 0, who)
                    minutes = rates.get(f"{who} {part}", 0.0) * batch * max(classes, 1)
                    if gb > options.max_gb or minutes * (options.repeats + 2) > options.max_minutes:
                        cells[who] = f"does not fit ({gb:.0f} GB, {minutes:.0f} min a step)"
                        continue
                    cells[who] = measure(case, who, part, options.repeats, options.device)
                    rates[f"{who} {part}"] = cells[who]["seconds"] / 60 / (batch * classes)
                if isinstance(cells["ours"], dict):
                    row = {"classes": classes, "batch": batch, "part": part, "cells": cells}
                    rows.append({**row, "logits_max_abs": worst})
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
    print()
    print(table(rows))
    floor = zero_shot(backbone, options.device)
    print(f"\nzero-shot on the same tower: {floor:.2f} images per processor second")
    if options.json:
        facts = {
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "device": options.device, "machine": platform.machine(), "dropout": options.dropout,
            "zero_shot_images_per_second": floor, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=2))


def compare(case: Case) -> float:
    """The largest difference between the logits of ours and of both rivals."""
    with torch.no_grad():
        case.method.eval()
        ours = case.method.cosine_logits(case.features, case.method.text_features(case.features))
        others = [plain.logits(case.features) for plain in (case.plain, case.literal)]
    worst = max(float((ours - other).abs().max()) for other in others)
    assert worst < 1e-3, f"the contenders compute different things: {worst}"
    return worst


def zero_shot(backbone: Any, device: str, batch: int = 16) -> float:
    """Images per second through the image tower alone, the floor of every method on pixels."""
    images = torch.randn(batch, 3, 224, 224, device=device)
    with torch.inference_mode():
        backbone.image.encode(images)
        began = time.process_time()
        backbone.image.encode(images)
        return batch / (time.process_time() - began)


if __name__ == "__main__":
    main()
