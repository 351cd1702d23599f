"""Hooks that keep only the wanted positions of the wanted layers.

Layer 0 is the input of the first decoder layer (the embeddings), layer k the output of decoder
layer k. The last layer's row is either that output (`raw`) or what the decoder hands on after its
final norm (`normed`, the last entry of `output_hidden_states` in Hugging Face models).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from knowledge_extract.pooling import Reader


class Decoder(Protocol):
    """What the hooks need of a language model: the decoder and its layers."""

    @property
    def decoder(self) -> nn.Module:
        """The module whose output is the last state after the final norm."""

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""


class EnoughError(Exception):
    """Leaves a forward whose remaining layers nobody reads."""


def _first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    state = getattr(output, "last_hidden_state", None)
    return state if isinstance(state, Tensor) else output[0]


class Capture:
    """A context in which the forwards of `model` leave the wanted rows behind.

    Args:
        model: the language model.
        layers: layer numbers 0..depth per block name.
        last_row: `normed` or `raw`.

    Each forward is preceded by `arm` and followed by `take`.
    """

    def __init__(self, model: Decoder, layers: Mapping[str, Sequence[int]], last_row: str) -> None:
        self._model, self._layers, self._last_row = model, dict(layers), last_row
        self._readers: dict[str, Reader] = {}
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._handles: list[Any] = []
        self._highest = max((n for numbers in self._layers.values() for n in numbers), default=0)
        self._stop = False

    def __enter__(self) -> Self:
        depth = len(self._model.layers)
        for layer in sorted({n for numbers in self._layers.values() for n in numbers}):
            if layer == 0:
                first = self._model.layers[0]
                hook = first.register_forward_pre_hook(self._before_first, with_kwargs=True)
            elif layer == depth and self._last_row == "normed":
                hook = self._model.decoder.register_forward_hook(self._after(layer))
            else:
                hook = self._model.layers[layer - 1].register_forward_hook(self._after(layer))
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()

    def arm(self, readers: Mapping[str, Reader], *, stop: bool = False) -> None:
        """What the next forward keeps, by block name; earlier leftovers are dropped.

        Args:
            readers: what is kept of each layer.
            stop: raise `EnoughError` once the highest layer has been read.
        """
        self._readers, self._stop = dict(readers), stop
        self._kept.clear()

    def take(self, block: str) -> Float[Tensor, "rows layers width"]:
        """The rows kept for a block by the last forward, float32 on the CPU."""
        rows = [self._kept.pop((block, layer)).cpu() for layer in self._layers[block]]
        return torch.stack(rows, dim=1)

    def _keep(self, layer: int, states: Tensor) -> None:
        for block, reader in self._readers.items():
            if layer in self._layers[block]:
                self._kept[block, layer] = reader(states)
        if self._stop and layer == self._highest:
            raise EnoughError

    def _after(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._keep(layer, _first(output))

        return hook

    def _before_first(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._keep(0, args[0] if args else kwargs["hidden_states"])
