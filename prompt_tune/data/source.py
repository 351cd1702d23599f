"""A whole data set, and `load_data`, which makes one of a declaration or a bare path."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache.errors import DataError
from cache.recipe import load_recipe, validate
from cache.registry import suggest
from prompt_tune.data.classes import class_table
from prompt_tune.data.declaration import DataDeclaration, slug
from prompt_tune.data.images import DataClass, ImageSplit
from prompt_tune.data.layout import LAYOUTS, layout_for, layout_named
from prompt_tune.data.splits import SPLITS, pieces_of, refuse_gaps, refuse_overlap, split_of

__all__ = ["DataClass", "DataSource", "ImageSplit", "load_data", "presets"]

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True, eq=False)
class DataSource:
    """A whole data set: its classes in label order and its train, val and test splits.

    Attributes:
        dataset: id of the data set; knowledge is stored under (dataset, class id).
        template: the caption of one class, with `{}` for its name.
        templates: the captions of a prompt ensemble.
        source: where the data come from.
        licence: their licence.
        notes: what was inferred rather than declared, such as a split made here.
    """

    dataset: str
    classes: tuple[DataClass, ...]
    splits: dict[str, ImageSplit]
    template: str = "a photo of a {}."
    templates: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ImageSplit]:
        return iter(self.splits.values())

    def __getitem__(self, split: str) -> ImageSplit:
        """The split of that name.

        Raises:
            DataError: no such split.
        """
        if split not in self.splits:
            do = suggest(split, self.splits)
            what = f"no split {split!r}"
            raise DataError(what, where=self.dataset, do=do)
        return self.splits[split]

    def ordered(self, class_ids: Sequence[str]) -> list[str]:
        """Class ids in label order, unknown ones first."""
        known = {c.id: k for k, c in enumerate(self.classes)}
        return sorted(class_ids, key=lambda name: known.get(name, -1))

    def select(self, class_ids: Sequence[str]) -> "DataSource":
        """The same data with only some classes, in the order given.

        Raises:
            DataError: an unknown or repeated class id, or a split left empty.
        """
        known = {c.id: k for k, c in enumerate(self.classes)}
        for n, name in enumerate(class_ids):
            if name not in known:
                what = f"no class {name!r}"
                raise DataError(what, where=self.dataset, do=suggest(name, known))
            if name in class_ids[:n]:
                what = f"the class {name!r} is selected twice"
                raise DataError(what, where=self.dataset)
        labels = [known[name] for name in class_ids]
        splits = {name: split.select(labels) for name, split in self.splits.items()}
        for name, split in splits.items():
            if not len(split):
                what = f"the split {name!r} has no image of the selected classes"
                raise DataError(what, where=self.dataset, found=", ".join(class_ids))
        return replace(self, classes=tuple(self.classes[k] for k in labels), splits=splits)


def load_data(spec: str | Path) -> DataSource:
    """The data at `spec`: a declaration (.yaml), a bare path, `hub:ID[@REVISION]`, or a preset.

    A bare path is a folder of images, a .csv, a CoOp-style .json, a MedMNIST .npz whose name is
    that of a preset (`bloodmnist.npz`, `bloodmnist_224.npz`), or a saved `datasets` folder.

    Raises:
        RecipeError: the declaration is wrong.
        DataError: the data are.
    """
    declaration, base = _declared(spec)
    place = _place(declaration, base)
    layout = declaration.layout
    if layout is None:
        layout = "hub" if declaration.hub is not None else layout_for(Path(place))
    declaration = _rooted(declaration, layout, base)
    found = layout_named(layout).read(place, declaration)
    classes, numbers = class_table(found, declaration, place)
    parts, notes = pieces_of(found, declaration, place)
    splits = {
        name: split_of(name, part, classes, numbers, place)
        for name, part in sorted(parts.items(), key=lambda item: SPLITS.index(item[0]))
    }
    refuse_gaps(splits, classes, place)
    if declaration.overlap == "refuse":
        refuse_overlap(parts, place)
    return DataSource(
        dataset=declaration.dataset,
        classes=classes,
        splits=splits,
        template=declaration.template,
        templates=declaration.templates,
        source=declaration.source,
        licence=declaration.licence,
        notes=notes,
    )


def _rooted(declaration: DataDeclaration, layout: str, base: Path) -> DataDeclaration:
    """The declaration with `images` as a folder that is there.

    Raises:
        DataError: it is not there, or the layout lists no paths.
    """
    if declaration.images is None:
        return declaration
    root = base / declaration.images
    if not layout_named(layout).lists:
        what = "`images` belongs to layouts that list paths"
        wanted = ", ".join(name for name in LAYOUTS if layout_named(name).lists)
        found = f"layout {layout}"
        raise DataError(what, where=declaration.dataset, found=found, wanted=wanted)
    if not root.is_dir():
        what = "no such folder of images"
        do = "`images` is relative to the declaration."
        raise DataError(what, where=root, do=do)
    return declaration.model_copy(update={"images": str(root)})


def presets() -> tuple[str, ...]:
    """The names of the packaged declarations."""
    return tuple(sorted(p.stem for p in PRESETS.glob("*.yaml")))


def _declared(spec: str | Path) -> tuple[DataDeclaration, Path]:
    """A declaration and the folder its path is relative to."""
    text, path = str(spec), Path(spec)
    if text.startswith("hub:"):
        name, _, revision = text.removeprefix("hub:").partition("@")
        data: dict[str, Any] = {"hub": name, "revision": revision or None}
        return _inferred(name.rpartition("/")[2], data, text), Path()
    if path.suffix.lower() in (".yaml", ".yml"):
        return load_recipe(DataDeclaration, path), path.parent
    if path.exists():
        stem = path.resolve().name if path.is_dir() else path.stem
        preset = stem.partition("_")[0]
        if path.suffix.lower() == ".npz":
            if preset not in presets():
                what = "an npz archive does not say what its classes are called"
                do = "Write a declaration with `path` and `classes` and give that."
                raise DataError(what, where=path, do=do)
            known = load_recipe(DataDeclaration, PRESETS / f"{preset}.yaml")
            update = {"asset": None, "path": str(path)}
            return known.model_copy(update=update), Path()
        return _inferred(stem, {"path": str(path)}, text), Path()
    if text in presets():
        return load_recipe(DataDeclaration, PRESETS / f"{text}.yaml"), PRESETS
    do = f"Check the path, or use a preset. {suggest(text, presets())}"
    what = "no such file, folder or preset"
    raise DataError(what, where=text, do=do)


def _inferred(name: str, data: dict[str, Any], where: str) -> DataDeclaration:
    if not slug(name):
        what = "no data set id can be made of this name"
        do = "Write a declaration with `dataset` and `path` and give that."
        raise DataError(what, where=where, do=do)
    return validate(DataDeclaration, {"dataset": slug(name), **data}, where=where)


def _place(declaration: DataDeclaration, base: Path) -> str:
    if declaration.asset is not None:
        from cache.assets import fetch

        return str(fetch(declaration.asset))
    if declaration.hub is not None:
        return declaration.hub
    return str(base / (declaration.path or ""))
