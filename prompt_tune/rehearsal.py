"""What a step of a method asks of the towers, and how it should run in the memory there is.

The method is called once with towers that note what they are asked and compute nothing.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prompt_tune.memory import ImageStep, Plan, TextStep, Tower, free_bytes, plan
from prompt_tune.method import Batch, Method
from prompt_tune.towers import ImageTower, PromptLayout, Stage, TextTower

SHARE = 0.7  # of the memory that is free: gradients and what an operation needs come on top
IMAGES = 2  # of the rehearsal


def rehearse(method: Method, batch: int) -> tuple[list[ImageStep], list[TextStep]]:
    """The passes through image and text tower of a step of `batch` images that learn something.

    What a method keeps beside them is known of CILMP's interventions only.
    """
    seen: list[ImageStep] = []
    texts: list[TextStep] = []
    backbone, training = method.backbone, method.training
    image, text = copy.copy(backbone.image), copy.copy(backbone.text)

    def encode_images(images: Tensor, prompts: Sequence[Tensor] | None = None) -> Tensor:
        if prompts and any(prompt.requires_grad for prompt in prompts):
            seen.append(ImageStep(_size(image), batch, image.tokens, len(prompts[0]), len(prompts)))
        return images.new_ones(len(images), image.embed_dim)

    def encode_classes(layout: PromptLayout, stages: Sequence[Stage]) -> Tensor:
        each = max(_images(stage) for stage in stages)
        size = batch if each > 1 else 1
        texts.append(replace(_text(text, layout, stages, size), **_interventions(method, stages)))
        return torch.ones(each, layout.classes, text.embed_dim).to(text.device, text.dtype)

    image.encode, text.encode = encode_images, encode_classes  # type: ignore[method-assign]
    size = image.image_size
    like: dict[str, Any] = {"device": image.device, "dtype": image.dtype}
    example = Batch(
        torch.zeros(IMAGES, dtype=torch.long, device=image.device),
        images=torch.ones(IMAGES, 3, size, size, **like) if method.reads_images else None,
        features=torch.ones(IMAGES, backbone.embed_dim, **like),
    )
    try:
        method.backbone = replace(backbone, image=image, text=text)
        with torch.random.fork_rng(devices=[]):
            method.train().logits(example)
    finally:
        method.train(training).backbone = backbone
    return seen, texts


def planned(method: Method, batch: int, *, max_gb: float | None = None) -> Plan | None:
    """How a method's step runs on its backbone's device within `max_gb`, or what is free.

    None for methods that learn nothing through the towers.
    """
    images, texts = rehearse(method, batch)
    if not images and not texts:
        return None
    device, execution = method.backbone.device, method.backbone.image.execution
    budget = int(SHARE * free_bytes(device)) if max_gb is None else int(max_gb * 1e9)
    return plan(images, texts, execution, budget)


def _images(stage: Stage) -> int:
    """How many images the prompts of a stage are made for."""
    given = (stage.context, stage.prefix, stage.suffix)
    return max([x.shape[0] for x in given if x is not None and x.ndim == 4], default=1)


def _text(tower: TextTower, layout: PromptLayout, stages: Sequence[Stage], batch: int) -> TextStep:
    causal = tower.kind == "causal"
    basis = stages[0].basis
    return TextStep(
        _size(tower),
        batch,
        names=tuple(len(ids) + (1 if causal else 2) for ids in layout.name_ids),
        rows=layout.row_counts,
        context=layout.parts["context"].longest if "context" in layout.parts else 0,
        stages=len(stages),
        causal=causal,
        pooled=None if len(tower.reads) > 1 else 1,
        rank=0 if basis is None else basis.shape[0],
    )


def _interventions(method: Method, stages: Sequence[Stage]) -> dict[str, Any]:
    rows, settings = getattr(method, "rows", None), method.config
    if rows is None or stages[0].basis is None:
        return {}
    return {
        "source": rows.prefix.shape[1],
        "groups": sum(getattr(settings, name, 0) > 0 for name in ("prefix", "suffix")),
        "conditional": getattr(settings, "condition", "none") == "image",
    }


def _size(tower: ImageTower | TextTower) -> Tower:
    first, on_cpu = tower.blocks[0], tower.device.type == "cpu"
    sizes = tower.width, first.hidden, first.heads, len(tower.blocks), tower.dtype.itemsize
    return Tower(*sizes, on_cpu=on_cpu)
