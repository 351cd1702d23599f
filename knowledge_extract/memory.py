"""Predicted peak memory of a pass, from the configuration alone."""

from collections.abc import Sequence
from typing import Any

from knowledge_extract.job import Job
from knowledge_extract.model import decoder_layers
from knowledge_extract.quiet import quiet
from knowledge_extract.recipe import room_for_answer
from knowledge_extract.units import Unit

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes per weight of a quantised matrix: codes, and one fp32 scale per block of 64 (4 bit) or per
# row (8 bit, negligible).
QUANTISED = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0}


def _empty_model(config: Any) -> Any:
    """The model's structure on the meta device: shapes without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def weight_bytes(config: Any, quantisation: str, dtype: str) -> int:
    """Bytes of the weights: matrices of the decoder layers are quantised, nothing else is.

    Raises:
        ModelError: the decoder layers were not found.
    """
    from torch import nn

    model = _empty_model(config)
    plain = sum(p.numel() for p in model.parameters())
    if quantisation == "none":
        return plain * BYTES[dtype]
    _, layers = decoder_layers(model, int(config.get_text_config().num_hidden_layers))
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    return round(linear * QUANTISED[quantisation]) + (plain - linear) * BYTES[dtype]


def peak_bytes(job: Job, quantisation: str, units: Sequence[Unit], device: str) -> int:
    """Memory of the device at its highest, the libraries themselves apart.

    While it works: the weights and the largest unit. On a CPU loading can need more: the file is
    mapped and every weight exists in the compute dtype before it is quantised (SmolLM2-135M,
    float32: predicted 0.81 GB, measured 0.82 GB unquantised and 0.93 GB in nf4).
    """
    dtype = job.recipe.compute_dtype
    working = weight_bytes(job.config, quantisation, dtype) + _unit_bytes(job, units)
    if not device.startswith("cpu"):
        return working
    dense = weight_bytes(job.config, "none", dtype)
    stored = str(getattr(job.config, "dtype", None)).removeprefix("torch.")
    return max(working, dense + dense // BYTES[dtype] * BYTES.get(stored, 2))


def _unit_bytes(job: Job, units: Sequence[Unit]) -> int:
    r"""Key-value cache, widest layer and logits of the largest unit.

    With batch $B$ of $T$ tokens, width $d$, feed-forward width $f$, $L$ layers of $h$ key-value
    heads of size $e$, vocabulary $V$ and $b$ bytes per number: $2LheBTb + BP(8d+3f)b + 8BV$, where
    $P$ tokens are read at once; the first and the last term only where answers are generated.
    """
    config, dtype = job.config.get_text_config(), job.recipe.compute_dtype
    number = BYTES[dtype]
    width = int(config.hidden_size)
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or width // heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    largest = 0
    for unit in units:
        block = job.recipe.blocks.get(unit.task.source)
        asks = unit.task.kind in {"generate", "sample"}
        more = room_for_answer(block)
        generates = asks and more > 1
        batch = len(unit.pieces) * getattr(block, "samples", 1)  # at most
        prompt = max(len(piece.reading.ids) for piece in unit.pieces)
        memory = 2 * job.depth * shared * size * batch * (prompt + more) * number
        layer = batch * (prompt if generates else prompt + more) * (8 * width + 3 * inner) * number
        logits = 8 * batch * int(config.vocab_size)
        largest = max(largest, layer + (memory + logits if generates else 0))
    return largest
