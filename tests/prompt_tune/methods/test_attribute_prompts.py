"""Attribute prompts against prompts written by hand, and choices made one image at a time."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cache.errors import MissingKnowledgeError, RecipeError
from prompt_tune.backbone import BackboneSpec, load_backbone
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.attribute_prompts import AttributePrompts, AttributePromptsConfig

NAMES = ("basophil", "polyp", "normal")
ATTRIBUTES = (
    {"colour": ("blue", "purple", "pink"), "shape": ("round",), "texture": ("granular",)},
    {"location": ("colon", "rectum"), "colour": ("pink",)},
    {"texture": ("smooth",)},
)


@pytest.fixture(scope="module", params=["clip", "biomedclip"])
def world(request: Any, tiny_models: Any, tmp_path_factory: Any, load: Any, root: Path) -> Any:
    folder = getattr(tiny_models, f"tiny_{request.param}")(tmp_path_factory.mktemp(request.param))
    loaded = load_backbone(BackboneSpec(folder=str(folder)))
    backbone = loaded.with_model(loaded.model.double(), note="float64")
    plain = load(root / "tests" / "oracle" / "plain_cilmp.py")
    prompts = load(Path(__file__).with_name("plain_prompts.py"))
    text = prompts.text_of(plain, backbone, request.param)

    def unit(texts: Any) -> torch.Tensor:
        found = prompts.encode_texts(text, backbone, request.param, list(texts))
        return F.normalize(found, dim=-1)

    problem = Problem(backbone, NAMES, "a scan of {}.", attributes=ATTRIBUTES)
    return SimpleNamespace(backbone=backbone, unit=unit, problem=problem)


def build(world: Any, problem: Problem | None = None, **settings: Any) -> AttributePrompts:
    return AttributePrompts(AttributePromptsConfig(**settings), problem or world.problem)


def batch(count: int = 40) -> Batch:
    random = torch.Generator().manual_seed(3)
    features = torch.randn(count, 24, dtype=torch.float64, generator=random)
    return Batch(torch.arange(count) % 3, features=features)


RANKED = (
    (
        "blue color, round shape basophil",
        "purple color, round shape basophil",
        "pink color, round shape basophil",
    ),
    ("pink color, polyp in colon", "pink color, polyp in rectum"),
    ("normal",),
)


@pytest.mark.parametrize(
    ("settings", "prompts"),
    [
        ({}, RANKED),
        ({"ranks": 1}, [p[:1] for p in RANKED]),
        ({"rank": 2}, [p[min(1, len(p) - 1) :][:1] for p in RANKED]),
        ({"ranks": 2, "template": True}, [[f"a scan of {q}." for q in p[:2]] for p in RANKED]),
        (
            {"order": ("class", "texture", "colour"), "alias": {"polyp": "bump"}, "rank": 1,
             "forms": {"colour": "of {} colour"}},
            [["basophil granular of blue colour"], ["bump of pink colour"], ["normal smooth"]],
        ),
    ],
)  # fmt: skip
def test_zero_shot_is_the_mean_of_the_prompts(world: Any, settings: Any, prompts: Any) -> None:
    method, given = build(world, **settings), batch()
    t = torch.stack([F.normalize(world.unit(own).mean(0), dim=0) for own in prompts])
    true = world.backbone.logit_scale * F.normalize(given.features, dim=-1) @ t.T
    assert torch.allclose(method.logits(given), true, rtol=0, atol=1e-9)
    assert not method.trainable()


def test_image_specific_prompts_are_chosen_value_by_value(world: Any) -> None:
    settings: dict[str, Any] = {"order": ("colour", "shape", "class", "location"), "ranks": 2}
    attributes = (
        {"colour": ("blue", "purple", "pink"), "shape": ("round", "oval")},
        {"colour": ("pink", "red"), "location": ("colon",)},
        {},
    )
    problem = replace(world.problem, attributes=attributes)
    method, given = build(world, problem, mode="image-specific", **settings), batch()
    form = {"colour": "{} color,", "shape": "{} shape", "location": "in {}"}
    v, seen = F.normalize(given.features, dim=-1), set()
    true = torch.zeros(len(v), 3, dtype=torch.float64)
    for c, (name, own) in enumerate(zip(NAMES, attributes)):

        def prompt(chosen: dict[str, str], name: str = name) -> str:
            before = [form[a].format(chosen[a]) for a in ("colour", "shape") if a in chosen]
            after = [form[a].format(chosen[a]) for a in ("location",) if a in chosen]
            return " ".join([*before, name, *after])

        alone = {a: world.unit([prompt({a: x}) for x in xs[:2]]) for a, xs in own.items()}
        every = [dict(zip(own, xs)) for xs in itertools.product(*(xs[:2] for xs in own.values()))]
        known = {prompt(one): world.unit([prompt(one)])[0] for one in every}
        for b, row in enumerate(v):
            best = {a: xs[int((alone[a] @ row).argmax())] for a, xs in own.items()}
            seen.add(prompt(best))
            true[b, c] = world.backbone.logit_scale * row @ known[prompt(best)]
    assert len(seen) > 5  # images choose different values
    assert torch.allclose(method.logits(given), true, rtol=0, atol=1e-9)
    fixed = build(world, problem, rank=1, **settings).logits(given)
    assert not torch.allclose(fixed, true, atol=1e-3)


@pytest.mark.parametrize("mode", ["zero-shot", "image-specific"])
def test_without_attributes_the_prompt_is_the_class_word(world: Any, mode: Any) -> None:
    problem = replace(world.problem, attributes=None)
    method, given = build(world, problem, mode=mode, alias={"polyp": "bump"}), batch()
    t = world.unit(["basophil", "bump", "normal"])
    true = world.backbone.logit_scale * F.normalize(given.features, dim=-1) @ t.T
    assert torch.allclose(method.logits(given), true, rtol=0, atol=1e-9)


def test_what_cannot_be_composed_is_refused(world: Any) -> None:
    message = r"method\.order: no class has .*found colour, location, shape, texture, wanted size"
    with pytest.raises(MissingKnowledgeError, match=message):
        build(world, order=("size", "class"))
    with pytest.raises(RecipeError, match=r"method\.alias: an alias names no class; found polip"):
        build(world, alias={"polip": "bump"})
    for order in (("colour",), ("class", "colour", "colour"), ("class", "class")):
        with pytest.raises(RecipeError, match=r"method\.order: not an order of a prompt"):
            build(world, order=order)
