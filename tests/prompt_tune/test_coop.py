from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cache.errors import RecipeError
from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.coop import CoOp, CoopConfig
from prompt_tune.methods.zero_shot import ZeroShot, ZeroShotConfig

NAMES = ("basophil", "red blood cell", "normal")


@pytest.fixture(scope="module", params=["clip", "biomedclip", "assembled"])
def backbone(
    request: pytest.FixtureRequest, tiny_models: ModuleType, tmp_path_factory: Any
) -> Backbone:
    make = getattr(tiny_models, f"tiny_{request.param}")
    folder: Path = make(tmp_path_factory.mktemp(request.param))
    return load_backbone(BackboneSpec(folder=str(folder)))


def build(backbone: Backbone, **settings: Any) -> CoOp:
    torch.manual_seed(1)
    return CoOp(CoopConfig(**settings), Problem(backbone, NAMES))


def features(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return Batch(torch.arange(count) % 3, features=torch.randn(count, 24, generator=generator))


@pytest.mark.parametrize("class_specific", [False, True])
def test_a_context_of_words_starts_at_zero_shot(backbone: Backbone, class_specific: bool) -> None:
    method = build(backbone, class_specific=class_specific)
    assert method.context.shape == ((3, 4, method.context.shape[-1])[0 if class_specific else 1 :])
    template = Problem(backbone, NAMES, template="a photo of a {}.")
    zero = ZeroShot(ZeroShotConfig(), template)
    found, true = method.logits(features()), zero.logits(features())
    assert torch.allclose(found, true, rtol=0, atol=2e-5)


def test_only_the_context_is_trained_and_it_learns(backbone: Backbone) -> None:
    method = build(backbone)
    assert set(method.trainable()) == method.prompts() == {"context"}
    assert not method.reads_images
    assert not method.needs
    optimizer = torch.optim.SGD([method.context], lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = method.loss(features())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_class_specific_context_serves_its_class_alone(backbone: Backbone) -> None:
    method = build(backbone, class_specific=True)
    (grad,) = torch.autograd.grad(method.logits(features())[:, 0].sum(), method.context)
    assert grad[0].abs().max() > 0
    assert (grad[1:] == 0).all()


def test_without_words_the_context_starts_at_random(backbone: Backbone) -> None:
    context = build(backbone, context=None, n_context=16).context.detach()
    assert context.shape[0] == 16
    assert abs(float(context.std()) - 0.02) < 0.002
    torch.manual_seed(2)
    other = CoOp(CoopConfig(context=None, n_context=16), Problem(backbone, NAMES))
    assert not torch.equal(other.context, context)


def test_words_that_do_not_fit_are_refused(backbone: Backbone) -> None:
    message = r"method\.context: .* found 4 tokens, wanted at most n_context = 2"
    with pytest.raises(RecipeError, match=message):
        build(backbone, n_context=2)
