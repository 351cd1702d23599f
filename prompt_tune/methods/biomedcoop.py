"""BiomedCoOp: CoOp taught by texts that a language model wrote about each class."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from cache.errors import RecipeError
from prompt_tune.distillation import Dataset, Protocol, Tuned, divergence, published
from prompt_tune.method import Batch, ClassTexts, Problem
from prompt_tune.methods.coop import CoOp, CoopConfig

Triple = tuple[float, float, float]
WEIGHTS: dict[Protocol, dict[Dataset, Triple]] = {
    "few-shot": {
        "btmri": (0.5, 0.25, 1.5),
        "busi": (0.75, 0.75, 1.5),
        "chmnist": (0.25, 0.25, 1.5),
        "covid-19": (0.5, 2.0, 1.5),
        "ctkidney": (1.0, 0.5, 1.5),
        "dermamnist": (5.0, 20.0, 1.5),
        "kneexray": (5.0, 20.0, 1.75),
        "kvasir": (0.75, 0.75, 1.5),
        "lungcolon": (0.5, 0.5, 1.5),
        "octmnist": (1.0, 0.75, 1.5),
        "retina": (0.25, 0.25, 1.5),
    },
    "base-to-novel": {
        "btmri": (0.5, 0.5, 1.25),
        "chmnist": (10.0, 1.0, 1.5),
        "covid-19": (20.0, 1.0, 1.25),
        "ctkidney": (10.0, 0.25, 1.25),
        "dermamnist": (2.0, 0.5, 1.5),
        "kneexray": (0.25, 3.0, 1.25),
        "kvasir": (1.0, 1.0, 1.25),
        "lungcolon": (0.25, 0.75, 1.25),
        "octmnist": (0.75, 0.5, 1.5),
        "retina": (5.0, 1.0, 2.0),
    },
}
"""(sccm, kdsp, cut) of the published configurations."""
Weight = Annotated[float, Field(ge=0)]


class BiomedCoopConfig(CoopConfig, Tuned):
    """Settings of BiomedCoOp; null is the published value of `tuned_for`, or 1, 1 and 1.5."""

    name: str = "biomedcoop"
    sccm: Weight | None = None
    """lambda 1, of the distance to the mean text."""
    kdsp: Weight | None = None
    """lambda 2, of the divergence from the selected texts."""
    cut: Annotated[float, Field(ge=1)] | None = None
    """tau: texts whose score is more standard deviations from the mean are left out of a step.
    At least 1, below which it may leave out all."""


class BiomedCoOp(CoOp):
    """Prompt learning for biomedical images from texts (Koleilat et al., CVPR 2025).

    CoOp's prompts. With P texts per class, e_cp their normalised features, t_c the prompt's, v_b
    the image's and `unit` normalisation,

        SCCM  = mean_cd (t_c - unit(mean_p e_cp))_d^2
        S_p   = mean_b max_c <v_b, e_cp>,   z_p = (S_p - mean S) / std S
        E_c   = unit(mean of those e_cp with |z_p| <= tau)
        KDSP  = 1/(B C) sum_b KL(softmax(exp(s) <v_b, E>) || softmax(logits_b))
        loss  = mean cross-entropy + lambda_1 SCCM + lambda_2 KDSP

    with the sample standard deviation. The selection is one of text indices for all classes
    together, so every class needs equally many texts; others are refused. Without texts
    (`knowledge.control: none`) the loss is the cross-entropy: CoOp. The paper tuned lambda_1,
    lambda_2 and tau per data set and protocol (`tuned_for`); it has no values for others, and 1, 1
    and 1.5 are this file's.

    Differs: the published code scales S by exp(s), then takes (S - median) / MAD, and standardises
    that; standardising undoes shifts and scales, so both are left out, and a MAD of 0 divides
    nothing.
    Differs: the teacher's image features come from the one frozen image tower; the published code
    runs a second copy, whose features are the same.
    Differs: the frozen text tower stays in eval mode; the published code trains with BERT's
    dropout.
    Differs: the preset trains on the test transform (`train.views: 1`); the published code draws a
    new random crop of every image each time, never mirrored (`views: live`, `flip: false`).
    """

    Config = BiomedCoopConfig
    needs = frozenset({"texts"})
    teacher: Tensor | None

    def __init__(self, config: BiomedCoopConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        given = config.sccm, config.kdsp, config.cut
        known = published(config, WEIGHTS, (1.0, 1.0, 1.5))
        values = (k if g is None else g for g, k in zip(given, known, strict=True))
        self.sccm, self.kdsp, self.cut = values
        teacher = None if problem.texts is None else _aligned(problem.texts)
        self.register_buffer("teacher", teacher, persistent=False)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Cross-entropy and both distances to the texts."""
        image, text = self.image_features(batch), F.normalize(self.text_features(), dim=-1)
        logits = self.cosine_logits(image, text)
        loss = F.cross_entropy(logits, batch.labels)
        if self.teacher is None:
            return loss
        mean = F.normalize(self.teacher.mean(dim=1), dim=-1)
        chosen = self.teacher[:, self.selected(image)].mean(dim=1)
        taught = self.cosine_logits(image, chosen[None])
        consistency = (text[0] - mean).square().mean()
        return loss + self.sccm * consistency + self.kdsp * divergence(taught, logits)

    def selected(self, image: Float[Tensor, "batch embed"]) -> Bool[Tensor, "texts"]:
        """Which texts teach these images."""
        assert self.teacher is not None  # noqa: S101 - only asked where there are texts
        scores = torch.einsum("be,cpe->bcp", image, self.teacher).amax(dim=1).mean(dim=0)
        if len(scores) == 1:
            return torch.ones_like(scores, dtype=torch.bool)
        return (scores - scores.mean()).abs() <= self.cut * scores.std()


def _aligned(texts: ClassTexts) -> Float[Tensor, "classes texts embed"]:
    if not texts.even:
        raise RecipeError(
            "biomedcoop selects texts by their index in all classes at once",
            where="knowledge.texts",
            found=f"{sorted({len(e) for e in texts.embeddings})} texts per class",
            wanted="equally many",
            do="Use another block of texts.",
        )
    return F.normalize(torch.stack(texts.embeddings), dim=-1)


METHOD = BiomedCoOp
