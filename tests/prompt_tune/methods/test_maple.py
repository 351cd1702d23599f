"""MaPLe against full sequences through open_clip's own forward, in float64."""

from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from prompt_tune.backbone import Backbone
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.maple import MaPLe, MapleConfig
from prompt_tune.towers import image_tower, text_tower

NAMES = ("basophil", "red blood cell", "normal")


def build(backbone: Any, **settings: Any) -> MaPLe:
    torch.manual_seed(1)
    return MaPLe(MapleConfig(**settings), Problem(backbone, NAMES))


def pictures(backbone: Backbone, count: int = 3) -> Batch:
    size = backbone.image.image_size
    random = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, size, size, generator=random, dtype=torch.float64)
    return Batch(torch.arange(count) % 3, images=images)


def test_parity(double_backbone: Backbone, towers: ModuleType) -> None:
    method = build(double_backbone, depth=3).double()
    weights = method.trainable()
    with torch.no_grad():
        for parameter in weights.values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    assert len(weights) == 9
    contexts = [weights[f"context.{k}"] for k in range(3)]
    visual: list[Tensor] = [
        torch.einsum("nt,it->ni", contexts[k], weights[f"coupling.{k}.weight"])
        + weights[f"coupling.{k}.bias"]
        for k in range(3)
    ]
    batch, model = pictures(double_backbone), double_backbone.model
    text = towers.text(model, double_backbone.tokenizer, NAMES, contexts)
    image = towers.image(model, batch.images, visual)
    logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    torch.testing.assert_close(method.logits(batch), logits, rtol=0, atol=1e-9)
    loss = F.cross_entropy(logits, batch.labels)
    expected = torch.autograd.grad(loss, list(weights.values()))
    found = torch.autograd.grad(method.loss(batch), list(weights.values()))
    assert all(g.abs().max() > 1e-9 for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)


def test_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
    text = text_tower(model, open_clip.get_tokenizer("ViT-B-16"))
    backbone = SimpleNamespace(text=text, image=image_tower(model))
    for size, count in ((4, 3_564_288), (2, 3_555_072)):
        method = build(backbone, n_context=size, context=None)
        assert sum(p.numel() for p in method.trainable().values()) == count


def test_the_start_is_the_published_one(double_backbone: Backbone) -> None:
    method = build(double_backbone)
    words = double_backbone.text.tokenize(["a photo of a"])[0][1:3]
    start = double_backbone.text.embed(words).float()
    assert torch.equal(method.context[0], start)
    assert method.context[1].std() < 0.04
    first, second, third = (method.coupling[k].weight for k in range(3))
    assert torch.equal(second, third)
    assert not torch.equal(first, second)
    assert second is not third


def test_the_depth_is_cut_to_both_towers(double_backbone: Backbone) -> None:
    method = build(double_backbone)
    least = min(double_backbone.text.depth, double_backbone.image.depth)
    assert len(method.context) == len(method.coupling) == least < 9
    assert method.prompts() == {f"context.{k}" for k in range(least)}
