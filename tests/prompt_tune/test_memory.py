"""Predicted memory against what autograd really keeps, and what follows from it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.execution import Execution, executing
from prompt_tune.memory import ImageStep, TextStep, Tower, free_bytes, plan, planned, sides
from prompt_tune.method import Batch, KnowledgeRows, Problem
from prompt_tune.methods.cilmp import CILMP, CilmpConfig
from prompt_tune.methods.coop import CoOp, CoopConfig
from prompt_tune.preprocess import Preprocess

NAMES = ("cell", "red cell", "small round nucleus", "lesion with irregular border")


def kept_bytes(forward: Callable[[], Tensor], method: Any) -> int:
    """Bytes of distinct storages kept for the backward, parameters and rows apart."""
    own = [*method.backbone.model.parameters(), *method.parameters(), *method.buffers()]
    known = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(kept.values())
    del out
    return total


def cilmp(backbone: Backbone, counts: tuple[int, ...], **options: Any) -> CILMP:
    torch.manual_seed(1)
    names = tuple(f"{NAMES[k % 4]} {k}" for k in range(len(counts)))
    rows = KnowledgeRows(tuple(torch.randn(n, options.pop("source", 40)) for n in counts))
    return CILMP(CilmpConfig(**options), Problem(backbone, names, rows=rows)).train()


def ratios(method: Any, batch: int, precision: Any = "fp32") -> list[float]:
    """Predicted over measured, of the text side and of the image side where it keeps anything."""
    method.backbone = executing(method.backbone, Execution(precision))
    backbone = method.backbone
    image, text = sides(method, batch)
    assert text is not None
    v = torch.nn.functional.normalize(torch.randn(batch, backbone.embed_dim), dim=-1)
    v.requires_grad_(image is not None)
    features = partial_text(method, v)
    found = [text.kept(precision) / kept_bytes(features, method)]
    if image is not None:
        size = backbone.image.image_size
        case = Batch(torch.zeros(batch).long(), images=torch.randn(batch, 3, size, size))
        measured = kept_bytes(lambda: method.image_features(case), method)
        found.append(image.kept(precision) / measured)
    return found


def partial_text(method: Any, v: Tensor) -> Callable[[], Tensor]:
    """The text side of a method."""
    return lambda: method.text_features(v) if isinstance(method, CILMP) else method.text_features()


@pytest.fixture(scope="module")
def backbones(
    tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("towers")
    places = {
        "clip": tiny_models.tiny_clip(folder / "clip", layers=4, width=128),
        "biomedclip": tiny_models.tiny_biomedclip(folder / "bert", text_layers=4, text_width=96),
        "assembled": tiny_models.tiny_assembled(folder / "mean", text_width=96),
    }
    return {k: load_backbone(BackboneSpec(folder=str(place))) for k, place in places.items()}


RAGGED = (9, 12, 8, 10, 9, 11)


@pytest.mark.parametrize(
    ("kind", "batch", "options", "precision"),
    [
        ("clip", 8, {}, "fp32"),
        ("clip", 3, {}, "bf16"),
        ("clip", 8, {"text_depth": 2, "visual_depth": 1}, "fp32"),
        ("clip", 8, {"dropout": 0.0, "visual_depth": 0}, "fp32"),
        ("clip", 8, {"dropout": 0.0, "condition": "none"}, "fp32"),
        ("biomedclip", 4, {"visual_depth": 3}, "fp32"),
        ("biomedclip", 4, {"text_depth": 1}, "fp32"),
        ("assembled", 8, {}, "fp32"),
        ("assembled", 8, {}, "bf16"),
    ],
)
def test_what_a_step_keeps_is_predicted(
    backbones: dict[str, Backbone], kind: str, batch: int, options: dict[str, Any], precision: str
) -> None:
    found = ratios(cilmp(backbones[kind], RAGGED, **options), batch, precision)
    assert all(0.85 < ratio < 1.15 for ratio in found), found


def test_what_coop_keeps_is_predicted(backbones: dict[str, Backbone]) -> None:
    names = tuple(f"{NAMES[k % 4]} {k}" for k in range(12))
    method = CoOp(CoopConfig(), Problem(backbones["clip"], names))
    found = ratios(method, 8)
    assert all(0.85 < ratio < 1.15 for ratio in found), found


def test_a_step_on_vit_b_16_is_predicted() -> None:
    name = "ViT-B-16-quickgelu"
    with torch.device("meta"):
        model = open_clip.create_model(name, pretrained=None)
    ...
