"""Prompted towers as plainly as can be: open_clip's own forward, with hooks that put prompts in.

Nothing of the product is used. Every block computes every position. Visual prompts stand between
class token and patches here, and behind the patches in the product.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


def _put(prompt: Tensor, *, over: int) -> Callable[[Tensor], Tensor]:
    """Writes a prompt behind position 0, in the place of the `over` tokens there."""
    return lambda x: torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), x[:, 1 + over :]], dim=1)


def _run(work: Callable[[], Tensor], first: Any, blocks: Any, prompts: Sequence[Tensor]) -> Tensor:
    """What `work` returns with prompt k in front of block k; prompt 0 in front of `first`."""
    changes = [] if first is None else [(first, _put(prompts[0], over=0))]
    changes += [(blocks[k], _put(p, over=len(p))) for k, p in enumerate(prompts) if k]
    with ExitStack() as stack:
        for module, change in changes:
            handle = module.register_forward_pre_hook(
                lambda _, args, change=change: (change(args[0]), *args[1:])
            )
            stack.callback(handle.remove)
        return work()


def _bert(model: Any) -> Any:
    return getattr(getattr(model, "text", None), "transformer", None)


def tokens(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Ids of texts; a BERT reads the columns that are not padding alone, CLIP its whole context."""
    ids: Tensor = tokenizer(list(texts))
    return ids if _bert(model) is None else ids[:, ids.any(dim=0)]


def image(model: Any, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Un-normalised features of open_clip's or timm's vision transformer under prompts."""
    visual = model.visual
    if hasattr(visual, "trunk"):
        return _run(lambda: visual(images), visual.trunk.norm_pre, visual.trunk.blocks, prompts)
    return _run(lambda: visual(images), visual.ln_pre, visual.transformer.resblocks, prompts)


def text(model: Any, tokenizer: Any, names: Sequence[str], contexts: Sequence[Tensor]) -> Tensor:
    """Un-normalised features of "context, name." under a context for each of the first blocks."""
    size = len(contexts[0])
    ids = tokens(model, tokenizer, [" ".join(["a"] * size) + f" {name}." for name in names])
    bert = _bert(model)
    table = model.token_embedding if bert is None else bert.embeddings.word_embeddings
    blocks = model.transformer.resblocks if bert is None else bert.encoder.layer
    put = _put(contexts[0], over=size)
    handle = table.register_forward_hook(lambda _, __, out: put(out))
    try:
        return _run(lambda: model.encode_text(ids), None, blocks, contexts)
    finally:
        handle.remove()
