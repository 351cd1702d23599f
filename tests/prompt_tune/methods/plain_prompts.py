"""Text features of written-out prompts, every position, by `tests/oracle/plain_cilmp.py`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prompt_tune.backbone import Backbone


def text_of(plain: Any, backbone: Backbone, kind: str) -> Any:
    """The plain text tower of a tiny backbone."""
    weights = backbone.model.state_dict()
    if kind == "clip":
        return plain.CausalText(weights, heads=4)
    return plain.BertText(weights, heads=4, pooler="cls", length=40)


def ids(backbone: Backbone, kind: str, text: str) -> list[int]:
    """From start to end, by the tokenizer's own means."""
    tokenizer: Any = backbone.tokenizer
    if kind == "clip":
        return [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]
    return list(tokenizer.tokenizer(text).input_ids)


def encode(text: Any, prompts: Sequence[Tensor]) -> Tensor:
    """Features of token embeddings [positions, width], start and end included."""
    lengths = [len(p) for p in prompts]
    x = text.enter(torch.stack([text.pad(p) for p in prompts]))
    for k in range(text.depth):
        x = text.block(k, x, lengths)
    return text.pool(x, lengths)


def encode_texts(text: Any, backbone: Backbone, kind: str, texts: Sequence[str]) -> Tensor:
    """Features of plain texts."""
    return encode(text, [text.tokens(ids(backbone, kind, t)) for t in texts])
