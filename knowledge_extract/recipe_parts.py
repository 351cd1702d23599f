"""Parts of a stage-one recipe that more than one module of it needs."""

from string import Formatter
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from cache.recipe import Alternatives, RecipePart
from cache.registry import suggest

Quantisation = Literal["none", "nf4", "fp4", "int8"]


class ModelRecipe(RecipePart):
    """Where a language model comes from: exactly one of hub, folder, gguf, asset.

    Paths are taken from the working directory and never stored. `licence` (as the model's page
    names it) and `gated` go into the cache's provenance, where `vademecum cache push` looks.
    """

    alternatives: ClassVar[Alternatives] = {
        "hub": ("revision", "licence", "gated"),
        "folder": ("licence", "gated"),
        "gguf": ("licence", "gated"),
        "asset": ("licence", "gated"),
    }

    hub: str | None = None
    revision: str = "main"
    folder: str | None = None
    gguf: str | None = None
    asset: str | None = None
    licence: str | None = None
    gated: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [k for k in ("hub", "folder", "gguf", "asset") if getattr(self, k)]
        if len(given) != 1:
            message = f"give exactly one of hub, folder, gguf, asset (given: {given or 'none'})"
            raise ValueError(message)
        if self.revision != "main" and not self.hub:
            message = "revision belongs to a hub model"
            raise ValueError(message)
        return self


def check_template(key: str, template: str, required: set[str], allowed: set[str]) -> str:
    """A template with the placeholders it needs and no other.

    Raises:
        ValueError: a placeholder that is unknown or missing.
    """
    found = set()
    for _, field, spec, conversion in Formatter().parse(template):
        if field is None:
            continue
        if spec or conversion or field not in allowed:
            message = f"unknown placeholder {{{field}}}. {suggest(field, allowed)}"
            raise ValueError(message)
        found.add(field)
    if missing := required - found:
        message = f"the {key} template must use {{{sorted(missing)[0]}}}"
        raise ValueError(message)
    return template
