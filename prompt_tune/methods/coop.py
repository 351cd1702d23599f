"""CoOp: learned context tokens before the class name."""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.class_side import of_classes
from prompt_tune.context import start_context
from prompt_tune.method import Batch, Method, MethodConfig, Problem
from prompt_tune.towers import PromptLayout, Stage


class CoopConfig(MethodConfig):
    """Settings of CoOp."""

    name: str = "coop"
    n_context: Annotated[int, Field(ge=1)] = 4
    context: str | None = "a photo of a"
    """Words whose token embeddings start the context; null starts it at random, std 0.02."""
    class_specific: bool = False
    """A context of its own for every class."""


class CoOp(Method):
    """Context optimisation (Zhou et al. 2022, eq. 2 and 3).

    The prompt of class c is `start, V_1 ... V_n, name of c, ".", end` with V trained, and
    `logit[b, c] = exp(s) <v_b, t_c>` of normalised features; the image tower is untouched.

    Differs: a class-specific context may also start from words, the same ones for every class; the
    published code starts it at random.
    Differs: the preset trains on the test transform (`train.views: 1`); the published code draws a
    new random crop of every image each time, mirrored half of the time (`views: live`).
    """

    Config = CoopConfig

    def __init__(self, config: CoopConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.settings = config
        copies = len(problem.class_names) if config.class_specific else 1
        starts = torch.stack(
            [
                start_context(problem.backbone.text, config.context, config.n_context)
                for _ in range(copies)
            ]
        )
        self.context = nn.Parameter(starts if config.class_specific else starts[0])
        self.layout = PromptLayout.build(
            problem.backbone.text, problem.class_names, n_context=config.n_context
        )

    @of_classes
    def text_features(self) -> Float[Tensor, "1 classes embed"]:
        """Text features of every class, before normalisation."""
        stage = Stage(self.context)
        return self.backbone.text.encode(self.layout, [stage])

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        return self.cosine_logits(self.image_features(batch), self.text_features())


METHOD = CoOp
