"""Full fine-tuning against open_clip's own image tower, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prompt_tune.backbone import Backbone
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.full_fine_tuning import FullFineTuning, FullFineTuningConfig
from prompt_tune.methods.zero_shot import ZeroShot, ZeroShotConfig

NAMES = ("basophil", "red blood cell", "normal")


def build(backbone: Backbone, head: Any = "text") -> FullFineTuning:
    return FullFineTuning(FullFineTuningConfig(head=head), Problem(backbone, NAMES)).eval()


def pictures(backbone: Backbone, count: int = 3) -> Batch:
    size = backbone.image.image_size
    random = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, size, size, generator=random, dtype=torch.float64)
    return Batch(torch.arange(count) % 3, images=images)


def test_parity(double_backbone: Backbone) -> None:
    method, batch = build(double_backbone), pictures(double_backbone)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter += 0.05 * torch.randn_like(parameter)
    weights = method.trainable()
    tower = {k.removeprefix("tower."): v for k, v in weights.items() if k.startswith("tower.")}
    visual = double_backbone.model.visual
    assert set(tower) == dict(visual.named_parameters()).keys()
    assert len(weights) == len(tower) + 2
    features = torch.func.functional_call(visual, tower, (batch.images,))
    scaled = double_backbone.model.logit_scale.exp() * features
    scores = scaled @ weights["weight"].T / features.norm(dim=1, keepdim=True)
    logits = scores + weights["bias"]
    torch.testing.assert_close(method.logits(batch), logits, rtol=0, atol=1e-9)
    own = list(weights.values())
    expected = torch.autograd.grad(F.cross_entropy(logits, batch.labels), own)
    found = torch.autograd.grad(method.loss(batch), own)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)
    assert all(g.abs().max() > 0 for g in expected)


def test_it_starts_at_zero_shot_or_at_nothing(double_backbone: Backbone) -> None:
    batch = pictures(double_backbone)
    zero = ZeroShot(ZeroShotConfig(), Problem(double_backbone, NAMES))
    found = build(double_backbone).logits(batch)
    torch.testing.assert_close(found, zero.logits(batch), rtol=0, atol=1e-9)
    assert (build(double_backbone, "zeros").logits(batch) == 0).all()


def test_the_copy_is_trained_and_the_backbone_stays(double_backbone: Backbone) -> None:
    method, batch = build(double_backbone), pictures(double_backbone)
    before = double_backbone.image.encode(batch.images)
    optimizer = torch.optim.AdamW(method.trainable().values(), lr=1e-4)
    losses = []
    for _ in range(2):
        method.train()
        assert not any(m.training for m in method.tower.modules())
        optimizer.zero_grad()
        losses.append(float(method.backward(batch)))
        optimizer.step()
    assert losses[-1] < losses[0]
    assert torch.equal(double_backbone.image.encode(batch.images), before)
    assert not any(p.requires_grad for p in double_backbone.model.parameters())


@pytest.mark.parametrize("head", ["text", "zeros"])
def test_the_head_is_one_vector_and_one_number_a_class(
    double_backbone: Backbone, head: str
) -> None:
    method = build(double_backbone, head)
    assert method.weight.shape == (3, 24)
    assert method.bias.shape == (3,)
    assert (method.bias == 0).all()
