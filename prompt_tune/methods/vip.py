"""ViP: class features merged from phrases of what is seen, without the class name."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from prompt_tune.class_side import of_classes
from prompt_tune.context import STD, start_context
from prompt_tune.method import Batch, Method, MethodConfig, Problem
from prompt_tune.seeds import derive_seed
from prompt_tune.towers import PromptLayout, Stage


class VipConfig(MethodConfig):
    """Settings of ViP."""

    name: str = "vip"
    n_context: Annotated[int, Field(ge=1)] = 4
    context: str | None = None
    """Words whose token embeddings start the context; null starts it at random, std 0.02."""
    class_specific: bool = False
    """A context of its own for every class; its phrases share it."""


class ViP(Method):
    """Visual symptom-guided prompt learning, as the published code computes it.

    Fang et al., "Aligning Medical Images with General Knowledge from Large Language Models", MICCAI
    2024, arXiv 2409.00341. Class c has M_c symptom phrases. With a learned context V before each,

        S_c = text encoder(start, V, phrase, ".", end)          [M_c, D], not normalised,
        a_c = softmax((g_c W_q)(S_c W_k)^T / sqrt(D)),          t_c = g_c + a_c S_c,
        logit[b, c] = exp(s) <v_b, t_c / |t_c|>,                loss = mean cross-entropy.

    Trained: V (normal, std 0.02), a query g_c per class (normal, std 0.02), W_q and W_k
    (Xavier normal, no bias). One pass of the text tower serves all phrases of all classes, and the
    number of phrases may differ between classes. The class name is never read; without symptoms
    (`knowledge.control: none`) it is the only phrase, and t_c = g_c + S_c.

    The language model and the query behind the published symptoms, and the paper's result tables,
    are unconfirmed.

    Differs: g, W_q and W_k have the joint embedding's width; the published code takes the text
    tower's, which is the same for the three CLIP towers it was written for and not for BiomedCLIP.
    Differs: fp32 throughout; published are fp16 weights and gradients without loss scaling.
    Differs: the order of the classes is that of the data's labels; the published code takes the
    order of the symptom file and checks nothing.
    Differs: queries, and contexts of single classes, are drawn by the class's name, so that they do
    not depend on its place.
    """

    Config = VipConfig
    needs = frozenset({"symptoms"})
    owner: Tensor
    places: Tensor
    absent: Tensor

    def __init__(self, config: VipConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.settings = config
        text, width = problem.backbone.text, problem.backbone.embed_dim
        names = problem.class_names
        phrases = problem.symptoms or tuple((name,) for name in names)
        counts = torch.tensor([len(own) for own in phrases])
        self.layout = PromptLayout.build(
            text, [p for own in phrases for p in own], n_context=config.n_context
        )
        columns = torch.arange(int(counts.max()))
        absent = columns >= counts[:, None]
        places = (counts.cumsum(0) - counts)[:, None] + columns
        owner = torch.arange(len(names)).repeat_interleave(counts)
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("places", places.masked_fill(absent, 0), persistent=False)
        self.register_buffer("absent", absent, persistent=False)

        def context() -> Tensor:
            return start_context(text, config.context, config.n_context)

        seeds = [derive_seed(problem.seed, "vip", name) for name in names]
        self.context = nn.Parameter(_each(seeds, context) if config.class_specific else context())
        self.query = nn.Parameter(_each(seeds, lambda: STD * torch.randn(width)))
        self.to_query = nn.Parameter(nn.init.xavier_normal_(torch.empty(width, width)))
        self.to_key = nn.Parameter(nn.init.xavier_normal_(torch.empty(width, width)))

    def prompts(self) -> frozenset[str]:
        """The context alone."""
        return frozenset({"context"})

    @of_classes
    def text_features(self) -> Float[Tensor, "1 classes embed"]:
        """The merged features t of every class, before normalisation."""
        context = self.context[self.owner] if self.settings.class_specific else self.context
        each = self.backbone.text.encode(self.layout, [Stage(context)])[0][self.places]
        queries, keys = self.query @ self.to_query, each @ self.to_key
        scores = torch.einsum("cd,cmd->cm", queries, keys) / keys.shape[-1] ** 0.5
        weights = scores.masked_fill(self.absent, -torch.inf).softmax(dim=1)
        return (self.query + torch.einsum("cm,cmd->cd", weights, each))[None]

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities."""
        return self.cosine_logits(self.image_features(batch), self.text_features())


def _each(seeds: Sequence[int], draw: Callable[[], Tensor]) -> Tensor:
    """One draw per seed; the state of the generator stays."""
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            drawn.append(draw())
    return torch.stack(drawn)


METHOD = ViP
