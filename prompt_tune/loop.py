"""The training loop: one straight line, resumable bit for bit.

Nothing random has a state: the order of an epoch, the view of an image and the dropout of a step
are functions of (seed, epoch, step). A run that is killed continues from its last saved state and
computes the same numbers.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.errors import RunError
from cache.progress import track
from prompt_tune.cases import Cases, Feed
from prompt_tune.checkpoint import TrainState, load_state, save_state
from prompt_tune.method import Batch, Method
from prompt_tune.recipe import TrainSpec
from prompt_tune.schedule import epoch_weights, learning_rate
from prompt_tune.seeds import derive_seed


def averaged_names(method: Method, spec: TrainSpec) -> frozenset[str]:
    """The trainable tensors that end as their Gaussian-weighted mean over epochs."""
    if spec.average == "none":
        return frozenset()
    return frozenset(method.trainable()) if spec.average == "trainables" else method.prompts()


SLOTS = {
    "sgd": {"momentum": "momentum_buffer"},
    "adamw": {"mean": "exp_avg", "square": "exp_avg_sq", "updates": "step"},
}
"""What each optimiser remembers of a tensor: the name in a saved state, and torch's."""


def new_optimizer(method: Method, spec: TrainSpec) -> torch.optim.Optimizer:
    """The optimiser of a recipe over a method's trainable tensors."""
    parameters = list(method.trainable().values())
    rate, decay = spec.lr, spec.weight_decay
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=spec.momentum, weight_decay=decay)


def accuracy(method: Method, cases: Cases, size: int) -> float:
    """Share of cases whose highest logit is their label's; probability 0..1."""
    hits = 0
    with method.predicting():
        for batch in cases.in_order(size):
            hits += int((method.logits(batch).argmax(dim=1) == batch.labels).sum())
    return hits / len(cases)


