"""VPT visual against full sequences through open_clip's own forward, in float64."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from cache.errors import ModelError
from prompt_tune.backbone import Backbone
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.vpt import VPT, VptConfig

NAMES = ("basophil", "red blood cell", "normal")


def pictures(backbone: Backbone, count: int = 3) -> Batch:
    size = backbone.image.image_size
    random = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, size, size, generator=random, dtype=torch.float64)
    return Batch(torch.arange(count) % 3, images=images)


@pytest.mark.parametrize("depth", [1, "full"])
def test_parity(double_backbone: Backbone, towers: ModuleType, depth: int | str) -> None:
    torch.manual_seed(1)
    config = VptConfig(visual_prompts=3, visual_depth=depth)
    method = VPT(config, Problem(double_backbone, NAMES)).double()
    prompts = list(method.visual_prompt)
    assert len(prompts) == (double_backbone.image.depth if depth == "full" else depth)
    batch, model = pictures(double_backbone), double_backbone.model
    captions = [f"a photo of a {name}." for name in NAMES]
    tokens = towers.tokens(model, double_backbone.tokenizer, captions)
    text = F.normalize(model.encode_text(tokens), dim=-1)
    image = F.normalize(towers.image(model, batch.images, prompts), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(method.logits(batch), logits, rtol=0, atol=1e-9)
    expected = torch.autograd.grad(F.cross_entropy(logits, batch.labels), prompts)
    found = torch.autograd.grad(method.loss(batch), prompts)
    assert all(g.abs().max() > 1e-9 for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)


def test_prompts_start_uniform_within_the_published_bound(double_backbone: Backbone) -> None:
    torch.manual_seed(1)
    method = VPT(VptConfig(visual_prompts=200), Problem(double_backbone, NAMES))
    patch, width = (8, 32) if double_backbone.image.width == 32 else (16, 64)
    bound = (6 / (3 * patch**2 + width)) ** 0.5
    for prompt in map(torch.Tensor.detach, method.visual_prompt):
        assert 0.99 * bound < prompt.abs().max() <= bound
        assert abs(float(prompt.std()) / (bound / 3**0.5) - 1) < 0.05
    assert method.prompts() == set(method.trainable())


def test_a_depth_beyond_the_tower_and_a_batch_without_pictures_are_refused(
    double_backbone: Backbone,
) -> None:
    method = VPT(VptConfig(visual_depth=7), Problem(double_backbone, NAMES))
    with pytest.raises(ModelError, match="does not fit the image tower; found 7, wanted 0 to"):
        method.logits(pictures(double_backbone))
    with pytest.raises(ValueError, match="the method needs images, and the batch holds none"):
        method.logits(Batch(torch.zeros(1), features=torch.zeros(1, 24)))
