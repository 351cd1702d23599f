"""Attribute prompts: captions composed of the values a class's attributes take, zero-shot."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from cache.errors import MissingKnowledgeError, RecipeError
from prompt_tune.method import Batch, ClassTexts, Method, MethodConfig, Problem

CLASS = "class"
FORMS = {"colour": "{} color,", "shape": "{} shape", "location": "in {}"}
Positive = Annotated[int, Field(ge=1)]
Values = Mapping[str, tuple[str, ...]]


class ComposeConfig(MethodConfig):
    """How a prompt is composed."""

    order: tuple[str, ...] = ("colour", "shape", CLASS, "location")
    """Attributes of the cache, and where among them the class word stands."""
    forms: dict[str, str] = FORMS
    """What an attribute's value becomes; without a form it stands alone."""
    alias: dict[str, str] = Field(default_factory=dict)
    """By class name, the plain word that stands in its prompts."""

    @model_validator(mode="after")
    def _class_stands_once(self) -> Self:
        if self.order.count(CLASS) != 1 or len(set(self.order)) < len(self.order):
            what, wanted = "not an order of a prompt", f"attributes, each once, and {CLASS!r}"
            raise RecipeError(what, where="method.order", found=list(self.order), wanted=wanted)
        return self

    def compose(self, name: str, chosen: Mapping[str, str]) -> str:
        """The prompt of a class with one value for some attributes; the others are left out."""
        words = {a: self.forms.get(a, "{}").format(value) for a, value in chosen.items()}
        words[CLASS] = self.alias.get(name, name)
        return " ".join(words[part] for part in self.order if part in words)

    def values(self, problem: Problem) -> list[Values]:
        """Per class, the values of the attributes of `order` that it has, in that order.

        Raises:
            MissingKnowledgeError: no class has any of them.
            RecipeError: an alias of a class that is not there.
        """
        if unknown := sorted(set(self.alias) - set(problem.class_names)):
            what, wanted = "an alias names no class", ", ".join(problem.class_names)
            raise RecipeError(what, where="method.alias", found=unknown[0], wanted=wanted)
        if problem.attributes is None:
            return [{} for _ in problem.class_names]
        found: list[Values] = [
            {a: one[a] for a in self.order if one.get(a)} for one in problem.attributes
        ]
        if not any(found):
            what = "no class has an attribute that the prompts are made of"
            known = ", ".join(sorted({a for one in problem.attributes for a in one})) or "none"
            wanted = ", ".join(a for a in self.order if a != CLASS)
            raise MissingKnowledgeError(what, where="method.order", found=known, wanted=wanted)
        return found


class AttributePromptsConfig(ComposeConfig):
    """Settings of zero-shot attribute prompts."""

    name: str = "attribute-prompts"
    mode: Literal["zero-shot", "image-specific"] = "zero-shot"
    ranks: Positive = 3
    """The best so many values of every attribute count."""
    rank: Positive | None = None
    """With `zero-shot`: only the prompt of this rank, not all up to `ranks`."""
    template: bool = False
    """Whether prompts are put into the template of the data."""


