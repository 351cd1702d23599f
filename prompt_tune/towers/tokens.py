"""Token ids without padding and without silent truncation, from open_clip's tokenizers."""

from collections.abc import Sequence
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from cache.errors import ModelError


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text from its start token to its end token.

    Raises:
        ModelError: the tokenizer is of a kind whose ids end otherwise.
    """
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None:
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        return [[start, *tokenizer.encode(text), end] for text in texts]
    if isinstance(tokenizer, HFTokenizer):
        plain = not tokenizer.strip_sep_token and not tokenizer.tokenizer_mode
        if plain and tokenizer.tokenizer.sep_token_id is not None:
            cleaned = [tokenizer.clean_fn(text) for text in texts]
            return [list(ids) for ids in tokenizer.tokenizer(cleaned, verbose=False).input_ids]
    raise ModelError(
        "this backbone's tokenizer is not supported",
        found=type(tokenizer).__name__,
        wanted="CLIP's byte-pair tokenizer, or a BERT tokenizer that closes with [SEP]",
    )
