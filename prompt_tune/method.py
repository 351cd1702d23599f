"""What a tuning method is: logits for a batch, a loss, and the parameters it trains.

A method is one file under `prompt_tune/methods/` that offers `METHOD`, a subclass of `Method`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cache.recipe import RecipePart
from prompt_tune.backbone import Backbone
from prompt_tune.class_side import ClassSide


@dataclass(frozen=True)
class Batch:
    """Some cases: their labels, and pixels or image features or both.

    `features` are the frozen image tower's output before normalisation.
    """

    labels: Int[Tensor, "batch"]
    images: Float[Tensor, "batch 3 height width"] | None = None
    features: Float[Tensor, "batch embed"] | None = None

    @property
    def pixels(self) -> Float[Tensor, "batch 3 height width"]:
        """The images, for methods that need them.

        Raises:
            ValueError: the batch holds none.
        """
        if self.images is None:
            what = "the method needs images, and the batch holds none"
            raise ValueError(what)
        return self.images


@dataclass(frozen=True)
class KnowledgeRows:
    """The frozen knowledge of each class, in label order; classes may have unequal row counts."""

    values: tuple[Float[Tensor, "rows width"], ...]

    @property
    def width(self) -> int:
        """Width of the language model that made the rows."""
        return int(self.values[0].shape[1])

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows per class."""
        return tuple(int(v.shape[0]) for v in self.values)


@dataclass(frozen=True)
class ClassTexts:
    """Texts of each class, in label order, and what the backbone's text tower makes of them.

    Attributes:
        strings: the texts; empty where a control has replaced their embeddings.
        embeddings: per class, before normalisation.
    """

    strings: tuple[tuple[str, ...], ...]
    embeddings: tuple[Float[Tensor, "texts embed"], ...]

    @property
    def even(self) -> bool:
        """Whether every class has equally many."""
        return len({len(e) for e in self.embeddings}) == 1

    def means(self) -> Float[Tensor, "classes embed"]:
        """Per class, the normalised mean of the normalised embeddings."""
        return torch.stack(
            [F.normalize(F.normalize(e, dim=-1).mean(dim=0), dim=0) for e in self.embeddings]
        )


Need = Literal["rows", "texts", "symptoms", "attributes"]
"""What a method may read from a knowledge cache."""


@dataclass(frozen=True)
class Problem:
    """Everything a method may read when it is built.

    Attributes:
        backbone: the frozen vision-language model.
        class_names: what a text tower reads for each class, in label order.
        template: the caption of one class, with `{}` for its name.
        templates: the captions of a prompt ensemble.
        rows: knowledge rows, or None where the run uses none.
        texts: texts about each class, or None likewise.
        symptoms: per class, short phrases of what is seen, without the class name.
        attributes: per class, the values of each attribute, best first.
        train_labels: of the training images, in the order in which `fit` gets them.
        seed: seeds every initial value.
    """

    backbone: Backbone
    class_names: tuple[str, ...]
    template: str = "a photo of a {}."
    templates: tuple[str, ...] = ()
    rows: KnowledgeRows | None = None
    texts: ClassTexts | None = None
    symptoms: tuple[tuple[str, ...], ...] | None = None
    attributes: tuple[Mapping[str, tuple[str, ...]], ...] | None = None
    train_labels: Int[Tensor, "cases"] | None = None
    seed: int = 1


class MethodConfig(RecipePart):
    """Settings of a method; its file adds its own."""

    name: str


class Method(nn.Module):
    """Base of all methods.

    Attributes:
        Config: the settings, read from the recipe's `method` table.
        needs: what it reads from the knowledge cache. With `knowledge.control: none` it gets None
            for all of them and has to do without.
        fitted_by: `gradient` (the training loop), `solver` (its own `fit`) or `nothing`.
        reads_images: whether it needs pixels; otherwise cached image features are enough.
        reads_features: whether its loss reads the frozen tower's features beside pixels.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    needs: ClassVar[frozenset[Need]] = frozenset()
    fitted_by: ClassVar[Literal["gradient", "solver", "nothing"]] = "gradient"
    reads_images: bool = False
    reads_features: ClassVar[bool] = False

    def __init__(self, config: MethodConfig, problem: Problem) -> None:
        super().__init__()
        self.config = config
        self.backbone = problem.backbone
        self.class_names = problem.class_names
        self.class_side = ClassSide()

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """Evaluation mode without gradients, in which the class side is computed once.

        That is whatever a method marks with `of_classes`, or asks `class_side` for.
        """
        self.eval()
        with torch.no_grad(), self.class_side.kept():
            yield

    @classmethod
    def needed(cls, config: MethodConfig) -> frozenset[Need]:  # noqa: ARG003
        """`needs`; a method that needs less or more under some settings overrides this."""
        return cls.needs

    def image_features(self, batch: Batch) -> Float[Tensor, "batch embed"]:
        """L2-normalised image features, from the batch or from its pixels."""
        features = batch.features
        if features is None:
            if batch.images is None:
                what = "a batch holds neither features nor images"
                raise ValueError(what)
            features = self.backbone.image.encode(batch.images)
        return F.normalize(features, dim=-1)

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled similarities, or any scores a softmax turns into probabilities."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Mean cross-entropy of the logits unless a method says otherwise."""
        return F.cross_entropy(self.logits(batch), batch.labels)

    def backward(self, batch: Batch) -> Float[Tensor, ""]:
        """The loss of a step, its gradients added to the parameters.

        A method whose gradient is not that of one loss overrides this.
        """
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters the optimiser may move, by their name in a checkpoint."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def prompts(self) -> frozenset[str]:
        """The trainable names that are contexts or visual prompts (for `average: prompts`)."""
        return frozenset(self.trainable())

    def fit(self, train: Batch, val: Batch | None) -> Mapping[str, float]:
        """Solves for the parameters at once; only for methods fitted by a solver.

        Returns:
            What was chosen, and `steps` and `images_seen` of its own loop if it has one.
        """
        raise NotImplementedError

    def cosine_logits(
        self, image: Float[Tensor, "batch embed"], text: Float[Tensor, "#batch classes embed"]
    ) -> Float[Tensor, "batch classes"]:
        """`logit_scale * <image, text>` of normalised features."""
        text = F.normalize(text, dim=-1)
        if text.shape[0] == 1:
            scores = image @ text[0].T
        else:
            scores = torch.einsum("be,bce->bc", image, text)
        return self.backbone.logit_scale * scores
