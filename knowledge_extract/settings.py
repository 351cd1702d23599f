"""What a run may choose without changing any value: it goes to the sidecar, not into the cache."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunSettings:
    """Where and how fast to compute.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        device_map: passed to accelerate, `auto` to spread a model over devices.
        batch_size: sequences per work unit. On one CPU thread SmolLM2-135M answers, in float32, 2.2
            times as many questions a second by 32 as by 8, and by 64 a sixth more.
        threads: CPU threads of torch, of each process; None keeps its default, divided by the
            processes.
        processes: that share the work, each with the whole model; on CUDA one for each GPU.
        offline: never ask the network.
        models: where converted models are kept; None is the user's cache folder.
    """

    device: str = "auto"
    device_map: str | None = None
    batch_size: int = 32
    threads: int | None = None
    processes: int = 1
    offline: bool = False
    models: Path | None = None
