"""Precision, class chunks, checkpoints and compilation: another way to the same numbers."""

import copy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prompt_tune import interventions
from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.execution import Execution, executing
from prompt_tune.interventions import Intervention
from prompt_tune.method import Batch, KnowledgeRows, Problem
from prompt_tune.methods.cilmp import CILMP, CilmpConfig
from prompt_tune.methods.coop import CoOp, CoopConfig
from prompt_tune.towers.attention import KeyValue, attend
from prompt_tune.towers.lowrank import LowRank

NAMES = ("skin", "large round cell", "basophil nucleus with dark granules", "normal", "cell")
WIDTH = 20
SMALL: dict[str, Any] = {"prefix": 2, "suffix": 1, "rank": 3, "visual_prompts": 2}


COMPILED = """
import prompt_tune
import torch
from open_clip.transformer import ResidualAttentionBlock
from prompt_tune.towers.clip_blocks import ClipBlock
from prompt_tune.towers.live import compiled

torch.manual_seed(0)
block = ClipBlock(ResidualAttentionBlock(64, 4).requires_grad_(False))
x, attended = torch.randn(2, 2, 5, 64).unbind()
x.requires_grad_()
found, true = compiled([block])[0].close(x, attended), block.close(x, attended)
assert (found - true).abs().max() < 1e-5
grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, true)]
assert (grads[0] - grads[1]).abs().max() < 1e-4
"""


class Largest(TorchDispatchMode):
    """Remembers the most numbers any operation has produced."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


QUICK = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def backbones(
    tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("towers")
    places = {
        "clip": tiny_models.tiny_clip(folder / "clip", layers=3, width=64),
        "biomedclip": tiny_models.tiny_biomedclip(folder / "bert", text_layers=3),
        "assembled": tiny_models.tiny_assembled(folder / "mean"),
    }
    return {k: load_backbone(BackboneSpec(folder=str(place))) for k, place in places.items()}


@pytest.fixture(scope="module")
def double(backbones: dict[str, Backbone]) -> dict[str, Backbone]:
    return {
        k: b.with_model(copy.deepcopy(b.model).double(), note="float64")
        for k, b in backbones.items()
    }


def cilmp(backbone: Backbone, counts: tuple[int, ...] = (4, 6, 3, 5, 4), **options: Any) -> CILMP:
    torch.manual_seed(1)
    rows = KnowledgeRows(tuple(torch.randn(n, WIDTH) for n in counts))
    config = CilmpConfig(**(SMALL | options))
    return CILMP(config, Problem(backbone, NAMES[: len(counts)], rows=rows)).train()


def batch_of(backbone: Backbone, count: int = 3) -> Batch:
    size = backbone.image.image_size
    pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))
    return Batch(torch.arange(count) % 3, images=pixels.to(backbone.image.dtype))


def step(method: Any, batch: Batch, execution: Execution) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients, with the random numbers of one seed."""
    usual = method.backbone
    method.backbone = executing(usual, execution)
    torch.manual_seed(3)
    logits = method.logits(batch)
    torch.nn.functional.cross_entropy(logits, batch.labels).backward()
    grads = {n: p.grad for n, p in method.trainable().items()}
    for p in method.parameters():
        p.grad = None
    method.backbone = usual
    return logits.detach(), grads


def errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Of each gradient, the error's length over that of the true one."""
    floor = max(float(t.norm()) for t in true.values()) * 1e-9
    return {
        n: float((found[n].double() - t.double()).norm()) / max(float(t.norm()), floor)
        for n, t in true.items()
    }


