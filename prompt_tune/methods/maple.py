"""MaPLe: deep contexts in the text tower, and visual prompts that are linear maps of them."""

import copy
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.class_side import of_classes
from prompt_tune.context import STD, start_context
from prompt_tune.method import Batch, Method, MethodConfig, Problem
from prompt_tune.towers import PromptLayout, Stage

Positive = Annotated[int, Field(ge=1)]


class MapleConfig(MethodConfig):
    """Settings of MaPLe; the defaults are the published ones."""

    name: str = "maple"
    n_context: Positive = 2
    """Tokens per block, in the text tower and in the image tower."""
    context: str | None = "a photo"
    """Words whose token embeddings start the context of block 0; null starts it at random."""
    depth: Positive = 9
    """Blocks of each tower that get prompts of their own; 1 is shallow."""


class MaPLe(Method):
    """Multi-modal prompt learning (Khattak et al., "MaPLe", CVPR 2023), as its published code does.

    Block k of the text tower reads `[start, P_k, name of c, ".", end]` and block k of the image
    tower `[class token, patches, F_k(P_k)]`, for k below `depth`, and what stands at the prompt
    positions is carried on from there. P_k is [n_context, text width] and the coupling
    `F_k(P) = P A_k^T + a_k` goes from text width to image width; P, A and a are trained. With v_b
    and t_c the normalised features of both towers,

        logit[b, c] = exp(s) <v_b, t_c>,   loss = mean cross-entropy.

    P_0 starts from words, the others normal with std 0.02; the couplings from block 1 on start
    alike, as in the published code. At ViT-B/16, depth 9 and 4 tokens these are
    9 (4 x 512) + 9 (512 x 768 + 768) = 3,564,288 numbers; at 2 tokens 3,555,072.

    Differs: the depth is at most that of either tower, and a greater one is cut to it: the towers
    are coupled block by block.
    Differs: of "a photo of a" the published code enters the first `n_context` tokens, which are
    "a photo" for 2; here the words are written as they enter, and more tokens are refused.
    Differs: couplings and their products are in fp32, not in fp16. In a BERT text tower the deeper
    contexts enter the post-norm blocks as they are.
    """

    Config = MapleConfig
    reads_images = True

    def __init__(self, config: MapleConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        text, image = problem.backbone.text, problem.backbone.image
        depth, size = min(config.depth, text.depth, image.depth), config.n_context
        first = start_context(text, config.context, size)
        deeper = (STD * torch.randn(size, text.width) for _ in range(depth - 1))
        self.context = nn.ParameterList([first, *deeper])
        own, shared = (nn.Linear(text.width, image.width) for _ in range(2))
        self.coupling = nn.ModuleList([own, *(copy.deepcopy(shared) for _ in range(depth - 1))])
        self.layout = PromptLayout.build(text, problem.class_names, n_context=size)

    def prompts(self) -> frozenset[str]:
        """The contexts; not the couplings."""
        return frozenset(n for n in self.trainable() if n.startswith("context."))

    def image_features(self, batch: Batch) -> Float[Tensor, "batch embed"]:
        """L2-normalised image features under the coupled prompts."""
        prompts = [f(p) for f, p in zip(self.coupling, self.context, strict=True)]
        return F.normalize(self.backbone.image.encode(batch.pixels, prompts), dim=-1)

    @of_classes
    def text_features(self) -> Float[Tensor, "1 classes embed"]:
        """Text features of every class, before normalisation."""
        return self.backbone.text.encode(self.layout, [Stage(p) for p in self.context])

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        return self.cosine_logits(self.image_features(batch), self.text_features())


METHOD = MaPLe
