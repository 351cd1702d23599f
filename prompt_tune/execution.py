"""How the frozen towers are executed. What they compute depends on it by rounding alone.

Every run has towers of its own for this; they share the weights of the backbone.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from prompt_tune.backbone import Backbone

Precision = Literal["fp32", "bf16"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Execution:
    """How towers run.

    Attributes:
        precision: of the towers' matrix products. With `bf16` they run under autocast; embeddings
            leave the towers in the precision of the weights, and coordinates of low-rank rows and
            the norms made of them never leave it, nor does anything outside the towers.
        class_chunk: the text tower takes at most so many classes at a time and computes them again
            for the backward; None takes all and keeps what the backward needs.
        checkpoint_image: blocks of the image tower are computed again for the backward.
        compiled: the part of a block behind the attention goes through `torch.compile`.
    """

    precision: Precision = "fp32"
    class_chunk: int | None = None
    checkpoint_image: bool = False
    compiled: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which a tower runs."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @classmethod
    def from_json(cls, known: dict[str, Any]) -> "Execution":
        """What `to_json` gave."""
        return cls(**{f.name: known[f.name] for f in dataclasses.fields(cls) if f.name in known})

    def to_json(self) -> dict[str, Any]:
        """For `run.json`."""
        return dataclasses.asdict(self)


def recomputed(work: Callable[[], Result]) -> Result:
    """What `work` returns; for a backward it is computed again instead of kept.

    `work` must draw nothing at random.
    """
    if not torch.is_grad_enabled():
        return work()
    result: Result = checkpoint(work, use_reentrant=False, preserve_rng_state=False)
    return result


def executing(backbone: "Backbone", execution: Execution) -> "Backbone":
    """The backbone with towers of its own that run as `execution` says; weights are shared."""
    if backbone.image.execution == backbone.text.execution == execution:
        return backbone
    image, text = backbone.image.executing(execution), backbone.text.executing(execution)
    return dataclasses.replace(backbone, image=image, text=text)
