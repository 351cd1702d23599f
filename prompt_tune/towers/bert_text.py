"""BiomedCLIP-style text tower: BERT inside open_clip's `HFTextEncoder`."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip import hf_model
from torch import Tensor, nn
from transformers import BertModel

from cache.errors import ModelError
from prompt_tune.towers.frozen import linear, low
from prompt_tune.towers.layout import END
from prompt_tune.towers.parts import Stream
from prompt_tune.towers.text import Outputs, TextTower, padded

_ALL = frozenset({"start", "context", "prefix", "middle", "suffix", "name", END})


class BertBlock:
    """Post-norm: `norm(x + attention(x))`, then `norm(x + mlp(x))`."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.heads = int(layer.attention.self.num_attention_heads)
        self.hidden = int(layer.intermediate.dense.out_features)
        self.norm: nn.LayerNorm | None = None

    def query(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        """Query projection."""
        return linear(entered, self.layer.attention.self.query)

    def key_value(
        self, entered: Float[Tensor, "b n w"], *, bias: bool = True
    ) -> Float[Tensor, "b n 2w"]:
        """Key projection, then value projection, with or without their biases."""
        both = self.layer.attention.self.key, self.layer.attention.self.value
        pair = [F.linear(entered, low(one.weight), low(one.bias) if bias else None) for one in both]
        return torch.cat(pair, dim=-1)

    def query_key_value(self, entered: Float[Tensor, "b n w"]) -> Float[Tensor, "b n 3w"]:
        """Query, key and value projections, in this order."""
        return torch.cat([self.query(entered), self.key_value(entered)], dim=-1)

    def close(self, x: Float[Tensor, "b n w"], attended: Float[Tensor, "b n w"]) -> Tensor:
        """The block's output from its input and the attended values."""
        return self.closing(self.layer, x, attended)

    @staticmethod
    def closing(
        layer: Any, x: Float[Tensor, "b n w"], attended: Float[Tensor, "b n w"]
    ) -> Float[Tensor, "b n w"]:
        """The same of any block's module."""
        first, second, inner = layer.attention.output, layer.output, layer.intermediate
        x = first.LayerNorm(linear(attended, first.dense) + x)
        hidden = inner.intermediate_act_fn(linear(x, inner.dense))
        return second.LayerNorm(linear(hidden, second.dense) + x)


class BertTextTower(TextTower):
    """A BERT with open_clip's pooler and projection; every position sees every other.

    Prompt parts stand between [CLS] and the name, all of token type 0. Stage 0 passes the
    embedding LayerNorm with position and type; deeper stages enter the post-norm blocks as given.

    Raises:
        ModelError: the transformer is not a BERT encoder, or its pooler is another.
    """

    kind: ClassVar[Literal["causal", "bert"]] = "bert"

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        bert = encoder.transformer
        if type(bert) is not BertModel or bert.config.is_decoder:
            raise ModelError(
                "this backbone's text tower is not supported",
                found=type(bert).__name__,
                wanted="CLIP's causal tower, or a BERT encoder",
            )
        pooler = type(encoder.pooler)
        if pooler not in (
            hf_model.ClsPooler,
            hf_model.ClsLastHiddenStatePooler,
            hf_model.MeanPooler,
        ):
            raise ModelError(
                "this backbone's text pooler is not supported",
                found=pooler.__name__,
                wanted="cls_pooler, cls_last_hidden_state_pooler or mean_pooler",
            )
        positions = int(bert.config.max_position_embeddings)
        super().__init__(encoder, tokenizer, min(positions, int(tokenizer.context_length)))
        self.encoder, self.bert = encoder, bert
        self.blocks = [BertBlock(layer) for layer in bert.encoder.layer]
        self.first_norm = bert.embeddings.LayerNorm
        self.width = int(bert.config.hidden_size)
        self.embed_dim = _out(encoder.proj, self.width)
        self.mean = pooler is hf_model.MeanPooler

    @property
    def reads(self) -> frozenset[str]:
        """The start token, or every position."""
        return _ALL if self.mean else frozenset({"start"})

    def _table(self) -> nn.Embedding:
        return self.bert.embeddings.word_embeddings

    def _plain(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "n embed"]:
        pad = int(self.encoder.config.pad_token_id)
        out = self.encoder(padded(ids, max(map(len, ids)), pad, self.device))
        return out[0] if isinstance(out, tuple) else out

    def _positions(self) -> Float[Tensor, "positions w"]:
        table = self.bert.embeddings
        positions = table.position_embeddings.weight[: self.context_length]
        return positions + table.token_type_embeddings.weight[0]

    def _pool(self, outputs: Outputs) -> Float[Tensor, "b classes embed"]:
        if self.mean:
            pooled = _mean(outputs)
        else:
            pooled = outputs["start"][1]
            if isinstance(self.encoder.pooler, hf_model.ClsPooler) and self.bert.pooler is not None:
                pooled = self.bert.pooler.activation(self.bert.pooler.dense(pooled))
        return self.encoder.proj(pooled)


def _mean(outputs: Outputs) -> Float[Tensor, "b classes w"]:
    totals, counts = [], []
    for part, x in outputs.values():
        valid = part.on(x.device).valid
        table = Stream(x, (part,)).table()
        totals.append((table if part.even else table.where(valid[:, :, None], 0)).sum(dim=2))
        counts.append(valid.sum(dim=1, keepdim=True))
    return functools.reduce(torch.add, totals) / functools.reduce(torch.add, counts)


def _out(projection: nn.Module, width: int) -> int:
    linear = [m for m in projection.modules() if isinstance(m, nn.Linear)]
    return int(linear[-1].out_features) if linear else width
