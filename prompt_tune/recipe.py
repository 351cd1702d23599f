"""The recipe of a tuning run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from cache.errors import RecipeError
from cache.recipe import RecipePart, load_recipe, validate
from cache.registry import suggest
from prompt_tune.backbone import BackboneSpec
from prompt_tune.method import Method, MethodConfig, Need
from prompt_tune.methods import METHODS

PRESETS = Path(__file__).parent / "presets"

Control = Literal["cached", "shuffled", "random", "none"]
Positive = Annotated[int, Field(ge=1)]


class KnowledgeSpec(RecipePart):
    """Which cached states become the knowledge rows, and whether they are replaced by a control."""

    rows: Literal["layers", "texts", "attributes", "tokens"] = "layers"
    block: str | None = None
    """Name of the cache block; by default the usual one for `rows`."""
    layer: int = -1
    """Decoder layer for texts, attributes and tokens; negative counts from the last stored one."""
    item: Annotated[int, Field(ge=0)] = 0
    """Which text of the class, for `tokens`."""
    keep: Positive | None = None
    """At most so many rows per class: evenly spaced layers, or the first texts or tokens. Of a
    method that reads texts or symptoms themselves, the first so many of each class."""
    texts: str = "descriptions"
    """Name of the block of texts about the classes."""
    symptoms: str = "symptoms"
    """Name of the block of texts that are symptom phrases."""
    attributes: str = "attributes"
    """Name of the block of attributes."""
    control: Control = "cached"
    """`shuffled`: a seeded derangement of the classes; `random`: Gaussian with each row's mean and
    variance, likewise for the embeddings of texts, and phrases and attribute values of words drawn
    from those of all classes; `none`: nothing at all."""
    scale: Literal["raw", "unit"] = "raw"
    """`raw`: as the language model left them, as published. `unit`: each row divided by its root
    mean square. A pre-norm tower (CLIP) normalises rows itself; the blocks of a post-norm tower
    (BERT) take deeper rows as given, and raw states of hundreds drown every other token there."""
    expect: str | None = None
    """Refuse a cache with another content id."""


class SampleSpec(RecipePart):
    """Which images of the training and validation splits a run may see."""

    shots: Positive | None = None
    """Images per class; null is the whole split."""
    val_shots: Annotated[int, Field(ge=0)] | None = None
    """Validation images per class; null is min(shots, 4), or the whole split with full data."""
    seed: int = 1


class TrainSpec(RecipePart):
    """Optimiser, schedule, averaging and selection."""

    epochs: Positive = 50
    batch_size: Positive = 32
    lr: Annotated[float, Field(gt=0)] = 0.002
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`adamw` has torch's betas; `momentum` is SGD's."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    warmup_lr: Annotated[float, Field(gt=0)] = 1e-5
    average: Literal["published", "prompts", "trainables", "none"] = "none"
    """Gaussian-weighted averaging over epochs: `prompts` (contexts and visual prompts, fp32),
    `trainables` (all, fp32), `published` (contexts and visual prompts, each in its own precision,
    and the frozen weights that the published code holds in fp16, in fp16; see `published`)."""
    average_mean: float | None = None
    """Epoch at which the weight peaks; null is the last epoch."""
    average_std: Annotated[float, Field(gt=0)] | None = None
    """In epochs; null is 0.3 of the run, which is 30 for the published 100."""
    views: Positive | Literal["live"] = 1
    """Augmented views per image: K enumerated ones (view 0 is the test transform) drawn per epoch,
    or `live` for a new one every time."""
    flip: bool = True
    """Mirror augmented views half of the time. A mirrored image has its left and right exchanged:
    set it to false where classes tell the sides apart, as OrganAMNIST's kidneys, lungs and femurs
    do. Without effect where `views` is 1."""
    select: Literal["last", "best-val"] = "last"
    """Which epoch is kept; `best-val` by accuracy on the validation images, earliest on a tie."""
    checkpoint_steps: Positive | None = None
    """Also save every so many steps inside an epoch; every epoch is always saved."""
    max_steps: Positive | None = None
    """Stop early after so many steps: a smoke run, not a result."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the frozen towers' matrix products, in training and evaluation: `bf16` is autocast. All
    else, parameters and logits among it, stays fp32."""
    max_gb: Annotated[float, Field(gt=0)] | None = None
    """What a step may keep for its backward; null is most of what is free when the run starts.
    Beyond it classes are taken in chunks, then image blocks computed again."""
    compile: bool = False
    """Compile the part of every block behind the attention."""

    @model_validator(mode="after")
    def _one_selection(self) -> "TrainSpec":
        if self.select == "best-val" and self.average != "none":
            what = "train.select best-val and train.average exclude each other"
            raise RecipeError(what, found=f"average {self.average}", do="Set one of them.")
        return self


class TuneRecipe(RecipePart):
    """A whole tuning run but for the cache, the data and the output folder."""

    backbone: BackboneSpec
    method: dict[str, Any]
    knowledge: KnowledgeSpec = KnowledgeSpec()
    classes: tuple[str, ...] | None = None
    """Ids of the classes the run has, in training, validation, evaluation and knowledge; null is
    all. Their order is that of the data's labels."""
    samples: SampleSpec = SampleSpec()
    train: TrainSpec = TrainSpec()
    seed: int = 1

    @model_validator(mode="after")
    def _classes_are_several(self) -> "TuneRecipe":
        if self.classes is not None and len(set(self.classes)) < max(2, len(self.classes)):
            what, wanted = "not a choice of classes", "two or more ids, each once, or null"
            raise RecipeError(what, where="classes", found=list(self.classes), wanted=wanted)
        return self

    @model_validator(mode="after")
    def _method_is_known(self, info: ValidationInfo) -> "TuneRecipe":
        self.method_config(**(info.context or {"where": "recipe"}))
        return self

    @model_validator(mode="after")
    def _something_selects(self) -> "TuneRecipe":
        trained = self.method_class().fitted_by == "gradient"
        if trained and self.train.select == "best-val" and self.samples.val_shots == 0:
            what, wanted = "train.select best-val needs validation images", ">= 1 or null"
            do = "Give some, or set train.select to last."
            raise RecipeError(what, where="samples.val_shots", found=0, wanted=wanted, do=do)
        return self

    def method_class(self) -> type[Method]:
        """The method the recipe names.

        Raises:
            UnknownNameError: no such method; the nearest is named.
        """
        entry = METHODS[str(self.method.get("name"))]
        if not (isinstance(entry, type) and issubclass(entry, Method)):
            what = "METHOD is not a tuning method"
            raise RecipeError(what, where=f"prompt_tune.methods.{self.method.get('name')}")
        return entry

    def reads(self) -> frozenset[Need]:
        """What the method reads of a knowledge cache under its settings."""
        return self.method_class().needed(self.method_config(where="recipe"))

    def method_config(self, *, where: object, overrides: Sequence[str] = ()) -> MethodConfig:
        """The `method` table as the method's own settings.

        Raises:
            RecipeError: an unknown key or a wrong value in the method's settings.
        """
        made_of = self.method_class().Config
        return validate(made_of, self.method, where=where, overrides=overrides, within="method")


def preset_path(name: str) -> Path:
    """A recipe file, or the packaged preset of that name.

    Raises:
        RecipeError: neither a file nor a preset.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    if name in known:
        return PRESETS / f"{name}.yaml"
    what = "no such recipe file or preset"
    raise RecipeError(what, where=name, do=suggest(name, known))


def load_tune_recipe(name: str, overrides: tuple[str, ...] = ()) -> TuneRecipe:
    """A tuning recipe from a file or preset, with `a.b=value` overrides.

    Raises:
        RecipeError: see `cache.recipe.load_recipe`.
    """
    return load_recipe(TuneRecipe, preset_path(name), overrides)