class AttributePrompts(Method):
    """Prompts of expressive attributes, zero-shot (MIU-VL, ICLR 2023, for classification).

    Qin et al., "Medical Image Understanding with Pretrained Vision Language Models: A Comprehensive
    Study", arXiv 2209.15517; what is said of the published code was read there.

    The prompt of a class from one value per attribute is "COLOUR color, SHAPE shape CLASS in
    LOCATION", as in the published generator from a masked language model; `order` and `forms` say
    otherwise. Attributes a class lacks are left out. Nothing is trained.

    - `zero-shot`, per class: prompt j takes the j-th value of every attribute, an attribute with
      fewer values its last one, j = 1 ... k = min(ranks, the most values of any). With e_cj the
      normalised text feature of prompt j,

          t_c = unit(mean_j e_cj),  logit[b, c] = s <v_b, t_c>.

    - `image-specific`: the value x*_a(b, c) of attribute a is, among the first `ranks`, the one
      whose prompt by itself (the class word and this value alone) is most similar to v_b, and

          logit[b, c] = s <v_b, e(prompt of class c from x*(b, c))>.

    Without attributes (`knowledge.control: none`) the prompt is the class word.

    Differs: the paper detects with GLIP and scores a span of a caption of all classes; here every
    class has a caption of its own and is scored by its embedding.
    Differs: the paper picks one rank; the mean over ranks is ours, `rank` gives the published one.
    Differs: for image-specific prompts the paper asks a VQA model about every image. None is used
    here; the choice by similarity is ours.
    """

    Config = AttributePromptsConfig
    needs = frozenset({"attributes"})
    fitted_by = "nothing"
    text: Tensor
    unique: Tensor
    alone: Tensor
    absent: Tensor
    composed: Tensor

    def __init__(self, config: AttributePromptsConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.settings = config
        values = config.values(problem)
        if config.mode == "zero-shot":
            self._rank_prompts(problem, values)
        else:
            self._choice_tables(problem, values)

    def _encoded(self, problem: Problem, prompts: Sequence[str]) -> Float[Tensor, "n embed"]:
        template = problem.template if self.settings.template else "{}"
        return problem.backbone.text.encode_texts([template.format(p) for p in prompts])

    def _rank_prompts(self, problem: Problem, values: Sequence[Values]) -> None:
        config = self.settings
        prompts = []
        for name, own in zip(problem.class_names, values, strict=True):
            most = max(map(len, own.values()), default=1)
            ranks = range(min(config.ranks, most)) if config.rank is None else [config.rank - 1]
            picked = [{a: v[min(j, len(v) - 1)] for a, v in own.items()} for j in ranks]
            prompts.append(tuple(config.compose(name, one) for one in picked))
        flat = self._encoded(problem, [p for own in prompts for p in own])
        texts = ClassTexts(tuple(prompts), flat.split([len(own) for own in prompts]))
        self.register_buffer("text", texts.means(), persistent=False)

    def _choice_tables(self, problem: Problem, values: Sequence[Values]) -> None:
        """Embeddings of all prompts that may be chosen, and where each stands among them.

        `alone` [classes, attributes, ranks] and `composed` [classes, ranks ** attributes] point
        into `unique`; what is `absent` is never chosen.
        """
        config, ranks = self.settings, self.settings.ranks
        names = [a for a in config.order if any(a in own for own in values)]
        shape = (len(values), len(names), ranks)
        alone, absent = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)
        composed = torch.zeros((len(values), *[ranks] * len(names)), dtype=torch.long)
        index: dict[str, int] = {}
        for c, (name, own) in enumerate(zip(problem.class_names, values, strict=True)):
            kept = [own.get(a, ())[:ranks] for a in names]
            for k, found in enumerate(kept):
                absent[c, k, : max(1, len(found))] = False
                for j, value in enumerate(found):
                    prompt = config.compose(name, {names[k]: value})
                    alone[c, k, j] = index.setdefault(prompt, len(index))
            for place in itertools.product(*(range(max(1, len(found))) for found in kept)):
                pairs = zip(names, kept, place, strict=True)
                prompt = config.compose(name, {a: found[j] for a, found, j in pairs if found})
                composed[(c, *place)] = index.setdefault(prompt, len(index))
        unique = F.normalize(self._encoded(problem, list(index)), dim=-1)
        self.register_buffer("unique", unique, persistent=False)
        self.register_buffer("alone", alone, persistent=False)
        self.register_buffer("absent", absent, persistent=False)
        self.register_buffer("composed", composed.reshape(len(values), -1), persistent=False)

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        v = self.image_features(batch)
        if self.settings.mode == "zero-shot":
            return self.cosine_logits(v, self.text[None])
        scores = self.cosine_logits(v, self.unique[None])
        chosen = scores[:, self.alone].masked_fill(self.absent, -torch.inf).argmax(dim=3)
        place = torch.zeros(chosen.shape[:2], dtype=torch.long, device=v.device)
        for k in range(chosen.shape[2]):
            place = place * self.settings.ranks + chosen[:, :, k]
        return scores.gather(1, self.composed.gather(1, place.T).T)


METHOD = AttributePrompts
