"""How far apart two blocks of states are, layer by layer."""

from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import CacheMismatchError
from cache.store import KnowledgeCache


def compare_blocks(cache_path: Path, a: str, b: str) -> list[dict[str, Any]]:
    r"""Per layer, how the rows of block `b` differ from those of block `a`.

    Each row of the result has `layer`, `cosine_mean` and `cosine_min` of
    $\cos(x, y) = \langle x, y\rangle / (\|x\|\,\|y\|)$ over all classes, items and rows, and
    `max_abs`, the largest difference of a component.

    Raises:
        CacheMismatchError: the blocks differ in kind, layers, width or shape.
        MissingKnowledgeError: no such block.
    """
    with KnowledgeCache.open(cache_path) as knowledge:
        one, two = knowledge.blocks[a], knowledge.blocks[b]
        for what in ("kind", "layers", "width"):
            found, wanted = getattr(two, what), getattr(one, what)
            if found != wanted:
                message = f"blocks {a!r} and {b!r} differ in {what}"
                raise CacheMismatchError(message, where=cache_path, found=found, wanted=wanted)
        pairs = [
            (one.array(c.id, item), two.array(c.id, item))
            for c in knowledge.classes
            for item in range(one.items(c.id))
        ]
        x = np.concatenate([pair[0] for pair in pairs]).astype(np.float64)
        y = np.concatenate([pair[1] for pair in pairs]).astype(np.float64)
        layers = one.layers
    if x.shape != y.shape:
        message = f"blocks {a!r} and {b!r} differ in shape"
        raise CacheMismatchError(message, where=cache_path, found=y.shape, wanted=x.shape)
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    cosine = (x * y).sum(axis=-1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    apart = np.abs(x - y).max(axis=(0, 2))
    return [
        {
            "layer": layer,
            "cosine_mean": float(cosine[:, at].mean()),
            "cosine_min": float(cosine[:, at].min()),
            "max_abs": float(apart[at]),
        }
        for at, layer in enumerate(layers)
    ]


def describe_comparison(rows: list[dict[str, Any]]) -> str:
    """The rows of `compare_blocks` as a table of text."""
    lines = [f"{'layer':>5}  {'cosine mean':>11}  {'cosine min':>10}  {'max abs':>9}"]
    for row in rows:
        numbers = f"{row['cosine_mean']:11.5f}  {row['cosine_min']:10.5f}  {row['max_abs']:9.4g}"
        lines.append(f"{row['layer']:5d}  {numbers}")
    return "\n".join(lines)
