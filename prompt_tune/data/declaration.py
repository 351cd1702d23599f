"""What a user writes about a data set: a short YAML file, every key checked."""

import re
import string
import unicodedata
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cache.recipe import RecipePart

SLUG = re.compile(r"[a-z0-9][a-z0-9_.-]*")
ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}

Slug = Annotated[str, Field(pattern=rf"^{SLUG.pattern}$")]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def slug(name: str) -> str:
    """`name` in lower-case ASCII with dashes, as used for ids; may be empty."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9.]+", "-", ascii_name).strip("-.")


class DeclaredClass(RecipePart):
    """One class; `label` is how the files call it where neither id nor name fits."""

    id: Slug
    name: Annotated[str, Field(min_length=1)]
    modality: str | None = None
    label: str | int | None = None


class Divide(RecipePart):
    """Splits the data do not have, taken from the training images.

    Stratified by class, whole patients where they are known, and the same on every machine.
    """

    val: Fraction | None = None
    test: Fraction | None = None
    seed: int = 1

    @model_validator(mode="after")
    def _something_is_left(self) -> "Divide":
        if (self.val or 0) + (self.test or 0) >= 1:
            what = "val and test together leave nothing to train on"
            raise ValueError(what)
        return self


UNSPLIT = Divide(val=0.1, test=0.2)  # for data without any split


class Columns(RecipePart):
    """Column names in a table or a hub data set; null means the usual name, or none."""

    image: str | None = None
    label: str | None = None
    split: str | None = None
    patient: str | None = None


class DataDeclaration(RecipePart):
    """A data set, written by hand or inferred from a path.

    Attributes:
        dataset: id of the data set.
        layout: how the files are arranged; inferred from the path where absent.
        path: file or folder, relative to the declaration; or
        asset: name of an embedded asset; or
        hub: a Hugging Face data set id, with `revision`.
        images: folder that the paths in a table or split file are relative to, itself relative to
            the declaration; by default the folder of that file.
        classes: the classes in label order; inferred where the layout names them.
        splits: what the files call train, val and test.
        divide: how to make splits that the data do not have.
        overlap: whether one patient or one file may stand in two splits.
    """

    dataset: Slug
    layout: str | None = None
    path: str | None = None
    asset: str | None = None
    hub: str | None = None
    revision: str | None = None
    images: str | None = None
    modality: str | None = None
    classes: tuple[DeclaredClass, ...] = ()
    template: str = "a photo of a {}."
    templates: tuple[str, ...] = ()
    splits: dict[Literal["train", "val", "test"], str] = Field(default_factory=dict)
    columns: Columns = Columns()
    divide: Divide | None = None
    overlap: Literal["refuse", "allow"] = "refuse"
    source: str = ""
    licence: str = ""

    @field_validator("template", "templates")
    @classmethod
    def _one_place_for_the_name(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for template in (value,) if isinstance(value, str) else value:
            try:
                fields = [name for _, name, _, _ in string.Formatter().parse(template)]
            except ValueError:
                fields = []
            if [name for name in fields if name is not None] != [""]:
                what = f"a template has exactly one {{}} for the class name: {template!r}"
                raise ValueError(what)
        return value

    @model_validator(mode="after")
    def _one_place(self) -> "DataDeclaration":
        given = [k for k in ("path", "asset", "hub") if getattr(self, k) is not None]
        if len(given) != 1:
            what = f"give exactly one of path, asset and hub, not {' and '.join(given) or 'none'}"
            raise ValueError(what)
        for what, values in (
            ("class id", [c.id for c in self.classes]),
            ("class name", [c.name for c in self.classes]),
        ):
            twice = next((v for k, v in enumerate(values) if v in values[:k]), None)
            if twice is not None:
                fault = f"the {what} {twice!r} stands twice"
                raise ValueError(fault)
        return self