@QUICK
@given(data=st.data())
@pytest.mark.parametrize("kind", ["clip", "biomedclip", "assembled"])
def test_chunks_and_checkpoints_change_nothing_but_rounding(
    double: dict[str, Backbone], kind: str, data: st.DataObject
) -> None:
    backbone = double[kind]
    counts = tuple(data.draw(st.lists(st.integers(3, 7), min_size=2, max_size=5)))
    options = {
        "text_depth": data.draw(st.integers(1, 3)),
        "visual_depth": data.draw(st.integers(0, 3)) if kind != "biomedclip" else 0,
        "dropout": data.draw(st.sampled_from([0.0, 0.3])),
        "condition": data.draw(st.sampled_from(["image", "none"])),
    }
    method = cilmp(backbone, counts, **options).double()
    batch = batch_of(backbone, 2)
    if not method.reads_images:
        features = torch.randn(2, backbone.embed_dim).double()
        batch = Batch(batch.labels, features=features)
    chosen = Execution(
        class_chunk=data.draw(st.integers(1, len(counts))),
        checkpoint_image=data.draw(st.booleans()),
    )
    logits, grads = step(method, batch, Execution())
    again, recomputed = step(method, batch, chosen)
    assert (logits - again).abs().max() < 1e-9
    assert max(errors(recomputed, grads).values()) < 1e-9
    with torch.no_grad():
        method.eval().backbone = executing(backbone, chosen)
        chunked = method.logits(batch)
        method.backbone = backbone
        assert (method.logits(batch) - chunked).abs().max() < 1e-9


@pytest.mark.parametrize("specific", [False, True])
def test_contexts_of_every_class_go_with_their_chunk(
    double: dict[str, Backbone], specific: bool
) -> None:
    method = CoOp(CoopConfig(class_specific=specific), Problem(double["clip"], NAMES)).double()
    with torch.no_grad():
        method.context += torch.randn_like(method.context)
    batch = Batch(torch.tensor([0, 4]), features=torch.randn(2, 24).double())
    logits, grads = step(method, batch, Execution())
    again, recomputed = step(method, batch, Execution(class_chunk=2))
    assert (logits - again).abs().max() < 1e-9
    assert max(errors(recomputed, grads).values()) < 1e-9


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("clip", {}),
        ("clip", {"text_depth": 1, "visual_depth": 1}),
        ("clip", {"dropout": 0.0, "condition": "none"}),
        ("biomedclip", {"visual_depth": 2}),
        ("assembled", {}),
    ],
)
def test_bf16_is_near_float64_in_logits_and_gradients(
    backbones: dict[str, Backbone], double: dict[str, Backbone], kind: str, options: dict[str, Any]
) -> None:
    method = cilmp(backbones[kind], **options)
    true = cilmp(double[kind], **options).double()
    true.load_state_dict(method.state_dict())
    batch, exact = batch_of(backbones[kind]), batch_of(double[kind])
    logits, grads = step(method, batch, Execution("bf16"))
    wanted, right = step(true, exact, Execution())
    plain, _ = step(method, batch, Execution())
    scale = backbones[kind].logit_scale
    assert logits.dtype == torch.float32
    assert 1e-5 < (logits - wanted).abs().max() / scale < 0.02  # of a cosine
    assert (plain - wanted).abs().max() / scale < 1e-5
    together = [torch.cat([g[n].double().flatten() for n in right]) for g in (grads, right)]
    assert (together[0] - together[1]).norm() < 0.1 * together[1].norm()
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    assert {g.dtype for g in grads.values()} == {torch.float32}


def test_few_queries_are_attended_in_fp32_on_a_processor() -> None:
    torch.manual_seed(0)
    rounded = torch.randn(3, 2, 3, 4, 9, 8).bfloat16()
    near, exact = rounded.clone().requires_grad_(), rounded.float().requires_grad_()
    unseen, grad = torch.rand(3, 9, 9) < 0.2, torch.randn(2, 3, 4, 9, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(near[0], [KeyValue((), near[1], near[2])], unseen)
    query, key, value = exact
    scores = (query @ key.mT / 8**0.5).masked_fill(unseen[:, None], -torch.inf)
    wanted = scores.softmax(dim=-1) @ value
    assert out.dtype == torch.bfloat16
    out.backward(grad)
    wanted.backward(grad.float())
    assert near.grad is not None and exact.grad is not None
    for found, true in ((out, wanted), (near.grad, exact.grad)):  # rounded once, to eight places
        assert ((found.float() - true).abs() <= 2.0**-8 * true.abs() + 1e-5).all()


@QUICK
@given(
    most=st.integers(1, 40),
    stages=st.integers(1, 4),
    rows=st.integers(1, 7),
    batch=st.integers(1, 4),
)
def test_dropout_does_not_depend_on_how_many_rows_are_built_at_once(
    most: int, stages: int, rows: int, batch: int
) -> None:
    g = torch.Generator().manual_seed(most)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).double()

    torch.manual_seed(4)
    group = [Intervention(WIDTH, 3, 5).double() for _ in range(stages)]
    h, v = draw(rows, WIDTH), draw(batch, 5).requires_grad_()
    down = draw(stages, 3, WIDTH).requires_grad_()
    weight = draw(stages, rows, batch, 3)
    kept = [torch.rand(rows, batch, WIDTH, generator=g) > 0.3 for _ in group]
    inputs = [v, down, *(p for one in group for p in one.parameters())]
    results = []
    for built in (2**30, most * 8 * batch * WIDTH):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(interventions.BUILT, "cpu", built)
            out = torch.stack(interventions.project_dropped(group, h, v, down, 0.3, kept=kept))
            results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
            with Largest() as seen:
                drawn = interventions.project_dropped(group, h, v, down, 0.3)
    for one, other in zip(*results):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)
    assert seen.numbers <= max(most * batch * WIDTH, stages * rows * WIDTH, 12 * stages * WIDTH)
    assert all(not torch.equal(a, b) for a, b in zip(drawn, results[0][0].detach()))


