"""PromptSRC against full sequences through open_clip's own forward, in float64."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from prompt_tune.backbone import Backbone
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.promptsrc import PromptSRC, PromptSrcConfig

NAMES = ("basophil", "red blood cell", "normal")
TEMPLATES = ("a photo of a {}.", "a picture of large round {}", "{} seen under light")


def build(backbone: Backbone, templates: tuple[str, ...] = TEMPLATES, **settings: Any) -> PromptSRC:
    torch.manual_seed(1)
    problem = Problem(backbone, NAMES, template="a scan of a {}.", templates=templates)
    return PromptSRC(PromptSrcConfig(**settings), problem).double()


def pictures(backbone: Backbone, count: int = 3) -> Batch:
    size = backbone.image.image_size
    random = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, size, size, generator=random, dtype=torch.float64)
    return Batch(torch.arange(count) % 3, images=images)


def spread(method: PromptSRC) -> dict[str, Any]:
    """The trained tensors, at values that everything feels."""
    weights = method.trainable()
    with torch.no_grad():
        for parameter in weights.values():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return weights


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_parity(double_backbone: Backbone, towers: ModuleType) -> None:
    method = build(double_backbone, text_depth=2, visual_depth=3, visual_prompts=2)
    weights = spread(method)
    assert len(weights) == 5
    contexts = [weights[f"context.{k}"] for k in range(2)]
    prompts = [weights[f"visual_prompt.{k}"] for k in range(3)]
    batch, model = pictures(double_backbone), double_backbone.model
    scale = model.logit_scale.exp()

    t = unit(towers.text(model, double_backbone.tokenizer, NAMES, contexts))
    v = unit(towers.image(model, batch.images, prompts))
    captions = [[template.replace("{}", name) for name in NAMES] for template in TEMPLATES]
    raw = [
        model.encode_text(towers.tokens(model, double_backbone.tokenizer, own)) for own in captions
    ]
    t0, v0 = unit(sum(raw) / len(raw)), unit(model.encode_image(batch.images))
    z, z0 = scale * v @ t.T, scale * v0 @ t0.T
    p0 = z0.softmax(1)
    loss = -z.log_softmax(1)[range(3), batch.labels].mean()
    loss = loss + 25 * (t - t0).abs().mean() + 10 * (v - v0).abs().mean()
    loss = loss + (p0 * (p0.log() - z.log_softmax(1))).sum() / (3 * 3)

    torch.testing.assert_close(method.logits(batch), z, rtol=0, atol=1e-9)
    torch.testing.assert_close(method.loss(batch), loss, rtol=0, atol=1e-9)
    expected = torch.autograd.grad(loss, list(weights.values()))
    found = torch.autograd.grad(method.loss(batch), list(weights.values()))
    assert all(g.abs().max() > 1e-9 for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)


def test_the_teacher_averages_before_it_normalises(double_backbone: Backbone) -> None:
    raw = [
        double_backbone.text.encode_texts([template.format(n) for n in NAMES])
        for template in TEMPLATES
    ]
    method = build(double_backbone)
    torch.testing.assert_close(method.teacher, unit(sum(raw)), rtol=0, atol=1e-12)
    assert not torch.allclose(method.teacher, unit(sum(map(unit, raw))), rtol=0, atol=1e-6)


def test_without_templates_the_one_caption_teaches(double_backbone: Backbone) -> None:
    alone = double_backbone.text.encode_texts([f"a scan of a {n}." for n in NAMES])
    method = build(double_backbone, templates=())
    torch.testing.assert_close(method.teacher, unit(alone), rtol=0, atol=1e-12)


def test_frozen_features_of_the_batch_are_the_teacher(double_backbone: Backbone) -> None:
    method, batch = build(double_backbone), pictures(double_backbone)
    features = double_backbone.image.encode(batch.images)
    assert torch.equal(method.loss(replace(batch, features=features)), method.loss(batch))
    other = replace(batch, features=features.flip(0))
    assert method.loss(other) > method.loss(batch)
    assert torch.equal(method.logits(other), method.logits(batch))


def test_depths_are_cut_to_the_towers(double_backbone: Backbone) -> None:
    method = build(double_backbone)
    assert len(method.context) == double_backbone.text.depth == 4
    assert len(method.visual_prompt) == double_backbone.image.depth
    assert method.prompts() == set(method.trainable())
