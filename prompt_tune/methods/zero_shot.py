"""Zero-shot classification with one template or an ensemble of templates."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cache.errors import RecipeError
from prompt_tune.method import Batch, Method, MethodConfig, Problem


class ZeroShotConfig(MethodConfig):
    """Settings of zero-shot classification."""

    name: str = "zero-shot"
    ensemble: bool = False  # average the normalised text features of all templates


class ZeroShot(Method):
    """Class captions against image features; nothing is trained.

    `logit[b, c] = s <v_b, t_c>`, with `t_c` the normalised text feature of the caption, or the
    normalised mean of the normalised features of all templates (Radford et al. 2021, 3.1.4).
    """

    Config = ZeroShotConfig
    fitted_by = "nothing"
    text: Tensor

    def __init__(self, config: ZeroShotConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        templates = problem.templates if config.ensemble else (problem.template,)
        if not templates:
            what = "an ensemble needs templates"
            raise RecipeError(what, where="method.ensemble", do="List `templates` in the data.")
        with torch.no_grad():
            texts = torch.stack(
                [
                    F.normalize(
                        problem.backbone.text.encode_texts(
                            [template.format(name) for name in problem.class_names]
                        ),
                        dim=-1,
                    )
                    for template in templates
                ]
            )
        self.register_buffer("text", texts.mean(dim=0), persistent=False)

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        return self.cosine_logits(self.image_features(batch), self.text[None])


METHOD = ZeroShot
