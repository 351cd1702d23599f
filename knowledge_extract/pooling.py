"""From the states of a right-padded batch to the rows that are kept.

A reader is called once per layer with that layer's output and returns only the wanted rows, so
the rest of the layer is freed before the next one runs.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Reader = Callable[[Float[Tensor, "batch time width"]], Float[Tensor, "rows width"]]


def rows_at(rows: Sequence[int], positions: Sequence[int]) -> Reader:
    """A reader of single positions: row `i` of the result is `states[rows[i], positions[i]]`."""
    at_rows, at_positions = torch.tensor(rows), torch.tensor(positions)

    def read(states: Float[Tensor, "batch time width"]) -> Float[Tensor, "rows width"]:
        device = states.device
        return states[at_rows.to(device), at_positions.to(device)].float()

    return read


def mean_over(mask: Bool[Tensor, "batch time"]) -> Reader:
    """A reader of the mean over the marked positions, taken in float32."""

    def read(states: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch width"]:
        weight = mask.to(states.device)[..., None]
        # `where` rather than a product: padding may hold anything, and 0 * inf is not 0.
        kept = torch.where(weight, states.float(), 0.0)
        return kept.sum(dim=1) / weight.sum(dim=1)

    return read


def tokens_of(mask: Bool[Tensor, "batch time"]) -> Reader:
    """A reader of every marked position, sequence after sequence."""

    def read(states: Float[Tensor, "batch time width"]) -> Float[Tensor, "rows width"]:
        return states[mask.to(states.device)].float()

    return read


def reader_for(pooling: str, mask: Bool[Tensor, "batch time"]) -> Reader:
    """The reader of one pooling over the content positions of a batch.

    `end_token` and `last_token` take the last marked position of each sequence.
    """
    if pooling == "mean":
        return mean_over(mask)
    if pooling == "all_tokens":
        return tokens_of(mask)
    time = torch.arange(mask.shape[1])
    last = torch.where(mask, time, -1).amax(dim=1)
    return rows_at(range(mask.shape[0]), last.tolist())


def split_rows(
    pooling: str, values: Float[Tensor, "rows layers width"], mask: Bool[Tensor, "batch time"]
) -> list[Float[Tensor, "_ layers width"]]:
    """The rows of each sequence of the batch, in its order."""
    counts = mask.sum(dim=1).tolist() if pooling == "all_tokens" else [1] * mask.shape[0]
    return list(values.split(counts))
