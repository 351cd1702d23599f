"""A stand-in backbone for methods that only see features: float64, captions by their bytes."""

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from prompt_tune.method import Batch

SCALE = 20.0


def _feature(text: str, width: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).normal(size=width)


def backbone(width: int) -> Any:
    def encode_texts(texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([_feature(t, width) for t in texts]))

    return SimpleNamespace(
        embed_dim=width,
        logit_scale=SCALE,
        device=torch.device("cpu"),
        text=SimpleNamespace(encode_texts=encode_texts),
    )


def captions(names: tuple[str, ...], width: int) -> np.ndarray:
    """Normalised features of `a photo of a NAME.`."""
    return unit(np.stack([_feature(f"a photo of a {n}.", width) for n in names]))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cases(
    labels: np.ndarray, width: int, seed: int, noise: float = 1.0
) -> tuple[np.ndarray, Batch]:
    """Normalised features in NumPy, and a batch that holds them un-normalised."""
    random = np.random.default_rng(seed)
    raw = 2 * np.eye(width)[labels] + noise * random.normal(size=(len(labels), width))
    batch = Batch(torch.from_numpy(labels), features=torch.from_numpy(raw))
    return unit(raw), batch


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(1) == labels).mean())
