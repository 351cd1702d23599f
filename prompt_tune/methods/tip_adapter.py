"""Tip-Adapter: the training images themselves as a key-value memory."""

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.captions import Captions, caption_features
from prompt_tune.method import Batch, Method, MethodConfig, Problem

LEAST = 0.1  # where both axes of the grid begin
BLOCK = 4_000_000  # logits computed at once in the search


class TipAdapterConfig(MethodConfig):
    """Settings of Tip-Adapter."""

    name: str = "tip-adapter"
    captions: Captions = "template"
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the memory, where no validation images choose it."""
    beta: Annotated[float, Field(gt=0)] = 5.5
    """Sharpness of the memory, likewise."""
    grid: Annotated[int, Field(ge=1)] = 200
    """Values tried of each: `0.1 + i (most - 0.1) / grid`, i = 0 ... grid - 1."""
    most: Annotated[float, Field(gt=LEAST)] = 50.0


class TipAdapter(Method):
    """A memory of training features beside zero-shot (Zhang et al., "Tip-Adapter", ECCV 2022).

    With V the normalised test features, T the normalised captions, K the normalised features of the
    n training images (the keys) and L their one-hot labels (the values),

        logits = s V T^T + alpha exp(-beta (1 - V K^T)) L.

    Nothing is trained: `fit` stores the keys. alpha and beta are those with the best accuracy on
    the validation images, over a grid of 200 x 200 values in [0.1, 50) as in the medical port; the
    authors' own ranges vary with the dataset and are not documented. Without validation images they
    are 1 and 5.5, the paper's.

    The keys are features of the training images, one each, and the weights file holds them: where
    the images are patients', so are the weights.

    Differs: the scale s is the backbone's; the medical port writes 85.2323 or 100 into the code.
    Differs: hyper-parameters are chosen on validation images alone, and on a tie the starting pair
    stays, then the smaller beta, then the smaller alpha. The published search starts from no pair,
    so that with few validation images a tie takes it to alpha = beta = 0.1.
    Differs: keys come from the test transform; the medical port takes one random crop of each image
    (scale 0.5 to 1, mirrored half of the time), the authors the mean of 10.
    """

    Config = TipAdapterConfig
    fitted_by = "solver"
    text: Tensor
    values: Tensor

    def __init__(self, config: TipAdapterConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.settings = config
        self.seed = problem.seed
        labels = problem.train_labels
        if labels is None:
            what = "a memory of training images needs their labels"
            raise ValueError(what)
        values = F.one_hot(labels, len(problem.class_names)).float()
        self.register_buffer("text", caption_features(problem, config.captions), persistent=False)
        self.register_buffer("values", values, persistent=False)
        self.keys = nn.Parameter(torch.zeros(len(labels), problem.backbone.embed_dim))
        self.alpha = nn.Parameter(torch.tensor(config.alpha))
        self.beta = nn.Parameter(torch.tensor(config.beta))

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Zero-shot logits and what the memory adds."""
        return self.scores(self.image_features(batch), self.keys, self.alpha, self.beta)

    def scores(
        self,
        v: Float[Tensor, "batch embed"],
        keys: Float[Tensor, "cases embed"],
        alpha: float | Tensor,
        beta: float | Tensor,
    ) -> Float[Tensor, "batch classes"]:
        """The logits of normalised features under any keys, alpha and beta."""
        memory = torch.exp(-beta * (1 - v @ keys.T)) @ self.values
        return self.cosine_logits(v, self.text[None]) + alpha * memory

    def fit(self, train: Batch, val: Batch | None) -> Mapping[str, float]:
        """Stores the keys and chooses alpha and beta."""
        with torch.no_grad():
            self.keys.copy_(self.own_features(train))
        return self.choose(val)

    @torch.no_grad()
    def own_features(self, train: Batch) -> Float[Tensor, "cases embed"]:
        """Normalised features of the images whose labels are the values."""
        if not torch.equal(train.labels, self.values.argmax(1)):
            what = "the training images are not those the memory was made for"
            raise ValueError(what)
        return self.image_features(train)

    @torch.no_grad()
    def choose(self, val: Batch | None) -> dict[str, float]:
        """Sets alpha and beta to the best of the grid on validation images, if there are any."""
        if val is None:
            return {"alpha": float(self.alpha), "beta": float(self.beta)}
        v, count = self.image_features(val), len(val.labels)
        base, affinity = self.cosine_logits(v, self.text[None]), v @ self.keys.T
        start = self.scores(v, self.keys, self.alpha, self.beta)
        best = (int((start.argmax(1) == val.labels).sum()), float(self.alpha), float(self.beta))
        step = (self.settings.most - LEAST) / self.settings.grid
        tried = [LEAST + i * step for i in range(self.settings.grid)]
        for beta in tried:
            memory = torch.exp(-beta * (1 - affinity)) @ self.values
            hits = _hits(base, memory, base.new_tensor(tried), val.labels)
            top = int(hits.max())
            if top > best[0]:
                best = (top, tried[hits.tolist().index(top)], beta)
        self.alpha.fill_(best[1])
        self.beta.fill_(best[2])
        return {"alpha": best[1], "beta": best[2], "val_accuracy": best[0] / count}


def _hits(
    base: Float[Tensor, "batch classes"],
    memory: Float[Tensor, "batch classes"],
    alphas: Float[Tensor, "tried"],
    labels: Int[Tensor, "batch"],
) -> Int[Tensor, "tried"]:
    """For every alpha, how many cases are right."""
    blocks = alphas.split(max(1, BLOCK // base.numel()))
    return torch.cat(
        [((base + a[:, None, None] * memory).argmax(2) == labels).sum(1) for a in blocks]
    )


METHOD = TipAdapter
