"""What holds for every method in the registry, on both kinds of backbone, with its defaults."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache.errors import VademecumError
from prompt_tune import prompt_stages
from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.method import Batch, ClassTexts, KnowledgeRows, Method, Problem
from prompt_tune.methods import METHODS

NAMES = ("basophil", "red blood cell", "monocyte", "normal", "platelet")  # 5: no other size is 5
CLASSES, WIDTH, COPIES = len(NAMES), 24, 3
PER_IMAGE = {"cilmp", "cocoop"}  # their text towers run for every image


@dataclass(frozen=True)
class World:
    """A backbone, knowledge of five classes and separable pictures of them."""

    backbone: Backbone
    problem: Problem
    images: torch.Tensor
    labels: torch.Tensor

    def batch(self, method: Method, rows: slice = slice(None)) -> Batch:
        images = self.images[rows]
        if method.reads_images:
            return Batch(self.labels[rows], images=images)
        with torch.no_grad():
            return Batch(self.labels[rows], features=method.backbone.image.encode(images))

    def build(self, name: str, problem: Problem | None = None, seed: int = 1) -> Method:
        kind: Any = METHODS[name]
        torch.manual_seed(seed)
        method: Method = kind(kind.Config(name=name), problem or self.problem).eval()
        return method


@pytest.fixture(scope="module", params=["clip", "biomedclip"])
def world(request: pytest.FixtureRequest, tiny_models: ModuleType, tmp_path_factory: Any) -> World:
    make = getattr(tiny_models, f"tiny_{request.param}")
    folder: Path = make(tmp_path_factory.mktemp(request.param))
    backbone = load_backbone(BackboneSpec(folder=str(folder)))
    random = torch.Generator().manual_seed(5)
    strings = tuple(tuple(f"a {n} number {i}" for i in range(6)) for n in NAMES)
    problem = Problem(
        backbone,
        NAMES,
        templates=("a photo of a {}.", "a picture of a {}."),
        rows=KnowledgeRows(
            tuple(torch.randn(8 + k % 3, WIDTH, generator=random) for k in range(CLASSES))
        ),
        texts=ClassTexts(strings, tuple(backbone.text.encode_texts(own) for own in strings)),
        symptoms=tuple(tuple(f"red patch {n}" for n in range(2 + k % 2)) for k in range(CLASSES)),
        attributes=tuple(
            {"colour": ("red", "blue"), "shape": ("round",), "location": (n,)} for n in NAMES
        ),
        train_labels=torch.arange(CLASSES).repeat(COPIES),
    )
    size = backbone.preprocess.image_size
    colour = torch.randn(CLASSES, 3, 1, 1, generator=random) * 2
    noise = torch.randn(COPIES * CLASSES, 3, size, size, generator=random) / 4
    return World(backbone, problem, colour.repeat(COPIES, 1, 1, 1) + noise, problem.train_labels)


@pytest.fixture(params=list(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def train(method: Method, world: World, steps: int = 6) -> None:
    batch = world.batch(method)
    if method.fitted_by == "solver":
        method.fit(batch, None)
    if method.fitted_by == "gradient":
        rate = 1e-4 if sum(p.numel() for p in method.trainable().values()) > 50_000 else 5e-3
        optimizer = torch.optim.AdamW(method.trainable().values(), lr=rate, weight_decay=0)
        for step in range(steps):
            torch.manual_seed(step)
            method.train()
            optimizer.zero_grad()
            value = method.backward(batch)
            assert value.isfinite()
            optimizer.step()
    method.eval()


def logits(method: Method, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return method.logits(batch)


def test_logits_are_finite_and_a_batch_is_its_images_one_by_one(world: World, name: str) -> None:
    method = world.build(name)
    train(method, world, steps=1)
    found = logits(method, world.batch(method))
    assert found.shape == (COPIES * CLASSES, CLASSES)
    assert found.isfinite().all()
    alone = logits(method, world.batch(method, slice(3, 4)))
    assert torch.allclose(alone, found[3:4], rtol=1e-4, atol=1e-3)


def test_the_class_side_is_computed_once_while_predicting(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = world.build(name)
    train(method, world, steps=1)
    tower, seen = type(method.backbone.text), list[str]()

    def spy(place: Any, call: str) -> None:
        of = getattr(place, call)
        monkeypatch.setattr(place, call, lambda *given: seen.append(call) or of(*given))

    spy(tower, "encode")
    spy(tower, "encode_texts")
    spy(prompt_stages, "mapped")
    batches = [world.batch(method, rows) for rows in (slice(2), slice(2, 5))]
    plain = [logits(method, batch) for batch in batches]
    seen.clear()
    with method.predicting():
        found = [method.logits(batches[0])]
        before = len(seen)
        found.append(method.logits(batches[1]))
        assert len(seen) - before == (name in PER_IMAGE)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    seen.clear()
    logits(method, batches[0])
    assert len(seen) == before


def test_training_moves_what_is_declared_and_nothing_of_the_backbone(
    world: World, name: str
) -> None:
    method = world.build(name)
    frozen, before = state(world.backbone.model), state(method)
    train(method, world, steps=2)
    after = state(world.backbone.model)
    assert all(torch.equal(frozen[k], after[k]) for k in frozen)
    assert not any(p.requires_grad for p in world.backbone.model.parameters())
    declared = method.trainable()
    assert method.prompts() <= set(declared)
    moved = {k for k, v in state(method).items() if not torch.equal(v, before[k])}
    assert moved <= set(declared)
    assert moved or not declared


def test_the_order_of_the_classes_does_not_matter(world: World, name: str) -> None:
    order = torch.tensor([2, 0, 4, 1, 3])  # class k of the other run is class order[k] of this
    rank = order.argsort()
    known = world.problem

    def turned(values: Any) -> Any:
        return tuple(values[i] for i in order.tolist())

    other = replace(
        known,
        class_names=turned(known.class_names),
        rows=KnowledgeRows(turned(known.rows.values)),
        texts=ClassTexts(turned(known.texts.strings), turned(known.texts.embeddings)),
        symptoms=turned(known.symptoms),
        attributes=turned(known.attributes),
        train_labels=rank[known.train_labels],
    )
    first, second = world.build(name), world.build(name, other)
    with torch.no_grad():
        for key, parameter in second.trainable().items():
            value = first.trainable()[key]
            per_class = value.ndim and value.shape[0] == CLASSES
            parameter.copy_(value[order] if per_class else value)
    batch = world.batch(first)
    if first.fitted_by == "solver":
        first.fit(batch, None)
        second.fit(replace(batch, labels=rank[batch.labels]), None)
    a, b = logits(first, batch), logits(second, batch)
    assert torch.allclose(a[:, order], b, rtol=1e-3, atol=2e-3)


def test_what_is_saved_is_enough(world: World, name: str, tmp_path: Path) -> None:
    method = world.build(name)
    train(method, world, steps=2)
    kept = {k: v.detach().contiguous() for k, v in method.trainable().items()}
    save_file(kept, tmp_path / "weights.safetensors")
    other = world.build(name, seed=9)
    with torch.no_grad():
        for key, value in load_file(tmp_path / "weights.safetensors").items():
            other.trainable()[key].copy_(value)
    batch = world.batch(method)
    assert torch.equal(logits(method, batch), logits(other, batch))


def test_the_loss_falls_on_separable_pictures(world: World, name: str) -> None:
    method = world.build(name)
    if method.fitted_by == "nothing":
        assert not method.trainable()
        return
    batch = world.batch(method)

    def loss() -> float:
        with torch.no_grad():
            return float(method.loss(batch))

    before = loss()
    train(method, world, steps=12)
    assert loss() < before


def test_it_does_without_knowledge(world: World, name: str) -> None:
    without = replace(world.problem, rows=None, texts=None, symptoms=None, attributes=None)
    method = world.build(name, without)
    train(method, world, steps=1)
    assert logits(method, world.batch(method)).isfinite().all()


def test_ragged_texts_are_used_or_refused(world: World, name: str) -> None:
    method: Any = METHODS[name]
    if "texts" not in method.needs:
        pytest.skip("reads no texts")
    texts = world.problem.texts
    assert texts is not None
    ragged = ClassTexts(
        tuple(s[: 3 + k % 3] for k, s in enumerate(texts.strings)),
        tuple(e[: 3 + k % 3] for k, e in enumerate(texts.embeddings)),
    )
    try:
        built = world.build(name, replace(world.problem, texts=ragged))
    except VademecumError as error:
        assert "equally many" in str(error)  # noqa: PT017 - either way is sound
        return
    train(built, world, steps=1)
    assert logits(built, world.batch(built)).isfinite().all()
