"""Prompt rows in coordinates, against the plain computation of every position in float64."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.method import KnowledgeRows, Problem
from prompt_tune.methods.cilmp import CILMP, CilmpConfig
from prompt_tune.towers.attention import KeyValue, LowRankKeyValue
from prompt_tune.towers.lowrank import LowRank
from prompt_tune.towers.parts import Part, Stream

KINDS = {"clip": {"layers": 3}, "biomedclip": {"text_layers": 3}, "assembled": {"text_layers": 3}}
# The third takes the other path of attention, where keys are written out.
NAMES = ("skin", "large round cell", "basophil nucleus with dark granules in pink blood", "normal")
WIDTH, IMAGE = 20, 24


@pytest.fixture(scope="module")
def plain(load: Callable[[Path], ModuleType], root: Path) -> ModuleType:
    return load(root / "tests" / "oracle" / "plain_cilmp.py")


@pytest.fixture(scope="module")
def backbones(
    tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Backbone]:
    made = {}
    for kind, options in KINDS.items():
        folder = getattr(tiny_models, f"tiny_{kind}")(tmp_path_factory.mktemp(kind), **options)
        loaded = load_backbone(BackboneSpec(folder=str(folder)))
        model, g = loaded.model.double(), torch.Generator().manual_seed(3)
        with torch.no_grad():  # fresh norms and biases say nothing, fresh attention is uniform
            for name, weight in model.named_parameters():
                if name.startswith("visual.") or weight.ndim == 0:
                    continue
                if weight.ndim == 1:
                    weight += 0.3 * torch.randn(weight.shape, generator=g, dtype=torch.float64)
                elif "encoder.layer" in name:
                    weight *= 6
        made[kind] = loaded.with_model(model, note="float64")
    return made


def plain_text(plain: ModuleType, kind: str, backbone: Backbone) -> tuple[Any, list[list[int]]]:
    """The oracle's tower, and the ids of every name by the tokenizer's own means."""
    weights, tokenizer = backbone.model.state_dict(), backbone.tokenizer
    if kind == "clip":
        ends = tokenizer.sot_token_id, tokenizer.eot_token_id
        ids = [[ends[0], *tokenizer.encode(n + "."), ends[1]] for n in NAMES]
        return plain.CausalText(weights, heads=4), ids
    pooler = "cls" if kind == "biomedclip" else "mean"
    ids = [list(tokenizer.tokenizer(n + ".").input_ids) for n in NAMES]
    return plain.BertText(weights, heads=4, pooler=pooler, length=40), ids


def weighed(text: Tensor) -> Tensor:
    """A number that every feature moves."""
    return (
        text * torch.randn(text.shape, generator=torch.Generator().manual_seed(1)).double()
    ).sum()


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    prefix, suffix = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    least = max(1, prefix + suffix)
    settings_of = {
        "text_depth": draw(st.integers(1, 3)),
        "condition": draw(st.sampled_from(["image", "none"])),
        "prefix": prefix,
        "suffix": suffix,
        "rank": draw(st.integers(1, 4)),
        "n_context": draw(st.integers(1, 2)),
    }
    counts = draw(st.lists(st.integers(least, least + 5), min_size=1, max_size=len(NAMES)))
    return {
        "settings": settings_of,
        "counts": counts,
        "batch": draw(st.integers(1, 3)),
        "dropped": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.05, 1.0, 20.0])),
        "seed": draw(st.integers(0, 99)),
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_rows_in_coordinates_are_the_plain_computation(
    backbones: dict[str, Backbone], plain: ModuleType, kind: str, case: dict[str, Any]
) -> None:
    backbone, counts, batch = backbones[kind], case["counts"], case["batch"]
    torch.manual_seed(case["seed"])
    config = CilmpConfig(**case["settings"], visual_depth=0, context=None, dropout=0.25)
    hidden = tuple(case["scale"] * torch.randn(n, WIDTH) for n in counts)
    names = NAMES[: len(counts)]
    problem = Problem(backbone, names, rows=KnowledgeRows(hidden))
    method = CILMP(config, problem).double().eval()
    with torch.no_grad():
        for name, parameter in method.trainable().items():
            if name.endswith(".context"):
                parameter += 0.3 * torch.randn_like(parameter)
    kept = None
    if case["dropped"]:
        shape = len(counts), batch, WIDTH
        kept = [
            tuple(
                torch.rand(shape[0], rows, *shape[1:]) > 0.25
                for rows in (config.prefix, config.suffix)
            )
            for _ in method.stage
        ]
    v = nn.functional.normalize(torch.randn(batch, IMAGE).double(), dim=-1).requires_grad_()
    keys, parameters = zip(*method.trainable().items())
    text = nn.functional.normalize(method.text_features(v, kept), dim=-1).expand(batch, -1, -1)
    grads = torch.autograd.grad(weighed(text), [*parameters, v], allow_unused=True)

    tower, ids = plain_text(plain, kind, backbone)
    values = {n: p.detach().clone().requires_grad_() for n, p in zip(keys, parameters)}
    other = v.detach().clone().requires_grad_()
    true = plain.PlainCilmp(
        text=tower,
        image=None,
        parameters=values,
        start=ids[0][:1],
        tails=[own[1:] for own in ids[: len(counts)]],
        hidden=hidden,
        prefix=config.prefix,
        suffix=config.suffix,
        logit_scale=1.0,
        dropout=0.25,
    ).text_features(other, kept)
    true_grads = torch.autograd.grad(weighed(true), [*values.values(), other], allow_unused=True)
    assert (text - true).abs().max() < 1e-9
    for name, grad, wanted in zip((*keys, "v"), grads, true_grads):
        if wanted is None:
            assert grad is None or float(grad.norm()) == 0, name
        else:
            size = max(float(wanted.norm()), 1e-6)
            assert grad is not None and float((grad - wanted).norm()) < 1e-8 * size, name


# ---- the algebra --------------------------------------------------------------------------------


def some_rows(*, offset: bool) -> tuple[LowRank, Stream]:
    """Rows of two ragged parts in coordinates, and written out."""
    g = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).double()

    parts = (Part("prefix", 2, [range(3, 5), range(3, 5)]), Part("middle", 3, [[5], [5, 6, 7]]))
    coordinates, basis, table = draw(2, 8, 3), draw(3, 16), draw(9, 16)
    low = LowRank(Stream(coordinates, parts), basis, torch.float64)
    x = coordinates @ basis
    if offset:
        low, x = low.plus(table), x + table[torch.tensor([3, 4, 3, 4, 5, 5, 6, 7])]
    return low, Stream(x, parts)


@pytest.mark.parametrize("offset", [True, False])
def test_norms_of_coordinates_are_those_of_the_rows(offset: bool) -> None:
    low, full = some_rows(offset=offset)
    first, second = nn.LayerNorm(16, eps=0.3).double(), nn.LayerNorm(16, eps=0.2).double()
    with torch.no_grad():
        for parameter in (*first.parameters(), *second.parameters()):
            parameter += torch.randn_like(parameter)
    for norm in (first, second):  # the second meets the shift that the first left
        low, full = low.normed(norm), full.normed(norm)
        assert torch.allclose(low.dense().x, full.x, rtol=0, atol=1e-12)
        assert torch.allclose(low.only({"middle"}).dense().x, full.only({"middle"}).x, atol=1e-12)


def test_a_row_without_length_is_normed_to_the_bias() -> None:
    part = Part("prefix", 2, [range(2)])
    low = LowRank(Stream(torch.zeros(1, 2, 3), (part,)), torch.randn(3, 16), torch.float32)
    norm = nn.LayerNorm(16, eps=1e-12)
    nn.init.normal_(norm.bias)
    assert torch.equal(low.normed(norm).dense().x, norm.bias.expand(1, 2, -1))


def test_attention_in_coordinates_is_that_of_written_out_keys() -> None:
    parts = (Part("middle", 3, [range(4)] * 2),)
    rows, query = torch.randn(3, 2, 4, 6).double(), torch.randn(3, 2, 2, 5, 8).double()
    basis = KeyValue((), *torch.randn(2, 1, 1, 2, 5, 8).double())
    offset = KeyValue(parts, *torch.randn(2, 1, 2, 2, 4, 8).double())
    for given_offset, own in ((offset, rows), (None, rows[..., :5])):
        low = LowRankKeyValue(parts, own, basis, given_offset)
        full, weights = low.dense(), torch.randn(3, 2, 2, 5, 4).double()
        scores = low.scores(query, basis.products(query))
        inner, own = low.summed(weights)
        sums = basis.sums(inner) if own is None else basis.sums(inner) + own
        assert torch.allclose(scores, full.products(query), rtol=0, atol=1e-12)
        assert torch.allclose(sums, full.sums(weights), rtol=0, atol=1e-12)


# ---- nothing is written out ---------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the most numbers any operation has produced."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("kind", ["clip", "biomedclip"])
def test_nothing_of_the_text_width_is_built_per_image_and_row(
    backbones: dict[str, Backbone], kind: str
) -> None:
    rows, batch = 60 if kind == "clip" else 100, 40
    hidden = (torch.randn(rows, WIDTH),) * 2
    config = CilmpConfig(
        visual_depth=0, context=None, n_context=1, prefix=rows // 2, suffix=4, rank=4
    )
    method = CILMP(config, Problem(backbones[kind], ("skin", "cell"), rows=KnowledgeRows(hidden)))
    method = method.double().eval()
    with Largest() as seen:
        method.text_features(torch.randn(batch, IMAGE).double()).sum().backward()
    assert seen.numbers < batch * 2 * (rows // 2) * method.backbone.text.width
