"""What the frozen text tower makes of each class's caption."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cache.errors import RecipeError
from prompt_tune.method import Problem

Captions = Literal["template", "templates"]


@torch.no_grad()
def caption_features(problem: Problem, captions: Captions) -> Float[Tensor, "classes embed"]:
    """Per class, the normalised feature of its caption, or of an ensemble of captions.

    `templates` is the normalised mean of the normalised features of all templates (Radford et al.
    2021, 3.1.4).

    Raises:
        RecipeError: an ensemble is asked for and the data lists no templates.
    """
    templates = problem.templates if captions == "templates" else (problem.template,)
    if not templates:
        what = "an ensemble needs templates"
        raise RecipeError(what, where="method", do="List `templates` in the data.")
    features = [
        problem.backbone.text.encode_texts([t.format(name) for name in problem.class_names])
        for t in templates
    ]
    mean = torch.stack([F.normalize(one, dim=-1) for one in features]).mean(dim=0)
    return F.normalize(mean, dim=-1)
