"""A key-value cache with room for the whole answer from the first token on.

Nothing is concatenated while a batch grows, one sequence can fill the same slots of every row (the
beginning that all prompts share), and rows that are done leave without a copy of the others.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

Heads = Float[Tensor, "rows heads slots size"]


class RoomyLayer(CacheLayerMixin):
    """Keys and values of one decoder layer.

    Args:
        rows: of the batch.
        slots: tokens of the longest row, padding and answer included.
    """

    is_sliding = False

    def __init__(self, rows: int, slots: int) -> None:
        super().__init__()
        self._rows, self._slots, self._filled = rows, slots, 0

    def lazy_initialization(self, key_states: Heads, value_states: Heads) -> None:
        """Takes memory, of the shape and type of the first keys and values."""
        _, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(self._rows, heads, self._slots, size)
        other, inner = value_states.shape[1], value_states.shape[3]
        self.values = value_states.new_empty(self._rows, other, self._slots, inner)
        self.is_initialized = True

    def update(
        self, key_states: Heads, value_states: Heads, *_args: Any, **_kwargs: Any
    ) -> tuple[Heads, Heads]:
        """Writes the next slots, of every row if there is but one; all slots written so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, start = len(key_states), self._filled
        self._filled += key_states.shape[2]
        self.keys[:, :, start : self._filled] = key_states
        self.values[:, :, start : self._filled] = value_states
        return self.keys[:batch, :, : self._filled], self.values[:batch, :, : self._filled]

    def reorder_cache(self, beam_idx: Int[Tensor, " left"]) -> None:
        """Keeps these rows, in this order; only those that change their place are copied."""
        if not self.is_initialized:
            return
        order = beam_idx.to(self.keys.device)
        moved = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
        for states in (self.keys, self.values):
            states[moved, :, : self._filled] = states[order[moved], :, : self._filled]
        self.keys, self.values = self.keys[: len(order)], self.values[: len(order)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots after the next `query_length` tokens, and the first of them."""
        return self._filled + query_length, 0

    def get_seq_length(self) -> int:
        """Slots written so far."""
        return self._filled

    def get_max_length(self) -> int:
        """All slots."""
        return self._slots


def roomy(config: Any, rows: int, slots: int) -> Cache | None:
    """An empty cache for a model, or None where a layer of it keeps more than keys and values.

    A sliding window is kept whole where no row is longer than the window.
    """
    layers = DynamicCache(config=config).layers
    for layer in layers:
        window = getattr(layer, "sliding_window", 0) if _slides(layer) else slots
        if type(layer) not in {DynamicLayer, DynamicSlidingWindowLayer} or window < slots:
            return None
    return Cache(layers=[RoomyLayer(rows, slots) for _ in layers]) if layers else None


def _slides(layer: Any) -> bool:
    return type(layer) is DynamicSlidingWindowLayer
