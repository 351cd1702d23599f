"""The linear probe: its solver runs on the CPU, wherever the features are."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prompt_tune.method import Batch, Problem
from prompt_tune.methods.linear_probe import LinearProbe, LinearProbeConfig

NAMES, WIDTH = ("a", "b", "c"), 6


class Elsewhere(torch.Tensor):
    """A tensor on a device that NumPy cannot read and that no CPU tensor can be mixed with."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        flat = [x for a in arguments for x in (a if isinstance(a, list | tuple) else [a])]
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if function is torch.Tensor.cpu:
            return arguments[0].detach().as_subclass(torch.Tensor)
        if function in {torch.Tensor.numpy, torch.Tensor.__array__}:
            what = "can't convert cuda:0 device type tensor to numpy"
            raise TypeError(what)
        if function is not torch.Tensor.copy_ and len({isinstance(x, cls) for x in tensors}) > 1:
            what = "Expected all tensors to be on the same device"
            raise RuntimeError(what)
        return super().__torch_function__(function, types, arguments, named or {})


def probe(names: tuple[str, ...] = NAMES) -> LinearProbe:
    backbone: Any = SimpleNamespace(embed_dim=WIDTH)
    return LinearProbe(LinearProbeConfig(), Problem(backbone, names))


def batch(count: int, seed: int, names: tuple[str, ...] = NAMES) -> Batch:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(names)
    features = np.eye(WIDTH)[labels] + 0.1 * random.normal(size=(count, WIDTH))
    return Batch(torch.from_numpy(labels), features=torch.from_numpy(features).float())


def moved(part: Batch, where: Any) -> Batch:
    assert part.features is not None
    return Batch(where(part.labels), features=where(part.features))


def elsewhere(tensor: torch.Tensor) -> Elsewhere:
    return tensor.as_subclass(Elsewhere)


def test_the_stand_in_refuses_what_a_gpu_tensor_refuses() -> None:
    away = elsewhere(torch.ones(2, 2))
    with pytest.raises(TypeError, match="can't convert"):
        away.double().numpy()
    with pytest.raises(RuntimeError, match="same device"):
        away @ torch.ones(2, 2)
    assert type((away @ away).cpu()) is torch.Tensor


def test_the_solver_sees_cpu_tensors_alone() -> None:
    here, away = probe(), probe()
    away.weight = torch.nn.Parameter(elsewhere(away.weight.detach()))
    away.bias = torch.nn.Parameter(elsewhere(away.bias.detach()))
    train, val = batch(24, 1), batch(9, 2)
    found = here.fit(train, val)
    assert away.fit(moved(train, elsewhere), moved(val, elsewhere)) == found
    assert found["val_accuracy"] == 1
    assert torch.equal(away.weight.cpu(), here.weight)
    assert torch.equal(away.bias.cpu(), here.bias)


def test_two_classes_and_a_class_without_images() -> None:
    two = probe(NAMES[:2])
    two.fit(batch(10, 1, NAMES[:2]), None)
    assert torch.equal(two.weight[0], -two.weight[1])
    assert (two.logits(batch(8, 2, NAMES[:2])).argmax(1) == batch(8, 2, NAMES[:2]).labels).all()
    gap = probe()
    part = batch(12, 1)
    assert part.features is not None
    kept = part.labels != 1
    assert gap.fit(Batch(part.labels[kept], features=part.features[kept]), None) == {"strength": 1}
    assert set(gap.logits(part).argmax(1).tolist()) == {0, 2}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_finds_what_it_finds_on_the_cpu() -> None:
    here, away = probe(), probe().to("cuda")
    train, val = batch(24, 1), batch(9, 2)
    found = here.fit(train, val)

    def to_gpu(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cuda")

    assert away.fit(moved(train, to_gpu), moved(val, to_gpu)) == found
    assert away.weight.device.type == "cuda"
    assert torch.allclose(away.weight.cpu(), here.weight, atol=1e-4)
    assert (away.logits(moved(val, to_gpu)).argmax(1).cpu() == val.labels).all()
