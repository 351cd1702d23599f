"""CoCoOp against its equations, image by image, on full sequences."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prompt_tune.backbone import Backbone
from prompt_tune.execution import Execution, executing
from prompt_tune.towers import PromptLayout, Stage


@pytest.fixture(scope="module")
def plain(load: Callable[[Path], ModuleType]) -> Any:
    return load(Path(__file__).with_name("plain.py"))


@pytest.mark.parametrize("chunk", [None, 3])
def test_loss_and_gradient_are_those_of_the_equations(
    plain: Any, double_backbone: Backbone, chunk: int | None
) -> None:
    ran = executing(double_backbone, Execution(class_chunk=chunk))
    method = plain.build("cocoop", plain.problem(ran), reduction=4)
    cases = plain.batch(double_backbone)
    sentences = [f"a photo of a {name}." for name in plain.NAMES]
    one, two = method.meta_net.linear1, method.meta_net.linear2
    rows = []
    for feature in cases.features:
        v = feature / feature.norm()
        hidden = (one.weight @ v + one.bias).clamp(min=0)
        context = method.context + (two.weight @ hidden + two.bias)
        text = plain.sentence_features(double_backbone, sentences, context)
        rows.append(double_backbone.logit_scale * (text / text.norm(dim=1, keepdim=True)) @ v)
    logits = torch.stack(rows)
    torch.testing.assert_close(method.logits(cases), logits, **plain.EXACT)
    plain.assert_same(method, cases, F.cross_entropy(logits, cases.labels))


def test_a_context_per_image_is_one_per_image_and_class(
    plain: Any, double_backbone: Backbone
) -> None:
    text = double_backbone.text
    layout = PromptLayout.build(text, plain.NAMES, n_context=3)
    context = plain.normal(5, 1, 3, text.width).requires_grad_()
    shared = text.encode(layout, [Stage(context)])
    every = text.encode(layout, [Stage(context.expand(-1, 4, -1, -1))])
    torch.testing.assert_close(shared, every, **plain.EXACT)
    wanted, found = (torch.autograd.grad(x.square().sum(), context)[0] for x in (every, shared))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_only_context_and_network_are_trained(plain: Any, double_backbone: Backbone) -> None:
    method = plain.build("cocoop", plain.problem(double_backbone))
    embed, width = double_backbone.embed_dim, double_backbone.text.width
    hidden = embed // 16
    expected = 4 * width + embed * hidden + hidden + hidden * width + width
    assert sum(p.numel() for p in method.trainable().values()) == expected
    assert 4 * 768 + 512 * 32 + 32 + 32 * 768 + 768 == 44_832  # the published count, same formula
    assert method.prompts() == {"context"}
    whole = method.logits(plain.batch(double_backbone))
    alone = replace(
        plain.batch(double_backbone), features=plain.batch(double_backbone).features[2:3]
    )
    torch.testing.assert_close(method.logits(alone), whole[2:3], **plain.EXACT)
