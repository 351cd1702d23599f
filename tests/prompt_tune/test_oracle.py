"""The fast CILMP against the plain full-position one, in float64, for every kind of tower."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.method import Batch, KnowledgeRows, Problem
from prompt_tune.methods.cilmp import CILMP, CilmpConfig

NAMES = ("basophil", "small cell carcinoma of the lung", "normal")
COUNTS = (6, 9, 4)
WIDTH = 24
SMALL: dict[str, Any] = {"prefix": 2, "suffix": 2, "rank": 3, "visual_prompts": 3}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "shallow": {"text_depth": 1, "visual_depth": 1},
    "partial": {"text_depth": 2, "visual_depth": 2},
    "text-only": {"visual_depth": 0},
    "unconditional": {"condition": "none"},
    "no-prefix": {"prefix": 0, "n_context": 2, "context": None},
    "no-suffix": {"suffix": 0, "prefix": 3},
    "no-rows": {},
    "dropout": {"dropout": 0.25},
    "dropout-unconditional": {"dropout": 0.25, "condition": "none", "text_depth": 2},
}


@pytest.fixture(scope="module")
def plain(root: Path) -> ModuleType:
    path = root / "tests" / "oracle" / "plain_cilmp.py"
    spec = importlib.util.spec_from_file_location("plain_cilmp", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backbone_of(
    tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Backbone]:
    made: dict[str, Backbone] = {}

    def of(kind: str) -> Backbone:
        if kind not in made:
            folder = getattr(tiny_models, f"tiny_{kind}")(tmp_path_factory.mktemp(kind))
            loaded = load_backbone(BackboneSpec(folder=str(folder)))
            made[kind] = loaded.with_model(loaded.model.double(), note="float64")
        return made[kind]

    return of


def plain_towers(plain: ModuleType, kind: str, backbone: Backbone) -> tuple[Any, Any]:
    weights = backbone.model.state_dict()
    if kind == "clip":
        return plain.CausalText(weights, heads=4), plain.ClipImage(weights, heads=2)
    if kind == "biomedclip":
        text = plain.BertText(weights, heads=4, pooler="cls", length=32)
        return text, plain.TimmImage(weights, heads=2)
    text = plain.BertText(weights, heads=4, pooler="mean", length=32)
    return text, plain.ClipImage(weights, heads=2)


def token_ids(kind: str, backbone: Backbone) -> list[list[int]]:
    """Ids of every name with its full stop, from start to end, by the tokenizer's own means."""
    tokenizer: Any = backbone.tokenizer
    if kind == "clip":
        ends = tokenizer.sot_token_id, tokenizer.eot_token_id
        return [[ends[0], *tokenizer.encode(n + "."), ends[1]] for n in NAMES]
    return [tokenizer.tokenizer(n + ".").input_ids for n in NAMES]


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["clip", "biomedclip", "assembled"])
def test_the_fast_path_is_the_plain_computation(
    kind: str, case: str, plain: ModuleType, backbone_of: Callable[[str], Backbone]
) -> None:
    torch.manual_seed(7)
    backbone = backbone_of(kind)
    config = CilmpConfig(**(SMALL | CASES[case]))
    hidden = None if case == "no-rows" else tuple(torch.randn(n, WIDTH) for n in COUNTS)
    rows = None if hidden is None else KnowledgeRows(hidden)
    method = CILMP(config, Problem(backbone, NAMES, rows=rows)).double().eval()
    with torch.no_grad():  # contexts of deep stages start too small to tell them apart
        for name, parameter in method.trainable().items():
            if name.endswith(".context") or name.startswith("visual_prompt."):
                parameter += 0.3 * torch.randn_like(parameter)

    size = backbone.image.image_size
    images, labels = torch.randn(2, 3, size, size).double(), torch.tensor([2, 1])
    kept = None
    if case.startswith("dropout"):
        kept = [
            tuple(torch.rand(len(NAMES), 2, len(images), WIDTH) > 0.25 for _ in range(2))
            for _ in method.stage
        ]
    features = None if method.reads_images else backbone.image.encode(images)
    batch = Batch(labels, images=images if method.reads_images else None, features=features)
    logits = method.logits(batch, kept)
    names, parameters = zip(*method.trainable().items(), strict=True)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    grads = torch.autograd.grad(loss, parameters)

    text, image = plain_towers(plain, kind, backbone)
    ids = token_ids(kind, backbone)
    true = plain.PlainCilmp(
        text=text,
        image=image,
        parameters={n: p.detach().clone() for n, p in zip(names, parameters, strict=True)},
        start=ids[0][:1],
        tails=[own[1:] for own in ids],
        hidden=hidden,
        prefix=config.prefix,
        suffix=config.suffix,
        logit_scale=backbone.logit_scale,
        dropout=config.dropout,
    )
    true_logits, true_loss, true_grads = true.step(images, labels, kept)
    assert (logits - true_logits).abs().max() < 1e-9
    assert abs(float(loss.detach() - true_loss)) < 1e-9
    for name, grad in zip(names, grads, strict=True):
        assert relative(grad, true_grads[name]) < 1e-8, name
