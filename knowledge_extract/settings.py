"""What a run may choose without changing any value: it goes to the sidecar, not into the cache."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunSettings:
    """Where and how fast to compute.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        device_map: passed to accelerate, `auto` to spread a model over devices.
        batch_size: sequences per work unit.
        threads: CPU threads of torch; None keeps its default.
        offline: never ask the network.
        models: where converted models are kept; None is the user's cache folder.
    """

    device: str = "auto"
    device_map: str | None = None
    batch_size: int = 8
    threads: int | None = None
    offline: bool = False
    models: Path | None = None
