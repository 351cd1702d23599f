"""CILMP: prompts made of a language model's hidden states, steered by the image."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cache.errors import ModelError, RecipeError
from prompt_tune.context import start_context
from prompt_tune.method import Batch, KnowledgeRows, Method, MethodConfig, Problem
from prompt_tune.prompt_stages import KeptRows, PromptStage, Rows, Sizes, prompt_stages
from prompt_tune.towers import PromptLayout

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class CilmpConfig(MethodConfig):
    """Settings of CILMP; the defaults are the published ones."""

    name: str = "cilmp"
    n_context: Positive = 4
    context: str | None = "a photo of a"
    """Words whose token embeddings start the context of stage 0; null starts it at random."""
    visual_prompts: Positive = 4
    text_depth: Positive | Literal["full"] = "full"
    """Blocks of the text tower that get prompts of their own; 1 is shallow."""
    visual_depth: Count | Literal["full"] = "full"
    """Likewise for the image tower; 0 is no visual prompts, and then image features are cached."""
    prefix: Count = 4
    suffix: Count = 4
    rank: Positive = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    condition: Literal["image", "none"] = "image"
    """`none`: the interventions act on the rows alone, `W` is [rank, width]."""
    precision: Literal["fp32", "published"] = "fp32"


class CILMP(Method):
    """Deep text prompts from frozen LLM rows, intervened on given the image; deep visual prompts.

    Conditional Intervention of LLMs for Prompt Tuning (Du, Yu and Wang, "Medical Knowledge
    Intervention Prompt Tuning for Medical Image Classification", IEEE TMI 2025), as its published
    code computes it; the equations of a row are in `prompt_tune.interventions`.

    The text sequence is start, context, the class's rows, its name, ".", end; only start, name, "."
    and end are the frozen model's. Stage k makes the context and the rows that stand at the input
    of block k, for k below `text_depth`; from there on they are carried through. With v the
    L2-normalised feature of the image under its visual prompts, not detached, and t_c the
    normalised text feature of class c, which depends on the image,

        logit[b, c] = exp(s) <v_b, t_c(v_b)>,   loss = mean cross-entropy.

    Choices where the published code, written for one CLIP, says nothing:

    - BERT text towers keep the order start, context, rows, name, ".", end. Stage 0 passes the
      embedding LayerNorm with position and type; rows of deeper stages enter the post-norm blocks
      as they are. A mean pooler reads the prompt positions too.
    - U1 takes the joint embedding width, whatever the text width.
    - Text and visual depth are independent, each at most the tower's.
    - A context text of fewer tokens than `n_context` starts the first ones, the others are normal
      with std 0.02; more tokens are refused.
    - Without rows (`knowledge.control: none`) context and visual prompts stay as they are.

    `precision: published` makes W, b, U1, b1, U2, b2 of the stages from 1 on and the context of
    stage 0 fp16 parameters, which the optimiser updates in fp16 without a master copy.

    Differs: of the published precision only that storage and those updates are repeated. The
    computation, of the frozen towers too, is in fp32, where the published one rounds activations,
    products and intervened rows to fp16; and rows are kept in fp32.
    Differs: class rows of unequal length are each their own; fewer than prefix + suffix are
    refused where the published code duplicates rows.
    """

    Config = CilmpConfig
    needs = frozenset({"rows"})

    def __init__(self, config: CilmpConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.settings = config
        text, image = problem.backbone.text, problem.backbone.image
        text_depth = _depth(config.text_depth, text.depth, "text")
        visual_depth = _depth(config.visual_depth, image.depth, "visual")
        self.reads_images = visual_depth > 0
        rows = problem.rows
        if rows is not None:
            _check(rows, problem.class_names, config)
        self.rows = None if rows is None else Rows(rows.values, config.prefix, config.suffix)

        sizes = Sizes(
            source=rows.width if rows is not None else 0,
            text=text.width,
            image=problem.backbone.embed_dim if config.condition == "image" else None,
            context=config.n_context,
            prefix=config.prefix,
            suffix=config.suffix,
            rank=config.rank,
        )
        half = torch.float16 if config.precision == "published" else torch.float32
        self.stage = nn.ModuleList(
            PromptStage(sizes, rows=rows is not None, precision=half if k else torch.float32)
            for k in range(text_depth)
        )
        first = self._stage(0)
        first.context = nn.Parameter(start_context(text, config.context, config.n_context).to(half))
        self.visual_prompt = nn.ParameterList(
            0.02 * torch.randn(config.visual_prompts, image.width) for _ in range(visual_depth)
        )
        grouped = (config.prefix, config.suffix) if rows is not None else (0, 0)
        self.layout = PromptLayout.build(
            text,
            problem.class_names,
            n_context=config.n_context,
            row_counts=rows.counts if rows is not None else None,
            intervened=grouped,
        )

    def _stage(self, k: int) -> PromptStage:
        stage = self.stage[k]
        assert isinstance(stage, PromptStage)  # noqa: S101 - ModuleList forgets its element type
        return stage

    def prompts(self) -> frozenset[str]:
        """Contexts and visual prompts; not interventions and projections."""
        return frozenset(
            n for n in self.trainable() if n.endswith(".context") or n.startswith("visual_prompt.")
        )

    def image_features(self, batch: Batch) -> Float[Tensor, "batch embed"]:
        """L2-normalised image features under the visual prompts, from pixels where there are any.

        Raises:
            ValueError: the batch lacks the images that visual prompts need.
        """
        if not self.reads_images:
            return super().image_features(batch)
        if batch.images is None:
            what = "visual prompts need images, and the batch holds none"
            raise ValueError(what)
        prompts = list(self.visual_prompt)
        return F.normalize(self.backbone.image.encode(batch.images, prompts), dim=-1)

    def text_features(
        self, v: Float[Tensor, "batch embed"], kept: Sequence[KeptRows] | None = None
    ) -> Float[Tensor, "#batch classes embed"]:
        """Text features of every class, before normalisation, for each image feature.

        Args:
            v: L2-normalised image features.
            kept: per stage, the dropout masks of the prefix and suffix rows, `[classes, rows,
                batch, width]`; without them dropout is drawn in training and absent in evaluation.
        """
        dropout = self.settings.dropout if self.training or kept is not None else 0.0
        every = [self._stage(k) for k in range(len(self.stage))]
        stages = prompt_stages(
            every, self.rows, v, dropout=dropout, kept=kept, class_side=self.class_side
        )
        return self.backbone.text.encode(self.layout, stages)

    def logits(
        self, batch: Batch, kept: Sequence[KeptRows] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities; every image has text features of its own."""
        v = self.image_features(batch)
        return self.cosine_logits(v, self.text_features(v, kept))


def _depth(asked: int | Literal["full"], blocks: int, tower: str) -> int:
    if asked == "full":
        return blocks
    if asked > blocks:
        raise ModelError(
            f"the {tower} prompts are deeper than the {tower} tower",
            where=f"method.{tower}_depth",
            found=asked,
            wanted=f"at most {blocks}",
            do=f"Lower it, or set {tower}_depth: full.",
        )
    return asked


def _check(rows: KnowledgeRows, names: Sequence[str], config: CilmpConfig) -> None:
    if len(rows.values) != len(names):
        what = "the knowledge rows are not those of the classes"
        raise RecipeError(what, found=f"{len(rows.values)} classes", wanted=len(names))
    for name, values in zip(names, rows.values, strict=True):
        if values.ndim != 2 or values.shape[1] != rows.width:
            raise RecipeError(
                "knowledge rows differ in width",
                where=f"class {name!r}",
                found=list(values.shape),
                wanted=f"rows of width {rows.width}",
                do="Take all classes from one cache block.",
            )
        if len(values) < config.prefix + config.suffix:
            raise RecipeError(
                "too few knowledge rows",
                where=f"class {name!r}",
                found=len(values),
                wanted=f"at least prefix + suffix = {config.prefix + config.suffix}",
                do="Lower method.prefix and method.suffix, or keep more rows.",
            )
    if config.rank > rows.width:
        raise RecipeError(
            "the rank exceeds the width of the knowledge rows",
            where="method.rank",
            found=config.rank,
            wanted=f"at most {rows.width}",
        )


METHOD = CILMP
