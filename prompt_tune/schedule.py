"""Learning rate per epoch, and Gaussian weights over epochs."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from prompt_tune.recipe import TrainSpec


def learning_rate(spec: TrainSpec, epoch: int) -> float:
    """Learning rate of `epoch`, counted from 1.

    Constant `warmup_lr` for `warmup_epochs`, then
    `lr (1 + cos(pi (epoch - warmup_epochs - 1) / epochs)) / 2` as in Dassl's scheduler, which
    counts the cosine from the end of the warm-up and so never reaches 0.
    """
    if epoch <= spec.warmup_epochs:
        return spec.warmup_lr
    turn = math.pi * (epoch - spec.warmup_epochs - 1) / spec.epochs
    return spec.lr * (1 + math.cos(turn)) / 2


def epoch_weights(spec: TrainSpec) -> tuple[float, ...]:
    """Weights of epochs 1..E, proportional to `exp(-(e - mean)^2 / (2 std^2))`, summing to 1."""
    mean = spec.epochs if spec.average_mean is None else spec.average_mean
    std = 0.3 * spec.epochs if spec.average_std is None else spec.average_std
    raw = [math.exp(-((e - mean) ** 2) / (2 * std**2)) for e in range(1, spec.epochs + 1)]
    return tuple(w / sum(raw) for w in raw)


def averaged_constant(value: Tensor, weights: Iterable[float]) -> Tensor:
    """`sum_e fp16(w_e value)` accumulated in fp16: what averaging does to a frozen fp16 tensor.

    Not the identity: the published procedure tests a backbone whose half-precision weights moved
    by about 8e-4 (relative L2).
    """
    half = value.to(torch.float16)
    total = torch.zeros_like(half)
    for weight in weights:
        total += half * weight
    return total.to(value.dtype)
