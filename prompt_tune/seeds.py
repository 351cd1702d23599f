"""Seeds derived from what they are for, so that no generator's state has to be saved."""

import hashlib
import os
from typing import Any

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of `parts` alone, on any machine."""
    digest = hashlib.sha256("\x1f".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def permutation(count: int, *parts: int | str) -> torch.Tensor:
    """A permutation of `0..count-1` that is a function of `parts` alone."""
    generator = torch.Generator().manual_seed(derive_seed(*parts))
    return torch.randperm(count, generator=generator)


def make_deterministic(device: str) -> None:
    """Asks torch for repeatable kernels; a no-op in cost on CPU.

    Nothing here reads memory before writing it, so new memory is not filled first.
    """
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(mode=True, warn_only=device.startswith("cuda"))
    deterministic: Any = torch.utils.deterministic  # a module whose one setting mypy does not see
    deterministic.fill_uninitialized_memory = False