class _Progress:
    """Everything that changes during training and is saved with a state."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, spec: TrainSpec):
        self.parameters = method.trainable()
        self.optimizer, self.slots = optimizer, SLOTS[spec.optimizer]
        averaged, published = averaged_names(method, spec), spec.average == "published"
        self.average = {
            n: torch.zeros_like(
                p, dtype=p.dtype if published else torch.promote_types(p.dtype, torch.float32)
            )
            for n, p in self.parameters.items()
            if n in averaged
        }
        self.best: dict[str, Tensor] = {}
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.notes: dict[str, Any] = {"history": [], "best_epoch": 0, "best_score": -1.0}
        self.notes["seconds"] = 0.0

    def state(self, epoch: int, step: int) -> TrainState:
        """A snapshot; tensors are shared, not copied."""
        tensors: dict[str, Tensor] = {"loss_sum": self.loss_sum}
        for name, parameter in self.parameters.items():
            tensors[f"trainable/{name}"] = parameter
            for group, slot in self.slots.items():
                if (value := self.optimizer.state[parameter].get(slot)) is not None:
                    tensors[f"{group}/{name}"] = value
        tensors |= {f"average/{n}": t for n, t in self.average.items()}
        tensors |= {f"best/{n}": t for n, t in self.best.items()}
        return TrainState(epoch, step, tensors, self.notes)

    def like(self) -> tuple[dict[str, Tensor], frozenset[str]]:
        """What a snapshot may hold, and the names of what it must hold."""
        like = {"loss_sum": self.loss_sum}
        like |= {f"trainable/{n}": p for n, p in self.parameters.items()}
        like |= {f"average/{n}": t for n, t in self.average.items()}
        required = frozenset(like)
        for group in (*self.slots, "best"):
            like |= {f"{group}/{n}": p for n, p in self.parameters.items()}
        if "updates" in self.slots:
            like |= {f"updates/{n}": torch.zeros(()) for n in self.parameters}
        return like, required

    def restore(self, state: TrainState) -> None:
        """Puts a snapshot back that fits `like`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.tensors[f"trainable/{name}"])
                for group, slot in self.slots.items():
                    if (kept := state.tensors.get(f"{group}/{name}")) is not None:
                        place = parameter.device if kept.ndim else torch.device("cpu")
                        self.optimizer.state[parameter][slot] = kept.to(place)
            for name, value in self.average.items():
                value.copy_(state.tensors[f"average/{name}"])
        self.best = {
            key.removeprefix("best/"): value
            for key, value in state.tensors.items()
            if key.startswith("best/")
        }
        self.loss_sum, self.notes = state.tensors["loss_sum"], state.notes

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Replaces parameters by averaged or best ones."""
        with torch.no_grad():
            for name, value in tensors.items():
                self.parameters[name].copy_(value)


def train(
    method: Method,
    cases: Cases,
    val: Cases | None,
    spec: TrainSpec,
    *,
    folder: Path,
    digest: str,
) -> dict[str, Any]:
    """Trains `method` in place and returns its history, its budget and timing.

    `seconds` are of all steps, those before an interruption too; `step_seconds` and `stall_share`
    are of the steps of this process.

    SGD with momentum, or AdamW, with weight decay on every trainable tensor, mean loss per batch,
    learning rate per epoch. State is saved in `folder` after every epoch (and every
    `checkpoint_steps`).

    Raises:
        RunError: the saved state belongs to another recipe, or the loss stopped being finite.
    """
    optimizer = new_optimizer(method, spec)
    at = _Progress(method, optimizer, spec)
    start_epoch, start_step = 1, 0
    like, required = at.like()
    saved = load_state(folder, recipe_digest=digest, like=like, required=required)
    if saved is not None:
        at.restore(saved)
        start_epoch, start_step = saved.epoch, saved.step

    per_epoch = cases.steps(spec.batch_size)
    total = min(spec.epochs * per_epoch, spec.max_steps or spec.epochs * per_epoch)
    done = min((start_epoch - 1) * per_epoch + start_step, total)
    feed = Feed(cases)
    upcoming = _batches(feed, spec.batch_size, start_epoch, start_step)
    batch: Batch | None = None
    seconds, timed = 0.0, 0
    with track("train", total, done) as progress:
        for epoch in range(start_epoch, math.ceil(total / per_epoch) + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spec, epoch)
            first = start_step if epoch == start_epoch else 0
            last = min(per_epoch, total - (epoch - 1) * per_epoch)
            for step in range(first, last):
                began = time.perf_counter()
                torch.manual_seed(derive_seed(cases.seed, "step", epoch, step))
                method.train()
                optimizer.zero_grad(set_to_none=True)
                batch = next(upcoming) if batch is None else batch
                loss = method.backward(batch)
                optimizer.step()
                if done + 1 < total:  # made while a GPU still works on this step
                    batch = next(upcoming)
                value = loss.double().cpu()
                if not torch.isfinite(value):
                    what = f"the loss is {float(value)} at epoch {epoch}, step {step + 1}"
                    raise RunError(what, where=folder, do="Lower train.lr.")
                at.loss_sum = at.loss_sum + value
                done += 1
                took, timed = time.perf_counter() - began, timed + 1
                seconds, at.notes["seconds"] = seconds + took, at.notes["seconds"] + took
                progress.advance(1, f"epoch {epoch}/{spec.epochs} loss {float(value):.3f}")
                if spec.checkpoint_steps and (step + 1) % spec.checkpoint_steps == 0:
                    save_state(folder, at.state(epoch, step + 1), recipe_digest=digest)
            _end_of_epoch(method, val, spec, at, epoch=epoch, steps=last)
            save_state(folder, at.state(epoch + 1, 0), recipe_digest=digest)
    method.eval()
    if spec.max_steps is None:
        at.adopt({n: v.to(at.parameters[n].dtype) for n, v in at.average.items()})
    at.adopt(at.best)
    history, best = at.notes["history"], at.notes["best_epoch"]
    step_seconds = seconds / timed if timed else None
    kept = f"epoch {best}" if spec.select == "best-val" else f"epoch {len(history)}"
    return {
        "history": history,
        "kept": kept,
        "step_seconds": step_seconds,
        "stall_share": feed.waited() / seconds if timed else None,
        "steps": done,
        "images_seen": done * min(spec.batch_size, len(cases)),
        "seconds": at.notes["seconds"],
    }


def _batches(feed: Feed, size: int, epoch: int, step: int) -> Iterator[Batch]:
    """The batches from a step of an epoch on, epoch after epoch."""
    while True:
        for images in feed.cases.epoch(epoch, size)[step:]:
            yield feed.batch(images, epoch=epoch)
        epoch, step = epoch + 1, 0


def _end_of_epoch(
    method: Method,
    val: Cases | None,
    spec: TrainSpec,
    at: _Progress,
    *,
    epoch: int,
    steps: int,
) -> None:
    method.eval()
    weights = epoch_weights(spec)
    for name, mean in at.average.items():
        mean.add_(at.parameters[name].detach() * weights[epoch - 1])
    entry = {"epoch": epoch, "lr": learning_rate(spec, epoch), "loss": float(at.loss_sum) / steps}
    if spec.select == "best-val" and val is not None:
        entry["val_accuracy"] = accuracy(method, val, spec.batch_size)
        if entry["val_accuracy"] > at.notes["best_score"]:
            at.notes["best_score"], at.notes["best_epoch"] = entry["val_accuracy"], epoch
            at.best = {n: p.detach().clone() for n, p in at.parameters.items()}
    at.notes["history"].append(entry)
    at.loss_sum = torch.zeros((), dtype=torch.float64)
