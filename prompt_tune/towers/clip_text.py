"""OpenAI-style text tower: causal, read at the end token."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cache.errors import ModelError
from prompt_tune.execution import Execution
from prompt_tune.towers import live
from prompt_tune.towers.clip_blocks import clip_blocks
from prompt_tune.towers.layout import END, PromptLayout
from prompt_tune.towers.parts import Stream
from prompt_tune.towers.text import Outputs, TextTower, padded


class ClipTextTower(TextTower):
    """The text tower of open_clip's `CLIP` (flat) or of a `CustomTextCLIP` with `TextTransformer`.

    The embedding is the final norm of the end token's output times the text projection.

    Args:
        model: the `CLIP`, or the `TextTransformer`; both name their parts alike.
        tokenizer: open_clip's tokenizer for it.
        forward: computes embeddings from padded ids.

    Raises:
        ModelError: it is not causal, is not read at its end token, or appends a class token.
    """

    kind: ClassVar[Literal["causal", "bert"]] = "causal"

    def __init__(self, model: Any, tokenizer: Any, forward: Any) -> None:
        length = min(int(model.context_length), int(tokenizer.context_length))
        super().__init__(model, tokenizer, length)
        self.forward = forward
        self._start: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
        self.blocks = clip_blocks(model.transformer, "text")
        self.width = int(model.token_embedding.weight.shape[1])
        self.embed_dim = _out(model.text_projection, self.width)
        pool = getattr(model, "text_pool_type", None) or getattr(model, "pool_type", None)
        wrong = {
            f"pooling {pool!r}": pool not in ("argmax", "eos"),
            "attention without a causal mask": model.attn_mask is None,
            "an appended class token": getattr(model, "cls_emb", None) is not None,
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ModelError(
                    "this backbone's text tower is not supported",
                    found=f"{type(model).__name__} with {what}",
                    wanted="a causal tower read at its end token",
                )

    def executing(self, execution: Execution) -> Self:
        """A tower of the same weights that runs as `execution` says."""
        other = super().executing(execution)
        other._start = {}
        return other

    @property
    def reads(self) -> frozenset[str]:
        """The end token."""
        return frozenset({END})

    def _table(self) -> nn.Embedding:
        return self.module.token_embedding  # type: ignore[return-value]

    def _plain(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "n embed"]:
        pad = int(getattr(self.module, "pad_id", 0))
        full = int(self.module.context_length)  # type: ignore[arg-type]
        out = self.forward(padded(ids, full, pad, self.device))
        return out[0] if isinstance(out, tuple) else out

    def _constant(self, layout: PromptLayout, k: int) -> list[Stream]:
        """The start token sees nothing but itself: its states are computed once for all calls."""
        start = layout.parts["start"]
        known = self._start.setdefault((layout.start_id, self.device, self.dtype), [])
        with torch.no_grad():
            if not known:
                first = self._placed(Stream(self.embed([layout.start_id])[None], (start,)))
                known.append(first.dense().x)
            while len(known) <= k:
                x, block = known[-1], self.blocks[len(known) - 1]
                entered = live.entered(block, Stream(x, (start,))).dense()
                value = block.key_value(entered.x)[..., self.width :]
                known.append(block.close(x, value))
        return [Stream(known[k], (start,))]

    def _positions(self) -> Float[Tensor, "positions w"]:
        return self.module.positional_embedding  # type: ignore[return-value]

    def _pool(self, outputs: Outputs) -> Float[Tensor, "b classes embed"]:
        _, x = outputs[END]
        module: Any = self.module
        x = module.ln_final(x)
        projection = module.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _out(projection: Any, width: int) -> int:
    if projection is None:
        return width
    return int(
        projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
    )
