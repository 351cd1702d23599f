"""CoCoOp: a context that a small network shifts for every image."""

from collections import OrderedDict
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.context import start_context
from prompt_tune.method import Batch, Method, MethodConfig, Problem
from prompt_tune.towers import PromptLayout, Stage


class CoCoopConfig(MethodConfig):
    """Settings of CoCoOp."""

    name: str = "cocoop"
    n_context: Annotated[int, Field(ge=1)] = 4
    context: str | None = "a photo of a"
    """Words whose token embeddings start the context; null starts it at random, std 0.02."""
    reduction: Annotated[int, Field(ge=1)] = 16
    """The hidden layer is the embedding's width divided by this."""


class CoCoOp(Method):
    """Conditional context optimisation (Zhou et al., CVPR 2022).

    With v the normalised feature of an image, of width d, its prompt of class c is
    `start, V_1 + p(v) ... V_n + p(v), name of c, ".", end`, where
    p(v) = W2 relu(W1 v + b1) + b2 and W1 is [d / 16, d]; then

        logit[b, c] = exp(s) <v_b, t_c(v_b)>,   loss = mean cross-entropy.

    V, W1, b1, W2 and b2 are trained. Every image has text features of its own.

    Differs: all images of a batch go through the text tower at once, the published code's one
    after the other; both are the same function. Its meta-network is in fp16, this one in fp32.
    Differs: the preset trains on the test transform (`train.views: 1`); the BiomedCoOp benchmark
    draws a new random crop of every image each time (`views: live`, `flip: false`), the authors'
    code also mirrors half of them.
    """

    Config = CoCoopConfig

    def __init__(self, config: CoCoopConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        text, embed = problem.backbone.text, problem.backbone.embed_dim
        self.context = nn.Parameter(start_context(text, config.context, config.n_context))
        hidden = max(1, embed // config.reduction)
        first, second = nn.Linear(embed, hidden), nn.Linear(hidden, text.width)
        self.meta_net = nn.Sequential(
            OrderedDict([("linear1", first), ("relu", nn.ReLU()), ("linear2", second)])
        )
        self.layout = PromptLayout.build(text, problem.class_names, n_context=config.n_context)

    def prompts(self) -> frozenset[str]:
        """The context; not the network."""
        return frozenset({"context"})

    def text_features(
        self, v: Float[Tensor, "batch embed"]
    ) -> Float[Tensor, "batch classes embed"]:
        """Text features of every class, before normalisation, for each image feature."""
        context = self.context + self.meta_net(v)[:, None, None]
        return self.backbone.text.encode(self.layout, [Stage(context)])

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        v = self.image_features(batch)
        return self.cosine_logits(v, self.text_features(v))


METHOD = CoCoOp
