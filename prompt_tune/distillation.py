"""What context learners that stay close to a frozen teacher share."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cache.errors import RecipeError
from prompt_tune.method import MethodConfig, Problem

Dataset = Literal[
    "btmri",
    "busi",
    "chmnist",
    "covid-19",
    "ctkidney",
    "dermamnist",
    "kneexray",
    "kvasir",
    "lungcolon",
    "octmnist",
    "retina",
]
Protocol = Literal["few-shot", "base-to-novel"]
T = TypeVar("T")


class Tuned(MethodConfig):
    """Settings of a method whose authors chose some of them for each data set."""

    tuned_for: Dataset | None = None
    """Take the values published for this data set, which were tuned on it; no rule that chose
    them is on record. Values given in the recipe win."""
    protocol: Protocol = "few-shot"
    """Of which table; without effect where `tuned_for` is null."""


def published(config: Tuned, table: Mapping[Protocol, Mapping[Dataset, T]], otherwise: T) -> T:
    """The table's entry for the data set that the recipe names; `otherwise` where it names none.

    Raises:
        RecipeError: the data set was not run under this protocol.
    """
    if config.tuned_for is None:
        return otherwise
    known = table[config.protocol]
    if config.tuned_for not in known:
        raise RecipeError(
            f"no {config.protocol} values are published for {config.tuned_for!r}",
            where="method.tuned_for",
            wanted=f"one of {', '.join(known)}",
            do="Set it to null, and give the values yourself.",
        )
    return known[config.tuned_for]


def template_features(problem: Problem, templates: Sequence[str]) -> Float[Tensor, "classes embed"]:
    """Per class, the normalised mean of the normalised features of its captions."""
    made = [
        problem.backbone.text.encode_texts([t.format(name) for name in problem.class_names])
        for t in templates
    ]
    features = F.normalize(torch.stack(made), dim=-1)
    return F.normalize(features.mean(dim=0), dim=-1)


def divergence(
    teacher: Float[Tensor, "batch classes"], student: Float[Tensor, "batch classes"]
) -> Float[Tensor, ""]:
    """`1/(B C) sum_b KL(softmax(teacher_b) || softmax(student_b))` of logits."""
    p, q = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    return (p.exp() * (p - q)).mean()
