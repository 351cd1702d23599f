"""The recipe of stage one: which model reads which texts, and what is kept of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from cache.blocks import SLUG
from cache.errors import RecipeError, ValueRefusedError
from cache.header import check_block_name
from cache.plain import is_token
from cache.recipe import RecipePart, load_recipe
from cache.registry import suggest
from knowledge_extract.asked import (
    ASKED,
    ClozeBlock,
    DrawsBlock,
    GeneratedBlock,
    ModelAttributesBlock,
    made_by,
    with_draws,
)
from knowledge_extract.presets import preset_path
from knowledge_extract.recipe_parts import ModelRecipe, Quantisation, check_template

Dtype = Literal["float32", "bfloat16", "float16"]
ChatMode = Literal["auto", "always", "never"]
LastRow = Literal["normed", "raw"]
Pooling = Literal["end_token", "last_token", "mean", "all_tokens"]
TextSource = Literal["descriptions", "attributes"]

GIVEN = ("descriptions", "attributes")  # with the classes of the recipe
PLACEHOLDERS = {  # template -> (required, allowed)
    "question": ({"name"}, {"name", "modality"}),
    "description": ({"text"}, {"text", "name", "modality"}),
    "attribute": ({"value"}, {"attribute", "name", "value", "modality"}),
}


class TemplatesRecipe(RecipePart):
    """How a class becomes a question, and a text becomes what the model reads."""

    question: str = "In an image, describe the distinctive visual features of {name}."
    description: str = "{text}"
    attribute: str = "The {attribute} of {name} is {value}."

    @field_validator("question", "description", "attribute")
    @classmethod
    def _placeholders(cls, template: str, info: object) -> str:
        key = str(getattr(info, "field_name", ""))
        return check_template(key, template, *PLACEHOLDERS[key])


class ClassRecipe(RecipePart):
    """One class: identity, and the texts that describe it."""

    id: str
    name: str = Field(min_length=1)
    modality: str = ""
    source: str = ""
    descriptions: tuple[str, ...] = ()
    attributes: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @field_validator("id")
    @classmethod
    def _slug(cls, value: str) -> str:
        if not SLUG.fullmatch(value):
            message = "a class id is lower-case letters, digits, '_', '.', '-', as in 'b-cell'"
            raise ValueError(message)
        return value

    @model_validator(mode="after")
    def _no_empty_text(self) -> Self:
        values = [v for values in self.attributes.values() for v in values]
        if any(not text.strip() for text in (*self.descriptions, *self.attributes, *values)):
            message = f"class {self.id!r} has an empty text"
            raise ValueError(message)
        return self


class AnswersBlock(RecipePart):
    """Texts the model generates on the template question; 0 new tokens leaves them empty."""

    kind: Literal["answers"]
    max_new_tokens: int = Field(default=128, ge=0)
    quantisation: Quantisation | None = None


class StatesBlock(RecipePart):
    """Hidden states of an answers block (`end_token`) or of given texts (the other poolings).

    Layers are decoder layers 1..depth, negative from the end, 0 the embeddings; `all` is 1..depth.
    """

    kind: Literal["states"]
    of: str
    pooling: Pooling
    layers: Literal["all"] | tuple[int, ...] = "all"
    quantisation: Quantisation | None = None


class TextsBlock(RecipePart):
    """The descriptions themselves."""

    kind: Literal["texts"]
    of: Literal["descriptions"]


class AttributesBlock(RecipePart):
    """The attributes themselves."""

    kind: Literal["attributes"]
    of: Literal["attributes"]


AnyAttributes = Annotated[
    Annotated[AttributesBlock, Tag("given")]
    | Annotated[ModelAttributesBlock, Tag("model")]
    | Annotated[ClozeBlock, Tag("cloze")],
    Discriminator(made_by),
]
BlockRecipe = Annotated[
    AnswersBlock | StatesBlock | TextsBlock | AnyAttributes | GeneratedBlock | DrawsBlock,
    Field(discriminator="kind"),
]


class ExtractRecipe(RecipePart):
    """Everything that defines the values of a cache."""

    dataset: str = Field(min_length=1)
    model: ModelRecipe
    quantisation: Quantisation = "none"
    compute_dtype: Dtype = "float32"
    chat_template: ChatMode = "auto"
    last_row: LastRow = "normed"
    store_dtype: Literal["float16", "float32"] = "float16"
    on_overflow: Literal["refuse", "float32"] = "refuse"
    templates: TemplatesRecipe = TemplatesRecipe()
    classes: tuple[ClassRecipe, ...] = Field(min_length=1)
    blocks: dict[str, BlockRecipe] = Field(min_length=1)

    @field_validator("dataset")
    @classmethod
    def _token(cls, value: str) -> str:
        if not is_token(value):
            message = (
                "a data set id is letters, digits and _ . : - without spaces, as in bloodmnist"
            )
            raise ValueError(message)
        return value

    @field_validator("classes")
    @classmethod
    def _sorted(cls, value: tuple[ClassRecipe, ...]) -> tuple[ClassRecipe, ...]:
        # Order means nothing here, so that two laboratories' recipes merge into one.
        return tuple(sorted(value, key=lambda one: one.id))

    @field_validator("blocks")
    @classmethod
    def _draws(cls, value: dict[str, BlockRecipe]) -> dict[str, BlockRecipe]:
        return with_draws(value)

    @model_validator(mode="after")
    def _unique_classes(self) -> Self:
        ids = [c.id for c in self.classes]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            message = f"the class id {twice[0]!r} stands twice"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        answers = [n for n, b in self.blocks.items() if isinstance(b, AnswersBlock)]
        seen: dict[object, str] = {}
        for name, block in self.blocks.items():
            _check_name(name)
            if isinstance(block, StatesBlock):
                _check_states(name, block, answers)
            filled = {"quantisation": self.quantisation}
            data = {**filled, **block.model_dump(exclude_none=True)}
            twin = seen.setdefault(repr(sorted(data.items())), name)
            if twin != name:
                message = f"blocks {twin!r} and {name!r} are the same"
                raise ValueError(message)
            self._check_texts(name, block)
        return self

    def _check_texts(self, name: str, block: BlockRecipe) -> None:
        of = getattr(block, "of", None)
        if of in GIVEN and not isinstance(block, DrawsBlock):
            if isinstance(self.blocks.get(of), (*ASKED, ClozeBlock)):
                message = f"block {name!r} reads given {of}; call the generated ones otherwise"
                raise ValueError(message)
            empty = [c.id for c in self.classes if not getattr(c, of)]
            if empty:
                message = f"block {name!r} reads {of}, and class {empty[0]!r} has none"
                raise ValueError(message)


def _check_name(name: str) -> None:
    try:
        check_block_name(name)
    except ValueRefusedError as error:
        raise ValueError(str(error)) from error


def _check_states(name: str, block: StatesBlock, answers: Sequence[str]) -> None:
    sources = [*answers, "descriptions", "attributes"]
    if block.of not in sources:
        message = (
            f"block {name!r} is of {block.of!r}, which is no source. {suggest(block.of, sources)}"
        )
        raise ValueError(message)
    if (block.pooling == "end_token") != (block.of in answers):
        wanted = "end_token" if block.of in answers else "last_token, mean or all_tokens"
        message = f"block {name!r} of {block.of!r} takes pooling {wanted}, not {block.pooling}"
        raise ValueError(message)
    if block.layers != "all" and len(set(block.layers)) != len(block.layers):
        message = f"block {name!r} names a layer twice"
        raise ValueError(message)
    if block.layers == ():
        message = f"block {name!r} names no layer"
        raise ValueError(message)


def room_for_answer(block: object) -> int:
    """Tokens that an answer and its end token take at most; 0 where nothing is generated."""
    longest = getattr(block, "max_new_tokens", None)
    return 0 if longest is None else int(longest) + 1


def resolve_layers(
    layers: Literal["all"] | Sequence[int], depth: int, block: str
) -> tuple[int, ...]:
    """Layer numbers 0..depth of a block, ascending, negatives counted from the end.

    Raises:
        RecipeError: a layer the model does not have, or one layer under two names.
    """
    if layers == "all":
        return tuple(range(1, depth + 1))
    numbers = []
    for layer in layers:
        if not -depth <= layer <= depth:
            what = f"block {block!r} asks for a layer the model does not have"
            raise RecipeError(what, found=layer, wanted=f"-{depth}..{depth}")
        numbers.append(layer if layer >= 0 else depth + 1 + layer)
    if len(set(numbers)) != len(numbers):
        what = f"block {block!r} names a layer twice"
        raise RecipeError(what, found=list(layers))
    return tuple(sorted(numbers))


def load_extract_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> ExtractRecipe:
    """A recipe file, or a preset by its name, with `a.b=value` overrides.

    Raises:
        RecipeError: see `cache.recipe.load_recipe`.
        UnknownNameError: neither a file nor a preset.
    """
    path = Path(recipe)
    if not path.exists() and path.suffix not in {".yaml", ".yml"} and path.name == str(recipe):
        path = preset_path(str(recipe))
    return load_recipe(ExtractRecipe, path, overrides)
