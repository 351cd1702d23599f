"""Attention of a few live queries over keys that are stored at their smallest shape."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from prompt_tune.towers.parts import Part


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one part: `[b or 1, classes or 1, heads, positions, head width]`."""

    part: Part
    key: Float[Tensor, "b c heads m d"]
    value: Float[Tensor, "b c heads m d"]


def visibility(
    queries: Sequence[Part], keys: Sequence[Part], device: torch.device, *, causal: bool
) -> Bool[Tensor, "c n m"] | None:
    """Which key each query sees, or None where every query sees every key.

    Dimensions along which nothing changes may have size 1. A padded key is never seen; a padded
    query sees every real key, so that its softmax is finite.
    """
    at_key = _cat_positions(keys)
    seen = at_key[:, None, :] >= 0
    if causal:
        at_query = _cat_positions(queries)
        at_query = torch.where(at_query < 0, at_key.max(), at_query)
        seen = seen & (at_query[:, :, None] >= at_key[:, None, :])
    return None if bool(seen.all()) else seen.to(device)


def _cat_positions(parts: Sequence[Part]) -> Tensor:
    classes = max(p.classes for p in parts)
    tables = [p.on(torch.device("cpu")).position for p in parts]
    return torch.cat([t.expand(classes, -1) for t in tables], dim=1)


def attend(
    query: Float[Tensor, "b c heads n d"],
    keys: Sequence[KeyValue],
    seen: Bool[Tensor, "c n m"] | None,
) -> Float[Tensor, "b c heads n d"]:
    """Softmax attention over the concatenation of `keys`, each broadcast over images and classes.

    Few queries are scored part by part, so that shared keys and values are never copied per image
    and class; many queries go through `scaled_dot_product_attention`.
    """
    batch = max(query.shape[0], *(k.key.shape[0] for k in keys))
    classes = max(query.shape[1], *(k.key.shape[1] for k in keys))
    query = query.expand(batch, classes, -1, -1, -1)
    shared = any(k.key.shape[:2] != (batch, classes) for k in keys)
    # Scores, their softmax and one copy, against keys and values: 3 heads n < 2 heads d.
    if shared and 3 * query.shape[3] < 2 * query.shape[4]:
        return _by_part(query, keys, seen)
    return _fused(query, keys, seen)


def _fused(query: Tensor, keys: Sequence[KeyValue], seen: Tensor | None) -> Tensor:
    batch, classes, heads, n, width = query.shape

    def together(parts: list[Tensor]) -> Tensor:
        full = torch.cat([p.expand(batch, classes, -1, -1, -1) for p in parts], dim=3)
        return full.reshape(batch, classes * heads, -1, width)

    mask = None
    if seen is not None:
        mask = seen[:, None].expand(classes, heads, -1, -1).flatten(0, 1)[None]
    out = F.scaled_dot_product_attention(
        query.reshape(batch, classes * heads, n, width),
        together([k.key for k in keys]),
        together([k.value for k in keys]),
        attn_mask=mask,
    )
    return out.reshape(batch, classes, heads, n, width)


def _by_part(query: Tensor, keys: Sequence[KeyValue], seen: Tensor | None) -> Tensor:
    query = query * query.shape[-1] ** -0.5
    scores = torch.cat([_product("bchnd", query, "hmd", k.key, "bchnm") for k in keys], dim=-1)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = scores.softmax(dim=-1).split([k.key.shape[3] for k in keys], dim=-1)
    out = [
        _product("bchnm", w, "hmd", k.value, "bchnd") for w, k in zip(weights, keys, strict=True)
    ]
    return functools.reduce(torch.add, out)


def _product(left: str, a: Tensor, right: str, b: Tensor, out: str) -> Tensor:
    """An einsum whose second operand drops the batch and class dimensions it does not have."""
    for axis, letter in ((1, "c"), (0, "b")):
        if b.shape[axis] == 1 and a.shape[axis] != 1:
            b = b.squeeze(axis)
        else:
            right = letter + right
    return torch.einsum(f"{left},{right}->{out}", a, b)
