"""How far a state may move when it is computed again: what an audit allows, and a cache records.

Relative to the norm of a layer's row. The first part is three times what was measured between
batches in float32, twice in bfloat16, one and a half times in float16 (see `generate`); the second
is one unit in the last place of float16, where states are stored so. Another processor rounds in
another order too: the same table was enough between one and two CPU threads, and was not measured
between devices.
"""

from collections.abc import Mapping

from cache.blocks import BlockSpec

COMPUTE: Mapping[str, float] = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.1}
STORED = {"f2": 2.0**-10, "f4": 0.0}
ANSWERS_MAY_FALL_OTHERWISE = frozenset({"float16", "bfloat16"})  # near ties between two tokens


def tolerance(spec: BlockSpec) -> float | None:
    """The largest relative difference an audit allows in a block; None: it must be equal."""
    if spec.dtype is None:
        return None
    return COMPUTE[str(spec.spec["compute_dtype"])] + STORED[spec.dtype]


def recorded(specs: Mapping[str, BlockSpec]) -> dict[str, str]:
    """The tolerance of every block of states, as provenance holds it."""
    found = {name: tolerance(spec) for name, spec in specs.items()}
    return {f"tolerance.{n}": f"{value:.6g}" for n, value in found.items() if value is not None}
