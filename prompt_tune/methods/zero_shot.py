"""Zero-shot classification with one caption, an ensemble of templates, or the texts of a cache."""

from typing import Literal, Self

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from cache.errors import RecipeError
from prompt_tune.captions import caption_features
from prompt_tune.method import Batch, Method, MethodConfig, Need, Problem


class ZeroShotConfig(MethodConfig):
    """Settings of zero-shot classification."""

    name: str = "zero-shot"
    source: Literal["template", "templates", "texts"] = "template"
    """One caption, all templates of the data, or the texts of each class in a knowledge cache."""
    ensemble: bool = False
    """Another name of `source: templates`."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.ensemble and self.source == "texts":
            what = "method.ensemble and method.source: texts exclude each other"
            raise RecipeError(what, do="Remove method.ensemble.")
        return self


class ZeroShot(Method):
    """Class captions against image features; nothing is trained.

    `logit[b, c] = s <v_b, t_c>`, with `t_c` the normalised text feature of the caption, or the
    normalised mean of the normalised features of all templates (Radford et al. 2021, 3.1.4) or of
    all texts of the class, as many as it has. With `knowledge.control: none` texts become the
    caption.
    """

    Config = ZeroShotConfig
    fitted_by = "nothing"
    text: Tensor

    def __init__(self, config: ZeroShotConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        captions: Literal["template", "templates"] = "template"
        if config.ensemble or config.source == "templates":
            captions = "templates"
        if config.source == "texts" and problem.texts is not None:
            text = problem.texts.means().to(problem.backbone.device)
        else:
            text = caption_features(problem, captions)
        self.register_buffer("text", text, persistent=False)

    @classmethod
    def needed(cls, config: MethodConfig) -> frozenset[Need]:
        """Texts, if they are the source."""
        texts = isinstance(config, ZeroShotConfig) and config.source == "texts"
        return frozenset({"texts"}) if texts else frozenset()

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        return self.cosine_logits(self.image_features(batch), self.text[None])


METHOD = ZeroShot
