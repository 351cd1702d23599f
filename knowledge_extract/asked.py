"""Blocks of a recipe whose texts a model makes up: descriptions, phrases, ranked attributes."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cache.recipe import RecipePart
from knowledge_extract.recipe_parts import ModelRecipe, Quantisation, check_template

# A stored recipe holds numbers that are no integers as decimal strings.
Decimal = Annotated[float, BeforeValidator(lambda v: float(v) if isinstance(v, str) else v)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names) or any(not name.strip() for name in names):
        message = "the names of attributes are distinct and not empty"
        raise ValueError(message)
    return tuple(sorted(names))


class Sampled(RecipePart):
    """How answers are drawn, and which are refused; see `phrasing` and `sampling`.

    Every answer has a seed of its own, made of `seed`, class, item and attempt. A refused answer is
    drawn again with the next attempt, `attempts` times at most, and is kept with the reason in the
    block of draws.
    """

    prompt: str
    begin: str = ""
    """What the answer is made to begin with; part of a sentence, not of a phrase."""
    form: Literal["sentence", "phrase"] = "sentence"
    """`sentence`: the first sentence of an answer; `phrase`: its words before the first comma or
    other mark, without an article or an adverb such as "usually" before them."""
    seed: int = Field(default=1, ge=0, lt=1 << 53)
    temperature: Annotated[Decimal, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[Decimal, Field(gt=0, le=1)] = 0.95
    max_new_tokens: int = Field(default=60, ge=1)
    max_words: int = Field(default=60, ge=1)
    avoid_name: bool = False
    """Refuse answers that hold a word of the class's name, as ViP's symptoms must not."""
    attempts: int = Field(default=100, ge=1)
    quantisation: Quantisation | None = None


class GeneratedBlock(Sampled):
    """So many texts per class, each one sampled answer of the model."""

    kind: Literal["generated"]
    count: int = Field(ge=1, le=10_000)

    @model_validator(mode="after")
    def _placeholders(self) -> Self:
        check_template("prompt", self.prompt, {"name"}, {"name", "modality"})
        check_template("begin", self.begin, set(), {"name", "modality"})
        return self


class ModelAttributesBlock(Sampled):
    """Values of attributes, ranked by how often the model names them in `samples` sampled answers.

    Equally frequent values stand in the order in which they were first drawn. Drawing goes on until
    there are `values` different ones.
    """

    kind: Literal["attributes"]
    by: Literal["model"]
    prompt: str = "What is the typical {attribute} of {name}?"
    begin: str = "The typical {attribute} of {name} is"
    form: Literal["phrase"] = "phrase"
    names: Names
    values: int = Field(default=3, ge=1, le=100)
    samples: int = Field(default=10, ge=1, le=10_000)
    max_new_tokens: int = Field(default=16, ge=1)
    max_words: int = Field(default=5, ge=1)
    avoid_name: bool = True
    attempts: int = Field(default=300, ge=1)

    _sorted = field_validator("names")(_check_names)

    @model_validator(mode="after")
    def _placeholders(self) -> Self:
        allowed = {"name", "attribute", "modality"}
        check_template("prompt", self.prompt, {"name", "attribute"}, allowed)
        check_template("begin", self.begin, set(), allowed)
        return self


class ClozeBlock(RecipePart):
    r"""Values of attributes that a fill-mask model puts into a gap, ranked by their probability.

    Qin et al. (MIU-VL, ICLR 2023, section 3.2 and the released code): rank j of an attribute is the
    token of the j-th largest $p(\text{[MASK]})$ in "the typical {attribute} of {name} is [MASK]",
    with "at" for a location; three values.

    Differs: parts of words, tokens without letters, and words of the class's name or the attribute
    are passed over; they are kept, with the reason, in the block of draws.
    """

    kind: Literal["attributes"]
    by: Literal["cloze"]
    model: ModelRecipe
    names: Names
    values: int = Field(default=3, ge=1, le=100)
    template: str = "The typical {attribute} of {name} is {mask}."
    templates: dict[str, str] = Field(
        default_factory=lambda: {"location": "The typical {attribute} of {name} is at {mask}."}
    )
    """In place of `template`, by attribute."""

    _sorted = field_validator("names")(_check_names)

    @model_validator(mode="after")
    def _placeholders(self) -> Self:
        for key, template in {"cloze": self.template, **self.templates}.items():
            allowed = {"attribute", "name", "mask", "modality"}
            check_template(key, template, {"name", "mask"}, allowed)
            if template.count("{mask}") > 1:
                message = f"the {key} template has one gap"
                raise ValueError(message)
        if self.model.gguf:
            message = "a fill-mask model comes from hub, folder or asset"
            raise ValueError(message)
        return self


class DrawsBlock(RecipePart):
    """What a model answered for another block and is not stored there, with the reasons.

    Every block of generated texts or attributes gets one, `NAME_draws` unless the recipe has it
    under another name. An entry's text is a JSON list of `[attempt, reason, answer]`; the reason is
    empty for an answer that counted.
    """

    kind: Literal["draws"]
    of: str


AskedBlock = GeneratedBlock | ModelAttributesBlock  # by the recipe's own model
ASKED = (GeneratedBlock, ModelAttributesBlock)
DRAWN = (*ASKED, ClozeBlock)


def made_by(block: Any) -> str:
    """What tells the three kinds of attribute blocks apart."""
    by = block.get("by") if isinstance(block, dict) else getattr(block, "by", None)
    return "given" if by is None else str(by)


def with_draws(blocks: dict[str, Any]) -> dict[str, Any]:
    """The blocks of a recipe with a block of draws for each that needs one.

    Raises:
        ValueError: the name is taken, or a block of draws is of no such block.
    """
    wanted = {name for name, block in blocks.items() if isinstance(block, DRAWN)}
    kept = [block.of for block in blocks.values() if isinstance(block, DrawsBlock)]
    for of in kept:
        if of not in wanted or kept.count(of) > 1:
            message = f"draws of {of!r}: give one for a block of generated texts or attributes"
            raise ValueError(message)
    added = {f"{name}_draws": DrawsBlock(kind="draws", of=name) for name in wanted - set(kept)}
    if taken := sorted(set(added) & set(blocks)):
        message = f"the name {taken[0]!r} is needed for draws"
        raise ValueError(message)
    return blocks | dict(sorted(added.items()))
