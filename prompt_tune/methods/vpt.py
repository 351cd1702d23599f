"""VPT visual: learned prompts in the image tower against frozen text vectors."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.method import Batch, Method, MethodConfig, Problem
from prompt_tune.towers import ImageTower

Positive = Annotated[int, Field(ge=1)]


class VptConfig(MethodConfig):
    """Settings of VPT visual."""

    name: str = "vpt"
    visual_prompts: Positive = 8
    visual_depth: Positive | Literal["full"] = "full"
    """Blocks that get prompts of their own: 1 is VPT-shallow, `full` is VPT-deep."""


class VPT(Method):
    """Visual prompt tuning (Jia et al., "Visual Prompt Tuning", ECCV 2022, section 3.2).

    Not the variational prompt tuning of text contexts that shares the abbreviation.

    With x the class token and E the patches, block k reads `[x_k, P_k, E_k]`, P_k trained. Shallow:
    only P_0 is, and the blocks carry it on. Deep: P_k overwrites what block k-1 made of P_{k-1}.
    All P start uniform in +-sqrt(6 / (3 p^2 + w)), for patches of p x p pixels and a tower of width
    w. With v_b the normalised image feature and t_c the frozen normalised text feature of class c
    in the template,

        logit[b, c] = exp(s) <v_b, t_c>,   loss = mean cross-entropy.

    The defaults, 8 prompts in every block, are those of the CLIP variant in the published code of
    MaPLe (Khattak et al., CVPR 2023). Jia et al. choose 1 to 200 prompts for each data set.

    Differs: frozen text vectors stand where Jia et al. train a linear head, as in that variant.
    Differs: prompts stand after the patches, not between class token and patches. Attention sums
    over keys in any order, and prompts carry no position, so the numbers are the same.
    Differs: a norm in front of block 0 (CLIP has one) is passed by P_0 too, as in that variant;
    the towers of Jia et al. have none. A tower that averages its tokens averages its patches only.
    Differs: no dropout on prompts (0 by default in the published code, which sets it for some
    data). The CLIP variant starts prompts normal with std 0.02.
    """

    Config = VptConfig
    reads_images = True
    text: Tensor

    def __init__(self, config: VptConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        tower = problem.backbone.image
        depth = tower.depth if config.visual_depth == "full" else config.visual_depth
        bound = (6 / (_patch_numbers(tower) + tower.width)) ** 0.5
        self.visual_prompt = nn.ParameterList(
            bound * (2 * torch.rand(config.visual_prompts, tower.width) - 1) for _ in range(depth)
        )
        captions = [problem.template.format(name) for name in problem.class_names]
        text = F.normalize(problem.backbone.text.encode_texts(captions), dim=-1)
        self.register_buffer("text", text, persistent=False)

    def image_features(self, batch: Batch) -> Float[Tensor, "batch embed"]:
        """L2-normalised image features under the prompts."""
        prompts = list(self.visual_prompt)
        return F.normalize(self.backbone.image.encode(batch.pixels, prompts), dim=-1)

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        return self.cosine_logits(self.image_features(batch), self.text[None])


def _patch_numbers(tower: ImageTower) -> int:
    """How many numbers a patch has: 3 p^2."""
    first = next(m for m in tower.module.modules() if isinstance(m, nn.Conv2d))
    return first.weight[0].numel()


METHOD = VPT