class Operations(TorchDispatchMode):
    """Counts what is not a view; on a GPU each is about a kernel."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = ("empty", "detach", "view", "promote_types", "reshape")
        out = func(*args, **(kwargs or {}))
        viewed = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        self.count += not viewed and not any(name in func.__name__ for name in made)
        return out


def test_operations_of_a_step_do_not_grow_with_images_and_classes(
    tiny_models: ModuleType, tmp_path: Path
) -> None:
    place = tiny_models.tiny_clip(tmp_path / "clip", layers=12, width=256)
    backbone, counts = load_backbone(BackboneSpec(folder=str(place))), []
    for size, classes in ((2, 3), (3, 5)):
        method = cilmp(backbone, (4, 6, 3, 5, 4)[:classes], dropout=0.1)
        batch = batch_of(backbone, size)
        step(method, batch, Execution())  # what is made once is made
        with Operations() as seen:
            method.loss(batch).backward()
        counts.append(seen.count)
    assert abs(counts[1] - counts[0]) < 10
    assert max(counts) <= 1700


def test_coordinates_and_norms_of_rows_stay_fp32(
    backbones: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, seen, table = cilmp(backbones["clip"], dropout=0.0), list[Tensor](), LowRank.table
    monkeypatch.setattr(LowRank, "table", lambda rows: seen.append(table(rows)) or seen[-1])
    v = torch.nn.functional.normalize(torch.randn(3, 24), dim=-1)
    texts = []
    for precision in ("fp32", "bf16"):
        method.backbone = executing(backbones["clip"], Execution(precision))
        texts.append(method.text_features(v))
    assert not torch.equal(*texts)
    plain, low = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(plain, low))


def test_the_other_runs_of_a_backbone_are_left_alone(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["clip"]
    other = executing(backbone, Execution("bf16", class_chunk=2))
    assert other.text.execution.class_chunk == 2
    assert backbone.text.execution == backbone.image.execution == Execution()
    assert other.model is backbone.model
    assert executing(backbone, Execution()) is backbone
    assert executing(other, Execution()).text.execution == Execution()


def test_copies_in_bf16_follow_their_weight(backbones: dict[str, Backbone]) -> None:
    from prompt_tune.towers.frozen import low

    weight = torch.nn.Parameter(torch.randn(3, 2), requires_grad=False)
    assert low(weight) is weight
    with torch.autocast("cpu", torch.bfloat16):
        first = low(weight)
        assert first.dtype == torch.bfloat16
        assert low(weight) is first
        with torch.no_grad():
            weight += 1
        assert torch.equal(low(weight), weight.bfloat16())


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch.compile's own, about its insides
def test_compiled_blocks_give_the_same(
    backbones: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced without a compiler: what is compiled is the whole of a block's close."""
    traced = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    for kind in ("clip", "biomedclip"):
        method, batch = cilmp(backbones[kind], dropout=0.0), batch_of(backbones[kind])
        logits, grads = step(method, batch, Execution())
        other, gradients = step(method, batch, Execution(compiled=True))
        assert (logits - other).abs().max() < 1e-3
        assert max(errors(gradients, grads).values()) < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiler_gives_the_same() -> None:
    """In a process of its own: the compiler minds which modules others have imported."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
