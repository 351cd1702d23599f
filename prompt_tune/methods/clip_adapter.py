"""CLIP-Adapter: a small network after the frozen image tower."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.captions import Captions, caption_features
from prompt_tune.method import Batch, Method, MethodConfig, Problem


class ClipAdapterConfig(MethodConfig):
    """Settings of CLIP-Adapter."""

    name: str = "clip-adapter"
    captions: Captions = "template"
    reduction: Annotated[int, Field(ge=1)] = 4
    mix: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the adapted feature: 0.2 in the authors' code, 0.5 in the medical port of
    BiomedCoOp's comparison."""
    normalise: bool = True
    """Whether the mixture is normalised again: yes in the authors' code, no in that port."""


class ClipAdapter(Method):
    """A bottleneck on image features (Gao et al., "CLIP-Adapter", arXiv 2110.04544, 2021).

    With v the normalised image feature and t_c the normalised feature of the caption,

        a = relu(W_2 relu(W_1 v)),   W_1: D -> D/4,  W_2: D/4 -> D, no biases,
        u = mix a + (1 - mix) v,     logit[b, c] = s <u / |u|, t_c>.

    The matrices start as torch's linear layers do. Knowledge plays no part.

    Differs: the authors' code adapts features before they are normalised; here, as in the medical
    port, W_1 sees normalised ones, so that the norm of a tower's output does not scale the step.
    Differs: only the visual adapter; the paper's text adapter is not in the authors' code either.
    Differs: the learning rate goes per epoch, as for every method here. The port steps a schedule
    counted in epochs once per batch, so that its rate falls to zero and climbs back.
    Differs: the preset, which has the port's budget and mix, normalises as the authors do: without
    it the norm of u scales the logits beside s, and `normalise: false` is the port's.
    Differs: the preset trains on the test transform (`train.views: 1`); the port draws a new random
    crop of every image each time, of scale 0.5 to 1, mirrored half of the time.
    """

    Config = ClipAdapterConfig
    text: Tensor

    def __init__(self, config: ClipAdapterConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.settings = config
        width = problem.backbone.embed_dim
        hidden = max(1, width // config.reduction)
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.register_buffer("text", caption_features(problem, config.captions), persistent=False)

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled similarities of adapted features and captions."""
        v = self.image_features(batch)
        adapted = torch.relu(self.up(torch.relu(self.down(v))))
        mixed = self.settings.mix * adapted + (1 - self.settings.mix) * v
        if self.settings.normalise:
            mixed = F.normalize(mixed, dim=-1)
        return self.cosine_logits(mixed, self.text[None])


METHOD = ClipAdapter
