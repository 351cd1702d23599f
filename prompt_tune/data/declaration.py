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
SplitName = Literal["train", "val", "test"]
Count = Annotated[int, Field(ge=1)]
FileDigest = Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")]
PLACES = ("path", "asset", "hub")
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


class Expected(RecipePart):
    """What the data are known to be, checked by `data check`, and on loading where `strict`.

    Attributes:
        images: of each split how many, or how many of each class in label order.
        files: `md5:` or `sha256:` and the digest of a file by its name; looked up by the name of
            the archive, table or split file that is loaded.
        strict: data that differ are refused.
    """

    images: dict[SplitName, Count | tuple[Annotated[int, Field(ge=0)], ...]] = Field(
        default_factory=dict
    )
    files: dict[str, FileDigest] = Field(default_factory=dict)
    strict: bool = False


class DataFacts(RecipePart):
    """What is true of a data set wherever its files lie: what a preset says.

    Attributes:
        dataset: id of the data set.
        layout: how the files are arranged; inferred from the path where absent.
        asset: name of an embedded asset that holds it.
        modality: of all classes that name none of their own.
        organ: what the images show, in words.
        classes: the classes in label order; inferred where the layout names them.
        template: the caption of one class.
        templates: the captions of a prompt ensemble.
        splits: what the files call train, val and test.
        divide: how to make splits that the data do not have.
        overlap: whether one patient or one file may stand in two splits.
        expected: what the data are known to be.
        source: where the data come from.
        licence: theirs; `unconfirmed` where nobody has looked it up.
        used_by: the papers or collections whose data set this is.
        unsupported: why it cannot be used here.
        notes: what else is known, and what is not.
    """

    dataset: Slug
    layout: str | None = None
    asset: str | None = None
    modality: str | None = None
    organ: str | None = None
    classes: tuple[DeclaredClass, ...] = ()
    template: str = "a photo of a {}."
    templates: tuple[str, ...] = ()
    splits: dict[SplitName, str] = Field(default_factory=dict)
    columns: Columns = Columns()
    divide: Divide | None = None
    overlap: Literal["refuse", "allow"] = "refuse"
    expected: Expected = Expected()
    source: str = ""
    licence: str = ""
    used_by: tuple[str, ...] = ()
    unsupported: str | None = None
    notes: tuple[str, ...] = ()

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
    def _each_class_once(self) -> "DataFacts":
        for what, values in (
            ("class id", [c.id for c in self.classes]),
            ("class name", [c.name for c in self.classes]),
        ):
            twice = next((v for k, v in enumerate(values) if v in values[:k]), None)
            if twice is not None:
                fault = f"the {what} {twice!r} stands twice"
                raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _counts_are_of_the_classes(self) -> "DataFacts":
        for name, counts in self.expected.images.items():
            if isinstance(counts, tuple) and len(counts) != len(self.classes):
                what = f"expected.images.{name} has {len(counts)} counts, and there are "
                raise ValueError(f"{what}{len(self.classes)} classes")
        return self


class DataDeclaration(DataFacts):
    """A data set and where it lies, written by hand or inferred from a path.

    In a file, `preset: NAME` stands for everything that preset says; other keys replace its keys.
    With a place of the file's own the layout is that of the place, and with classes of its own
    nothing is expected of the data.

    Attributes:
        path: file or folder, relative to the declaration; or `asset`; or
        hub: a Hugging Face data set id, with `revision`.
        images: folder that the paths in a table or split file are relative to, itself relative to
            the declaration; by default the folder of that file.
    """

    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    images: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "DataDeclaration":
        given = [k for k in PLACES if getattr(self, k) is not None]
        if len(given) != 1:
            what = f"give exactly one of path, asset and hub, not {' and '.join(given) or 'none'}"
            raise ValueError(what)
        return self
