"""Where learnable context tokens start."""

import torch
from jaxtyping import Float
from torch import Tensor

from cache.errors import RecipeError
from prompt_tune.towers import TextTower

STD = 0.02


def start_context(tower: TextTower, text: str | None, count: int) -> Float[Tensor, "count width"]:
    """`count` context tokens: the token embeddings of `text`, then normal ones with std 0.02.

    Raises:
        RecipeError: the text has more tokens than the context.
    """
    context = STD * torch.randn(count, tower.width)
    if text is None:
        return context
    ids = tower.tokenize([text])[0][1:-1]
    if len(ids) > count:
        raise RecipeError(
            f"the context text {text!r} does not fit",
            where="method.context",
            found=f"{len(ids)} tokens",
            wanted=f"at most n_context = {count}",
            do="Raise method.n_context, or set context: null.",
        )
    with torch.no_grad():
        context[: len(ids)] = tower.embed(ids).float().cpu()
    return context
