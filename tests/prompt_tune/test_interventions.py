from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prompt_tune.interventions import Fixed, Intervention, Projection, project_dropped
from prompt_tune.prompt_stages import PromptStage, Rows, Sizes, prompt_stages
from prompt_tune.row_dropout import draw_kept

ROWS, WIDTH, RANK, IMAGE, BATCH = 5, 40, 3, 6, 7


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def literal(one: Intervention, h: Tensor, v: Tensor) -> Tensor:
    """`h'` of every row and image, as the equation says."""
    u = h[:, None].expand(-1, len(v), -1)
    if one.conditional:
        m = (v @ one.U1.T + one.b1) @ one.U2.T + one.b2
        u = torch.cat([u, m * h[:, None]], -1)
    return h[:, None] + (u @ one.W.T + one.b - (h @ one.R)[:, None]) @ one.R.T


@pytest.mark.parametrize("image", [IMAGE, None])
def test_without_dropout_the_low_rank_algebra_is_the_equation(image: int | None) -> None:
    one = Intervention(WIDTH, RANK, image).double()
    h, v = torch.randn(ROWS, WIDTH).double(), torch.randn(BATCH, IMAGE).double()
    down = torch.randn(RANK, WIDTH).double()
    found, true = Fixed.of([one], h, down[None]).rows(v)[0], literal(one, h, v) @ down.T
    assert found.shape == (ROWS, BATCH if image else 1, RANK)
    assert torch.allclose(found.expand_as(true), true, rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the most numbers any operation has produced."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def stage_and_rows() -> tuple[PromptStage, Rows]:
    sizes = Sizes(source=512, text=16, image=IMAGE, context=4, prefix=2, suffix=2, rank=RANK)
    values = tuple(torch.randn(n, 512) for n in (5, 7, 6))
    return PromptStage(sizes), Rows(values, 2, 2)


def test_in_evaluation_nothing_of_the_row_width_is_built_per_image() -> None:
    stage, rows = stage_and_rows()
    sizes = []
    for batch in (1, 64):
        with Largest() as seen:
            out = stage(rows, torch.randn(batch, IMAGE))
            (out.prefix.sum() + out.suffix.sum() + out.middle.sum()).backward()
        sizes.append(seen.numbers)
    assert sizes[1] <= max(sizes[0], 64 * 3 * 2 * RANK)
    assert sizes[1] < 64 * 3 * 2 * 512


def test_a_stage_has_the_shapes_of_its_groups() -> None:
    stage, rows = stage_and_rows()
    out = stage(rows, torch.randn(BATCH, IMAGE))
    assert out.context.shape == (4, 16)
    assert out.prefix.shape == out.suffix.shape == (BATCH, 3, 2, RANK)
    assert out.middle.shape == (1 + 3 + 2, RANK)
    assert out.basis.shape == (RANK, 16)
    assert stage(None, torch.randn(BATCH, IMAGE)).prefix is None


def test_training_changes_prefix_and_suffix_only_and_images_differ_there_only() -> None:
    stage, rows = stage_and_rows()
    v = torch.randn(BATCH, IMAGE)
    first, second = (stage(rows, v, dropout=0.1) for _ in range(2))
    assert torch.equal(first.middle, second.middle)
    assert torch.equal(first.context, second.context)
    for name in ("prefix", "suffix"):
        a, b = getattr(first, name), getattr(second, name)
        assert ((a - b).abs().amax(-1) > 0).all()
        calm = getattr(stage(rows, v), name)
        assert ((calm[:1] - calm[1:]).abs().amax(-1) > 0).all()


def test_dropout_of_unconditioned_rows_is_drawn_for_every_image() -> None:
    one = Intervention(WIDTH, RANK, None)
    h, down = torch.randn(ROWS, WIDTH), torch.randn(1, RANK, WIDTH)
    out = project_dropped([one], h, torch.zeros(BATCH, IMAGE), down, 0.1)[0]
    assert out.shape == (ROWS, BATCH, RANK)
    assert ((out[:, :1] - out[:, 1:]).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_masks_drop_at_the_stated_rate_and_are_a_function_of_the_seed(dropout: float) -> None:
    shape = (8, 50, 1001)
    kept = draw_kept(shape, dropout, 3, torch.device("cpu"))
    assert kept.shape == shape
    assert kept.dtype == torch.bool
    deviation = (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert abs(float((~kept).float().mean()) - dropout) < 5 * deviation
    for lane in range(4):  # the four parts of a word are equally random
        rate = float((~kept).flatten()[lane::4].float().mean())
        assert abs(rate - dropout) < 10 * deviation
    assert torch.equal(kept, draw_kept(shape, dropout, 3, torch.device("cpu")))
    other = draw_kept(shape, dropout, 4, torch.device("cpu"))
    both = float((~kept & ~other).float().mean())
    assert abs(both - dropout**2) < 0.005


def test_dropout_has_the_mean_and_covariance_of_dropping_full_rows() -> None:
    one, draws, p = Intervention(WIDTH, RANK, IMAGE).double(), 40000, 0.1
    h, v = torch.randn(1, WIDTH).double(), torch.randn(1, IMAGE).double()
    down = torch.randn(RANK, WIDTH).double()
    with torch.no_grad():
        samples = project_dropped([one], h, v.expand(draws, -1), down[None], p)[0][0]
        full = literal(one, h, v)[0, 0]
        mean = down @ full
        covariance = p / (1 - p) * (down * full**2) @ down.T
        dropped = torch.nn.functional.dropout(full.expand(draws, -1), p) @ down.T
    scale = covariance.diagonal().sqrt()
    for found in (samples, dropped):
        assert ((found.mean(0) - mean).abs() < 5 * scale / draws**0.5).all()
        error = (found.T.cov() - covariance).abs() / (scale[:, None] * scale)
        assert error.max() < 5 * (2 / draws) ** 0.5


def test_the_gradient_of_dropout_is_that_of_the_written_out_computation() -> None:
    one = Intervention(WIDTH, RANK, IMAGE).double()
    down = torch.randn(RANK, WIDTH).double().requires_grad_()
    h, v = torch.randn(ROWS, WIDTH).double(), torch.randn(BATCH, IMAGE).double().requires_grad_()
    weight = torch.randn(ROWS, BATCH, RANK).double()
    inputs = [down, v, *one.parameters()]

    torch.manual_seed(5)
    found = project_dropped([one], h, v, down[None], 0.2)[0]
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    kept = draw_kept((ROWS, BATCH, WIDTH), 0.2, seed, h.device)
    replayed = project_dropped([one], h, v, down[None], 0.2, kept=[kept])[0]
    written = (literal(one, h, v) * kept / 0.8) @ down.T
    assert torch.equal(found, replayed)
    assert torch.allclose(found, written, rtol=0, atol=1e-12)
    gradients = [
        torch.autograd.grad((x * weight).sum(), inputs) for x in (found, replayed, written)
    ]
    for drawn, explicit, true in zip(*gradients, strict=True):
        assert torch.equal(drawn, explicit)
        assert torch.allclose(drawn, true, rtol=1e-10, atol=1e-12)


def test_dropout_keeps_nothing_of_the_row_width_for_the_backward() -> None:
    stage, rows = stage_and_rows()
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        stage(rows, torch.randn(64, IMAGE), dropout=0.1)
    assert max(saved) < 64 * 3 * 2 * 512


def test_initial_values_are_the_published_ones() -> None:
    one, projection = Intervention(4096, 8, 512), Projection(4096, 512, 8)
    assert torch.allclose(one.R.T @ one.R, torch.eye(8), atol=1e-5)
    for parameter, fan_in in (
        (one.W, 8192), (one.b, 8192), (one.U1, 512), (one.b1, 512), (one.U2, 8), (one.b2, 8),
        (projection.A, 4096), (projection.B, 8),
    ):  # fmt: skip
        bound = fan_in**-0.5
        assert parameter.abs().max() <= bound
        if parameter.numel() > 1000:
            assert parameter.abs().max() > 0.98 * bound
            assert abs(float(parameter.detach().std()) - bound / 3**0.5) < 0.05 * bound


@pytest.mark.parametrize("image", [IMAGE, None])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_stages_together_are_the_stages_one_by_one(image: int | None, dropout: float) -> None:
    sizes = Sizes(source=WIDTH, text=16, image=image, context=4, prefix=2, suffix=1, rank=RANK)
    stages = [PromptStage(sizes).double() for _ in range(3)]
    rows = Rows(tuple(torch.randn(n, WIDTH).double() for n in (5, 3, 6)), 2, 1)
    v = torch.randn(BATCH, IMAGE).double()
    kept = [
        tuple(torch.rand(3, n, BATCH, WIDTH) > dropout for n in (2, 1)) if dropout else None
        for _ in stages
    ]
    alone = [s(rows, v, dropout=dropout, kept=k) for s, k in zip(stages, kept)]
    together = prompt_stages(stages, rows, v, dropout=dropout, kept=kept if dropout else None)
    for one, other in zip(alone, together):
        for name in ("context", "prefix", "suffix", "middle", "basis"):
            a, b = getattr(one, name), getattr(other, name)
            assert torch.allclose(a, b, rtol=0, atol=1e-12), name
    assert (together[0].prefix - together[1].prefix).abs().max() > 1e-3
