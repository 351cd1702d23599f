"""Tip-Adapter-F: Tip-Adapter whose keys are trained."""

import math
from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from prompt_tune.method import Batch
from prompt_tune.methods.tip_adapter import TipAdapter, TipAdapterConfig
from prompt_tune.seeds import permutation

Positive = Annotated[int, Field(ge=1)]


class TipAdapterFConfig(TipAdapterConfig):
    """Settings of Tip-Adapter-F."""

    name: str = "tip-adapter-f"
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Sharpness while the keys are trained."""
    start_alphas: tuple[Annotated[float, Field(ge=0)], ...] = tuple(float(a) for a in range(1, 10))
    """Weights of the memory to train with, one run each; the best on validation images counts."""
    epochs: Positive = 20
    batch_size: Positive = 256
    lr: Annotated[float, Field(gt=0)] = 0.001
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class TipAdapterF(TipAdapter):
    """Tip-Adapter (Zhang et al., ECCV 2022) with trained keys, fixed values.

    The keys start as the training features and follow the cross-entropy of the training images
    under AdamW (lr 0.001, eps 1e-4, torch's weight decay), 20 epochs of batches of 256, the rate

        lr_t = lr (1 + cos(pi t / steps)) / 2

    per step. This is done once for each alpha of 1 ... 9 with beta 1 (the medical port's defaults);
    the keys of the run and epoch with the best validation accuracy stay, the earliest on a tie, and
    then alpha and beta are searched as in Tip-Adapter. Without validation images it is one run with
    alpha 1 and beta 1, its last epoch kept and no search.

    The weights file holds what became of the training images' features; see Tip-Adapter.

    Differs: features are those of the test transform in every epoch; the published code augments
    (crops of scale 0.5 to 1, flips).
    Differs: the port also runs alpha 0, which trains nothing and wins every tie with zero-shot.
    Differs: every run starts from the features. In the medical port the runs share one tensor, so
    that each goes on from the last, and the training that follows them moves nothing.
    Differs: epochs are chosen on validation images; the authors' code chose them on test images.
    """

    Config = TipAdapterFConfig

    def fit(self, train: Batch, val: Batch | None) -> Mapping[str, float]:
        """Trains keys for every starting alpha, keeps the best, and searches alpha and beta.

        Returns:
            What was chosen; `steps` and `images_seen` count all runs together.
        """
        config = self.settings
        assert isinstance(config, TipAdapterFConfig)  # noqa: S101 - see Config
        v = self.own_features(train)
        with torch.no_grad():
            held_out = None if val is None else (self.image_features(val), val.labels)
        starts = (config.alpha,) if held_out is None else config.start_alphas
        best = (-1, config.alpha, v)
        for alpha in starts:
            hits, keys = self._run(config, alpha, v, train.labels, held_out)
            if hits > best[0]:
                best = (hits, alpha, keys)
        with torch.no_grad():
            self.keys.copy_(best[2])
            self.alpha.fill_(best[1])
        epochs = len(starts) * config.epochs
        steps = epochs * math.ceil(len(v) / config.batch_size)
        counted = {"steps": float(steps), "images_seen": float(epochs * len(v))}
        return {"start_alpha": best[1], **self.choose(val), **counted}

    def _run(
        self,
        config: TipAdapterFConfig,
        alpha: float,
        v: Float[Tensor, "cases embed"],
        labels: Int[Tensor, "cases"],
        held_out: tuple[Tensor, Tensor] | None,
    ) -> tuple[int, Float[Tensor, "cases embed"]]:
        """The validation hits of the best epoch, 0 without validation, and its keys."""
        keys = v.clone().requires_grad_()
        optimizer = torch.optim.AdamW(
            [keys], lr=config.lr, eps=1e-4, weight_decay=config.weight_decay
        )
        steps = config.epochs * math.ceil(len(v) / config.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best = (-1, v)
        for epoch in range(config.epochs):
            order = permutation(len(v), self.seed, "tip-adapter-f", epoch).to(v.device)
            for own in order.split(config.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(
                    self.scores(v[own], keys, alpha, config.beta), labels[own]
                ).backward()
                optimizer.step()
                schedule.step()
            if held_out is not None:
                with torch.no_grad():
                    found = self.scores(held_out[0], keys, alpha, config.beta).argmax(1)
                hits = int((found == held_out[1]).sum())
                if hits > best[0]:
                    best = (hits, keys.detach().clone())
        return (0, keys.detach()) if held_out is None else best


METHOD = TipAdapterF
