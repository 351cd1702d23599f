"""Attribute prompts as the start of a learned context of every class."""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.class_side import of_classes
from prompt_tune.method import Batch, Method, Problem
from prompt_tune.methods.attribute_prompts import ComposeConfig
from prompt_tune.towers import PromptLayout, Stage


class AttributeContextConfig(ComposeConfig):
    """Settings of attribute contexts."""

    name: str = "attribute-context"
    rank: Annotated[int, Field(ge=1)] = 1
    """Which value of every attribute; one with fewer gives its last."""
    fallback: str = "a photo of a"
    """Words in place of the attributes, for a class that has none."""


class AttributeContext(Method):
    """Class-specific contexts (Zhou et al. 2022) that start as attribute prompts (MIU-VL).

    The prompt of class c is `start, V_c, class word, ".", end`, where V_c starts as the token
    embeddings of "COLOUR color, SHAPE shape in LOCATION" of one rank (see `attribute_prompts`) and
    is trained; `logit[b, c] = exp(s) <v_b, t_c>`. Contexts are as long as their words, whatever the
    other classes' are. Without attributes (`knowledge.control: none`) it is CoOp with
    class-specific contexts from `fallback`.

    Differs: MIU-VL trains the detector under composed prompts, not the prompts; this use of them is
    ours. The context stands before the class word, so location does too.
    """

    Config = AttributeContextConfig
    needs = frozenset({"attributes"})
    given: Tensor

    def __init__(self, config: AttributeContextConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        text = problem.backbone.text
        starts = []
        for own in config.values(problem):
            chosen = {a: v[min(config.rank, len(v)) - 1] for a, v in own.items()}
            words = [config.forms.get(a, "{}").format(value) for a, value in chosen.items()]
            starts.append(text.embed(text.tokenize([" ".join(words) or config.fallback])[0][1:-1]))
        counts = [len(start) for start in starts]
        self.register_buffer(
            "given", torch.arange(max(counts)) < torch.tensor(counts)[:, None], persistent=False
        )
        padded = nn.utils.rnn.pad_sequence(starts, batch_first=True)
        self.context = nn.Parameter(padded.float().cpu())
        self.layout = PromptLayout.build(
            text,
            [config.alias.get(name, name) for name in problem.class_names],
            n_context=0,
            row_counts=counts,
        )

    @of_classes
    def text_features(self) -> Float[Tensor, "1 classes embed"]:
        """Text features of every class, before normalisation."""
        stage = Stage(None, middle=self.context[self.given])
        return self.backbone.text.encode(self.layout, [stage])

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        return self.cosine_logits(self.image_features(batch), self.text_features())


METHOD = AttributeContext
