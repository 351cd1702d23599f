"""Biomed-DPT's journal variant, as far as it is public: templates and ranked texts as teacher."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from prompt_tune.distillation import template_features
from prompt_tune.method import Problem
from prompt_tune.methods.biomed_dpt import BiomedDPT, BiomedDptConfig


class BiomedDptEnsembleConfig(BiomedDptConfig):
    """Settings of the journal variant."""

    name: str = "biomed-dpt-ensemble"
    keep: Annotated[int, Field(ge=1)] = 10
    """How many texts of each class teach it, the best ranked; unconfirmed."""


class BiomedDptEnsemble(BiomedDPT):
    """Biomed-DPT with an ensemble of templates and selected texts (IEEE JBHI 2026, abstract only).

    The abstract (DOI 10.1109/JBHI.2026.3686818) names a template-driven ensemble of clinical
    prompts, expert prompts that are ranked and whose best combination is searched with a neural
    network, a semantic regularisation and the zero-vector visual prompt. Built here:

        m_c   = unit(mean of the unit features of class c's captions, one for each template)
        r_cp  = <e_cp, m_c> - max_{c' != c} <e_cp, m_c'>
        E_c   = unit(mean of those captions' features and of the `keep` e_cp with the largest r_cp)

    with e_cp the unit feature of text p of class c; E_c is the teacher of `biomed-dpt`, whose
    other parts are unchanged, the L1 distance being the semantic regularisation. The rank reads
    texts alone: no image, of whatever split.

    Unconfirmed: the ranking criterion, the number kept, the equal weight of captions and texts,
    the form of the regularisation, whether the divergence is still there, and all weights. The
    table of `tuned_for` is that of the first version.
    Differs: there is no search network; its architecture, inputs and objective are not public.
    Differs: the preset trains on the test transform, as that of `biomed-dpt` does.
    Without texts (`knowledge.control: none`) the captions teach alone.
    """

    Config = BiomedDptEnsembleConfig

    def taught_by(self, problem: Problem) -> Float[Tensor, "classes embed"]:
        """The normalised teacher of every class."""
        assert isinstance(self.settings, BiomedDptEnsembleConfig)  # noqa: S101 - its own Config
        templates = problem.templates or (self.clinical_template(problem),)
        each = torch.stack([template_features(problem, [t]) for t in templates], dim=1)
        texts = () if problem.texts is None else problem.texts.embeddings
        units = [F.normalize(e.to(each.device), dim=-1) for e in texts]
        anchors = F.normalize(each.mean(dim=1), dim=-1)
        taught = list(each)
        for c, own in enumerate(units):
            order = ranks(own, anchors, c).argsort(descending=True, stable=True)
            taught[c] = torch.cat([each[c], own[order[: self.settings.keep]]])
        return torch.stack([F.normalize(one.mean(dim=0), dim=0) for one in taught])


def ranks(
    texts: Float[Tensor, "texts embed"], anchors: Float[Tensor, "classes embed"], own: int
) -> Float[Tensor, "texts"]:
    """How much closer each text is to its own class's captions than to the nearest other's."""
    close = texts @ anchors.T
    others = close.clone()
    others[:, own] = -torch.inf
    return close[:, own] - others.amax(dim=1)


METHOD = BiomedDptEnsemble
