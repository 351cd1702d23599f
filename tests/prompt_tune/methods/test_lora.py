"""LoRA against open_clip's own model with the changed weights put in, in float64."""

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cache.errors import PromptOverflowError, RecipeError
from cache.recipe import validate
from prompt_tune.backbone import Backbone
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.lora import LoRA, LoraConfig
from prompt_tune.methods.zero_shot import ZeroShot, ZeroShotConfig

NAMES = ("basophil", "red blood cell", "normal")
BERT = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}


def build(backbone: Backbone, *, moved: bool = True, **settings: Any) -> LoRA:
    torch.manual_seed(1)
    method = LoRA(LoraConfig(**settings), Problem(backbone, NAMES)).eval()
    if moved:
        with torch.no_grad():
            for parameter in method.trainable().values():
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return method


def pictures(backbone: Backbone, count: int = 3) -> Batch:
    size = backbone.image.image_size
    random = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, size, size, generator=random, dtype=torch.float64)
    return Batch(torch.arange(count) % 3, images=images)


def parts(name: str, weight: Tensor) -> list[tuple[str, str, Tensor]]:
    """A weight's projections, the names of their linear maps, and what it holds of them."""
    for end in ("attn.in_proj_weight", "attn.qkv.weight"):
        if name.endswith(end):
            base = name.removesuffix(end) + "attn.qkv."
            return [(one, base + one, own) for one, own in zip("qkv", weight.chunk(3))]
    for end in ("attn.out_proj.weight", "attn.proj.weight"):
        if name.endswith(end):
            return [("o", name.removesuffix(end) + "attn.proj", weight)]
    for one, end in BERT.items():
        if name.endswith(f"attention.{end}.weight"):
            return [(one, name.removesuffix(".weight"), weight)]
    return []


def changed(method: LoRA, projections: str, towers: str) -> dict[str, Tensor]:
    """The weights of open_clip's model with every low-rank change added."""
    known = {k.removeprefix("adapted."): v for k, v in method.trainable().items()}
    scale, used = method.config.alpha / method.config.rank, 0
    weights = dict(method.backbone.model.state_dict())
    for name, weight in list(weights.items()):
        changes = []
        for one, linear, own in parts(name, weight):
            where = linear.removeprefix("visual.") if towers == "image" else linear
            chosen = towers == "both" or name.startswith("visual.") == (towers == "image")
            if one in projections and chosen:
                a, b = (known[f"{where}.lora_{m}.default.weight"] for m in "AB")
                assert a.shape[0] == b.shape[1] == method.config.rank
                own, used = own + scale * b @ a, used + 2
            changes.append(own)
        weights[name] = torch.cat(changes) if changes else weight
    assert used == len(known)
    return weights


@pytest.mark.parametrize(
    ("where", "projections"), [("both", "qkvo"), ("image", "qv"), ("text", "ko")]
)
def test_parity(
    double_backbone: Backbone, towers: ModuleType, where: str, projections: str
) -> None:
    method = build(double_backbone, towers=where, projections=tuple(projections), rank=2, alpha=3.0)
    batch, model = pictures(double_backbone), double_backbone.model
    captions = [f"a photo of a {name}." for name in NAMES]
    tokens = towers.tokens(model, double_backbone.tokenizer, captions)
    weights = changed(method, projections, where)
    image, text = torch.func.functional_call(model, weights, (batch.images, tokens))[:2]
    logits = model.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(method.logits(batch), logits, rtol=0, atol=1e-9)
    own = list(method.trainable().values())
    expected = torch.autograd.grad(F.cross_entropy(logits, batch.labels), own)
    found = torch.autograd.grad(method.loss(batch), own)
    assert all(g.abs().max() > 1e-9 for g in expected[len(own) // 2 :])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)


def test_it_starts_at_zero_shot(double_backbone: Backbone) -> None:
    method, batch = build(double_backbone, moved=False), pictures(double_backbone)
    zero = ZeroShot(ZeroShotConfig(), Problem(double_backbone, NAMES))
    torch.testing.assert_close(method.logits(batch), zero.logits(batch), rtol=0, atol=1e-9)
    assert all("lora_" in name for name in method.trainable())


def test_the_text_tower_alone_needs_no_pixels(double_backbone: Backbone) -> None:
    method, batch = build(double_backbone, towers="text"), pictures(double_backbone)
    assert not method.reads_images
    features = Batch(batch.labels, features=double_backbone.image.encode(batch.images))
    torch.testing.assert_close(method.logits(features), method.logits(batch), rtol=0, atol=1e-12)
    assert not any("visual" in name for name in method.trainable())
    assert build(double_backbone, towers="image").reads_images


def test_dropout_is_drawn_in_training_and_only_on_the_low_rank_path(
    double_backbone: Backbone,
) -> None:
    batch = pictures(double_backbone)
    method = build(double_backbone, towers="image", dropout=0.5)
    still = method.logits(batch)
    method.train()
    torch.manual_seed(1)
    first = method.logits(batch)
    assert not torch.allclose(first, still, rtol=0, atol=1e-3)
    assert not torch.equal(method.logits(batch), first)
    torch.manual_seed(1)
    assert torch.equal(method.logits(batch), first)
    assert torch.equal(method.eval().logits(batch), still)
    fresh = build(double_backbone, moved=False, towers="image", dropout=0.5)
    assert torch.equal(fresh.train().logits(batch), fresh.eval().logits(batch))


def test_what_is_refused(double_backbone: Backbone) -> None:
    problem = Problem(double_backbone, NAMES, template="cell " * 300 + "{}")
    with pytest.raises(PromptOverflowError, match="longer than the text tower's context"):
        LoRA(LoraConfig(), problem)
    with pytest.raises(RecipeError, match=r"projections"):
        validate(LoraConfig, {"name": "lora", "projections": ["mlp"]}, where="method")
