"""A whole data set, and `load_data`, which makes one of a declaration or a bare path."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache.errors import DataError, UnknownNameError
from cache.progress import say
from cache.recipe import load_recipe, read_yaml, validate
from cache.registry import suggest
from prompt_tune.data.classes import class_table, renumbered
from prompt_tune.data.declaration import PLACES, DataDeclaration, DataFacts, slug
from prompt_tune.data.expected import refuse_unexpected
from prompt_tune.data.images import DataClass, ImageSplit
from prompt_tune.data.layout import LAYOUTS, Found, image_root, layout_for, layout_named
from prompt_tune.data.splits import SPLITS, pieces_of, refuse_gaps, refuse_overlap, split_of

__all__ = ["DataClass", "DataSource", "ImageSplit", "load_data", "preset", "presets"]

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
        notes: what was inferred rather than declared, such as a split made here, and where the
            files differ from what was declared.
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

    @property
    def class_ids(self) -> tuple[str, ...]:
        """In label order."""
        return tuple(c.id for c in self.classes)

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


@dataclass(frozen=True)
class Opened:
    """What a declaration and its files say, before anything is refused.

    Attributes:
        declaration: with the preset it names, if any.
        place: the path or hub id of the data.
        found: what the layout found there.
        root: the folder that listed paths are relative to.
    """

    declaration: DataDeclaration
    place: str
    found: Found
    root: Path


def open_data(spec: str | Path) -> Opened:
    """Reads where the images at `spec` are and how they are labelled, and none of the images.

    Raises:
        RecipeError: the declaration is wrong.
        DataError: there is nothing, or it cannot be read.
    """
    declaration, base = _declared(spec)
    if declaration.unsupported is not None:
        what = f"this data set cannot be used here: {declaration.unsupported}"
        raise DataError(what, where=declaration.dataset)
    place = _place(declaration, base)
    if declaration.path is not None and not Path(place).exists():
        what, do = f"there is no {place}", "Check `path`; it is relative to the declaration."
        raise DataError(what, where=spec, do=do)
    layout = declaration.layout
    if layout is not None:
        try:
            layout_named(layout)
        except UnknownNameError as error:
            raise UnknownNameError(str(error), where=spec) from error
    else:
        layout = "hub" if declaration.hub is not None else layout_for(Path(place))
    declaration = _rooted(declaration, layout, base)
    found = layout_named(layout).read(place, declaration)
    return Opened(declaration, place, found, image_root(Path(place), declaration))


def load_data(spec: str | Path) -> DataSource:
    """The data at `spec`: a declaration (.yaml), a bare path, `hub:ID[@REVISION]`, or a preset.

    A bare path is a folder of images, a .csv, a CoOp-style .json, a MedMNIST .npz whose name is
    that of a preset (`bloodmnist.npz`, `bloodmnist_224.npz`), or a saved `datasets` folder.

    Raises:
        RecipeError: the declaration is wrong.
        DataError: the data are.
    """
    opened = open_data(spec)
    declaration, place = opened.declaration, opened.place
    _refuse_missing(opened)
    classes, numbers = class_table(opened.found, declaration, place)
    order = renumbered(opened.found, classes, numbers)
    for note in order:
        say(f"{place}: {note}")
    parts, notes = pieces_of(opened.found, declaration, place)
    splits = {
        name: split_of(name, part, classes, numbers, place)
        for name, part in sorted(parts.items(), key=lambda item: SPLITS.index(item[0]))
    }
    refuse_gaps(splits, classes, place)
    if declaration.overlap == "refuse":
        refuse_overlap(parts, place)
    if declaration.expected.strict:
        refuse_unexpected(declaration, splits, place)
    return DataSource(
        dataset=declaration.dataset,
        classes=classes,
        splits=splits,
        template=declaration.template,
        templates=declaration.templates,
        source=declaration.source,
        licence=declaration.licence,
        notes=(*notes, *order),
    )


def _refuse_missing(opened: Opened) -> None:
    missing = [path for part in opened.found.parts.values() for path in part.missing]
    if missing:
        what = f"the image {missing[0]} is missing"
        found = f"{len(missing)} missing" if len(missing) > 1 else None
        do = f"Paths are relative to {opened.root}; declare `images` to change that."
        raise DataError(what, where=opened.place, found=found, do=do)


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
        return _from_file(path), path.parent
    if path.exists():
        stem = path.resolve().name if path.is_dir() else path.stem
        preset = stem.partition("_")[0]
        if path.suffix.lower() == ".npz":
            if preset not in presets():
                what = "an npz archive does not say what its classes are called"
                do = "Write a declaration with `path` and `classes` and give that."
                raise DataError(what, where=path, do=do)
            written = _with_preset({"preset": preset, "path": str(path)}, path)
            return validate(DataDeclaration, written, where=path), Path()
        return _inferred(stem, {"path": str(path)}, text), Path()
    if text in presets():
        return _preset_alone(text), PRESETS
    do = f"Check the path, or use a preset. {suggest(text, presets())}"
    what = "no such file, folder or preset"
    raise DataError(what, where=text, do=do)


def preset(name: str) -> DataFacts:
    """What the packaged preset of that name says.

    Raises:
        DataError: no such preset; the nearest is named.
    """
    if name not in presets():
        what = "no such preset of data"
        raise DataError(what, where=name, do=suggest(name, presets()))
    return load_recipe(DataFacts, PRESETS / f"{name}.yaml")


def _preset_alone(name: str) -> DataDeclaration:
    facts = preset(name)
    if facts.asset is None and facts.unsupported is None:
        what = "this preset says what the images are, not where they lie"
        do = f"Give a YAML file with `preset: {name}` and `path: ...`."
        raise DataError(what, where=name, do=do)
    place = {} if facts.asset else {"path": ""}
    return validate(DataDeclaration, facts.model_dump(mode="json") | place, where=name)


def _with_preset(written: dict[str, Any], where: object) -> dict[str, Any]:
    """The keys of a declaration together with those of the preset it names."""
    name = written.pop("preset")
    try:
        known = preset(str(name)).model_dump(mode="json", exclude_unset=True)
    except DataError as error:
        raise DataError(str(error), where=where) from error
    if any(key in written for key in PLACES):
        for key in ("layout", "asset"):
            known.pop(key, None)
    if "classes" in written:
        known.pop("expected", None)
    return known | written


def _from_file(path: Path) -> DataDeclaration:
    written = read_yaml(path)
    if isinstance(written, dict) and "preset" in written:
        written = _with_preset(dict(written), path)
    return validate(DataDeclaration, written, where=path)


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
