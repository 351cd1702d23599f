"""Attribute contexts against full sequences, in float64, gradients included."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cache.errors import PromptOverflowError
from prompt_tune.backbone import BackboneSpec, load_backbone
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.attribute_context import AttributeContext, AttributeContextConfig

NAMES = ("basophil", "polyp", "normal")
ATTRIBUTES = (
    {"colour": ("blue", "purple"), "shape": ("round",)},
    {"location": ("colon", "rectum"), "colour": ("pink",)},
    {"texture": ("smooth",)},
)
FIRST = ("blue color, round shape", "pink color, in colon", "a photo of a")
SECOND = ("purple color, round shape", "pink color, in rectum", "a photo of a")


@pytest.fixture(scope="module", params=["clip", "biomedclip"])
def world(request: Any, tiny_models: Any, tmp_path_factory: Any, load: Any, root: Path) -> Any:
    folder = getattr(tiny_models, f"tiny_{request.param}")(tmp_path_factory.mktemp(request.param))
    loaded = load_backbone(BackboneSpec(folder=str(folder)))
    backbone = loaded.with_model(loaded.model.double(), note="float64")
    plain = load(root / "tests" / "oracle" / "plain_cilmp.py")
    prompts = load(Path(__file__).with_name("plain_prompts.py"))
    return SimpleNamespace(
        kind=request.param,
        backbone=backbone,
        prompts=prompts,
        text=prompts.text_of(plain, backbone, request.param),
        problem=Problem(backbone, NAMES, attributes=ATTRIBUTES),
    )


def batch() -> Batch:
    random = torch.Generator().manual_seed(3)
    features = torch.randn(6, 24, dtype=torch.float64, generator=random)
    return Batch(torch.arange(6) % 3, features=features)


def logits_of(world: Any, t: torch.Tensor) -> torch.Tensor:
    v = F.normalize(batch().features, dim=-1)
    return world.backbone.logit_scale * v @ F.normalize(t, dim=-1).T


@pytest.mark.parametrize(
    ("settings", "phrases", "words"),
    [
        ({}, FIRST, NAMES),
        ({"rank": 2, "alias": {"polyp": "bump"}}, SECOND, ("basophil", "bump", "normal")),
    ],
)
def test_it_starts_at_the_prompt_it_is_made_of(
    world: Any, settings: Any, phrases: Any, words: Any
) -> None:
    method = AttributeContext(AttributeContextConfig(**settings), world.problem).double()
    sentences = [f"{p} {w}." for p, w in zip(phrases, words)]
    t = world.prompts.encode_texts(world.text, world.backbone, world.kind, sentences)
    assert torch.allclose(method.logits(batch()), logits_of(world, t), rtol=0, atol=1e-9)
    assert set(method.trainable()) == method.prompts() == {"context"}


def test_it_is_its_equations_and_their_gradients(world: Any) -> None:
    method = AttributeContext(AttributeContextConfig(), world.problem).double()
    with torch.no_grad():
        method.context += 0.5 * torch.randn(
            method.context.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
        )
    lengths = [len(world.prompts.ids(world.backbone, world.kind, p)) - 2 for p in FIRST]
    assert len(set(lengths)) > 1 and method.context.shape[1] == max(lengths)
    sequences = []
    for c, (name, length) in enumerate(zip(NAMES, lengths)):
        tokens = world.text.tokens(world.prompts.ids(world.backbone, world.kind, name + "."))
        sequences.append(torch.cat([tokens[:1], method.context[c, :length], tokens[1:]]))
    true = logits_of(world, world.prompts.encode(world.text, sequences))
    assert torch.allclose(method.logits(batch()), true, rtol=0, atol=1e-9)
    labels = batch().labels
    (theirs,) = torch.autograd.grad(F.cross_entropy(true, labels), method.context)
    method.backward(batch())
    mine = method.context.grad
    assert mine is not None and theirs.abs().max() > 1e-4
    assert torch.allclose(mine, theirs, rtol=1e-7, atol=1e-11)
    for c, length in enumerate(lengths):
        assert (mine[c, length:] == 0).all()
        assert (mine[c, :length].abs().sum(1) > 0).all()


def test_without_attributes_it_starts_from_the_fallback(world: Any) -> None:
    problem = replace(world.problem, attributes=None)
    config = AttributeContextConfig(fallback="a scan of")
    method = AttributeContext(config, problem).double()
    sentences = [f"a scan of {n}." for n in NAMES]
    t = world.prompts.encode_texts(world.text, world.backbone, world.kind, sentences)
    assert torch.allclose(method.logits(batch()), logits_of(world, t), rtol=0, atol=1e-9)


def test_values_longer_than_the_tower_reads_are_refused(world: Any) -> None:
    long = tuple({"colour": ("very " * 300 + "red",)} for _ in NAMES)
    with pytest.raises(PromptOverflowError, match="longer than the text tower's context"):
        AttributeContext(AttributeContextConfig(), replace(world.problem, attributes=long))
