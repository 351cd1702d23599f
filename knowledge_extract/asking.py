"""What is asked for generated texts and attributes, and what defines the answers."""

from collections.abc import Iterator, Mapping
from typing import Any

from cache.recipe import digest_of
from knowledge_extract.asked import (
    AskedBlock,
    ClozeBlock,
    DrawsBlock,
    GeneratedBlock,
    ModelAttributesBlock,
)
from knowledge_extract.recipe import ClassRecipe, ExtractRecipe
from knowledge_extract.sampling import REVISION

Question = tuple[str, int, str, str]  # class, item, text, what the answer begins with


def filled(template: str, one: ClassRecipe, **more: str) -> str:
    """A template filled for a class."""
    return template.format(name=one.name, modality=one.modality, **more)


def questions(recipe: ExtractRecipe, block: AskedBlock | ClozeBlock) -> Iterator[Question]:
    """Every question of a block; of attributes one for each, in the order of their names.

    The gap of a cloze is left as `{mask}`.
    """
    for one in recipe.classes:
        for number, more in enumerate(_more(block)):
            if isinstance(block, ClozeBlock):
                template = block.templates.get(more["attribute"], block.template)
                yield one.id, number, filled(template, one, **more, mask="{mask}"), ""
            else:
                begin = filled(block.begin, one, **more)
                yield one.id, number, filled(block.prompt, one, **more), begin


def _more(block: AskedBlock | ClozeBlock) -> list[dict[str, str]]:
    """What fills the placeholders of each question beside the class."""
    if isinstance(block, GeneratedBlock):
        return [{}] * block.count
    return [{"attribute": name} for name in block.names]


def per_question(block: object) -> int:
    """How many entries one question of a block gives."""
    return block.values if isinstance(block, ModelAttributesBlock | ClozeBlock) else 1


def draws_of(recipe: ExtractRecipe, name: str) -> str:
    """The block that keeps the draws of another."""
    found = recipe.blocks.items()
    return next(own for own, b in found if isinstance(b, DrawsBlock) and b.of == name)


def sampling_spec(block: AskedBlock) -> Mapping[str, Any]:
    """What defines an answer beside the model and the question.

    `count`, `attempts` and the names of attributes are not among it: more texts or attributes leave
    those that are there as they are.
    """
    spec: dict[str, Any] = {
        "source": "generated",
        "template": digest_of({"prompt": block.prompt, "begin": block.begin}),
        "max_new_tokens": block.max_new_tokens,
        "decoding": {
            "temperature": repr(block.temperature),
            "top_p": repr(block.top_p),
            "seed": block.seed,
            "revision": REVISION,
        },
        "refused": {
            "form": block.form,
            "max_words": block.max_words,
            "avoid_name": block.avoid_name,
        },
    }
    if isinstance(block, ModelAttributesBlock):
        spec |= {"values": block.values, "samples": block.samples, "ranked": "by-count"}
    return spec
