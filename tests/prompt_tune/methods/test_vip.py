"""ViP against its equations over full sequences, in float64, gradients included."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prompt_tune.backbone import BackboneSpec, load_backbone
from prompt_tune.context import start_context
from prompt_tune.method import Batch, Problem
from prompt_tune.methods.vip import ViP, VipConfig
from prompt_tune.recipe import load_tune_recipe

NAMES = ("basophil", "red blood cell", "normal")
SYMPTOMS = (
    ("dark granules",),
    ("no nucleus", "pale centre", "round cell"),
    ("clear cytoplasm", "uniform colour"),
)


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
        problem=Problem(backbone, NAMES, symptoms=SYMPTOMS, seed=5),
    )


def build(world: Any, problem: Problem | None = None, **settings: Any) -> ViP:
    torch.manual_seed(2)
    method = ViP(VipConfig(**settings), problem or world.problem).double()
    with torch.no_grad():  # the start is too small to tell classes and phrases apart
        method.context += 0.5 * torch.randn_like(method.context)
        method.query += torch.randn_like(method.query)
    return method


def batch() -> Batch:
    random = torch.Generator().manual_seed(3)
    features = torch.randn(6, 24, dtype=torch.float64, generator=random)
    return Batch(torch.arange(6) % 3, features=features)


def plain_logits(world: Any, method: ViP, phrases: Any, features: torch.Tensor) -> torch.Tensor:
    columns = []
    for c, own in enumerate(phrases):
        context = method.context[c] if method.settings.class_specific else method.context
        sequences = []
        for phrase in own:
            tokens = world.text.tokens(world.prompts.ids(world.backbone, world.kind, phrase + "."))
            sequences.append(torch.cat([tokens[:1], context, tokens[1:]]))
        features_c = world.prompts.encode(world.text, sequences)
        q, k = method.query[c] @ method.to_query, features_c @ method.to_key
        scores = torch.stack([(q * row).sum() for row in k]) / len(q) ** 0.5
        t = method.query[c] + sum(a * s for a, s in zip(scores.softmax(0), features_c))
        columns.append(F.normalize(features, dim=-1) @ (t / t.norm()))
    return world.backbone.logit_scale * torch.stack(columns, 1)


@pytest.mark.parametrize("settings", [{}, {"class_specific": True, "n_context": 3}])
def test_it_is_its_equations_and_their_gradients(world: Any, settings: dict[str, Any]) -> None:
    method, given = build(world, **settings), batch()
    true = plain_logits(world, method, SYMPTOMS, given.features)
    found = method.logits(given)
    assert torch.allclose(found, true, rtol=0, atol=1e-9)
    parameters = list(method.trainable().values())
    assert len(parameters) == 4
    theirs = torch.autograd.grad(F.cross_entropy(true, given.labels), parameters)
    mine = torch.autograd.grad(method.loss(given), parameters)
    for name, a, b in zip(method.trainable(), mine, theirs, strict=True):
        assert b.abs().max() > 1e-6, name
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-11), name


def test_without_symptoms_the_name_is_the_phrase_and_otherwise_it_is_not_read(world: Any) -> None:
    without = build(world, replace(world.problem, symptoms=None))
    true = plain_logits(world, without, [(n,) for n in NAMES], batch().features)
    assert torch.allclose(without.logits(batch()), true, rtol=0, atol=1e-9)
    method = build(world)
    renamed = ViP(VipConfig(), replace(world.problem, class_names=("x", "y", "z"))).double()
    renamed.load_state_dict(method.state_dict())
    assert torch.equal(renamed.logits(batch()), method.logits(batch()))


@pytest.mark.parametrize("class_specific", [False, True])
def test_queries_and_own_contexts_belong_to_the_name(world: Any, class_specific: bool) -> None:
    config = VipConfig(class_specific=class_specific)
    turned = replace(world.problem, class_names=NAMES[::-1], symptoms=SYMPTOMS[::-1])
    torch.manual_seed(2)
    one = ViP(config, world.problem)
    torch.manual_seed(2)
    two = ViP(config, turned)
    assert torch.equal(one.query, two.query.flip(0))
    assert torch.equal(one.context, two.context.flip(0) if class_specific else two.context)
    assert len(set(one.query[:, 0].tolist())) == 3
    other = ViP(config, replace(world.problem, seed=6))
    assert not torch.equal(other.query, one.query)
    torch.manual_seed(2)
    assert class_specific or torch.equal(start_context(world.backbone.text, None, 4), one.context)


def test_what_is_trained_is_sized_by_the_joint_embedding(world: Any) -> None:
    torch.manual_seed(0)
    method, width = ViP(VipConfig(), world.problem), world.backbone.text.width
    assert {n: tuple(p.shape) for n, p in method.trainable().items()} == {
        "context": (4, width), "query": (3, 24), "to_query": (24, 24), "to_key": (24, 24),
    }  # fmt: skip
    assert method.prompts() == {"context"}
    assert abs(float(method.to_key.detach().std()) - (1 / 24) ** 0.5) < 0.02


def test_the_preset_is_the_published_budget() -> None:
    spec = load_tune_recipe("vip").train
    assert (spec.epochs, spec.batch_size, spec.lr, spec.select) == (50, 32, 0.002, "best-val")
