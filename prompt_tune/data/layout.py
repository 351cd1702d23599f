"""What a layout has to deliver, and the pieces layouts share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import DataError
from cache.registry import Registry
from prompt_tune.data.declaration import DataDeclaration

LAYOUTS = Registry(
    "prompt_tune.data.layouts", Path(__file__).parent / "layouts", "LAYOUT", "data layout"
)

SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"]
)


@dataclass(frozen=True)
class Part:
    """Some images as the files have them.

    Attributes:
        rows: a `datasets.Dataset` whose column `image` decodes on access.
        labels: the class of each row as the files call it.
        files: what a message calls each image.
        keys: a stable name of each image, free of the folder it lies in.
        patients: the patient of each image where known.
        missing: those of `files` that are not there.
    """

    rows: Any
    labels: tuple[str, ...]
    files: tuple[str, ...]
    keys: tuple[str, ...]
    patients: tuple[str | None, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """Everything a layout found.

    Attributes:
        parts: the images of each split, by the files' own name of it; one part under the empty
            name where the files have no splits.
        names: (label in the files, class name) in label order; empty where the files name none.
        numbered: the labels are positions in the class list.
        ordered: the files number the classes, so that `names` has their label order.
    """

    parts: dict[str, Part]
    names: tuple[tuple[str, str], ...] = ()
    numbered: bool = False
    ordered: bool = False


@dataclass(frozen=True)
class Layout:
    """One way images lie on disk.

    Attributes:
        matches: whether a path looks like this layout; asked in the order of layout names.
        read: everything at a path, or at a hub id.
        lists: whether it is a file that lists the paths of images.
    """

    matches: Callable[[Path], bool]
    read: Callable[[str, DataDeclaration], Found]
    lists: bool = False


def layout_named(name: str) -> Layout:
    """The layout of that name.

    Raises:
        UnknownNameError: no such layout; the nearest is named.
    """
    layout = LAYOUTS[name]
    if not isinstance(layout, Layout):
        what = "LAYOUT is not a data layout"
        raise DataError(what, where=f"{LAYOUTS.package}.{name}")
    return layout


def layout_for(path: Path) -> str:
    """The name of the layout `path` looks like.

    Raises:
        DataError: none.
    """
    for name in LAYOUTS:
        if layout_named(name).matches(path):
            return name
    what = "no data layout fits this path"
    do = "Give a folder of images, a .csv, .json or .npz file, or a saved `datasets` folder."
    raise DataError(what, where=path, do=do)


def saved_by_datasets(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` or by a Parquet export."""
    names = ("dataset_dict.json", "dataset_info.json", "*.parquet", "*/*.parquet")
    return path.is_dir() and any(next(path.glob(name), None) for name in names)


def file_rows(paths: Sequence[Path]) -> Any:
    """A `datasets.Dataset` of image files, decoded on access."""
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": [str(p) for p in paths]}, features=features)


def file_part(
    root: Path,
    names: Sequence[str],
    labels: Sequence[str],
    patients: Sequence[str | None] | None = None,
) -> Part:
    """Image files under `root` as a part; those that are not there are noted."""
    paths = [root / name for name in names]
    files = tuple(str(p) for p in paths)
    return Part(
        rows=file_rows(paths),
        labels=tuple(labels),
        files=files,
        keys=tuple(names),
        patients=tuple(patients) if patients is not None else (None,) * len(files),
        missing=tuple(str(p) for p in paths if not p.is_file()),
    )


def image_root(listing: Path, declaration: DataDeclaration) -> Path:
    """The folder that the paths in a listing are relative to."""
    return listing.parent if declaration.images is None else Path(declaration.images)


def read_text(path: Path) -> str:
    """A text file, with or without a byte order mark.

    Raises:
        DataError: missing, unreadable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        what = "no such file"
        raise DataError(what, where=path, do="Check the path.") from error
    except UnicodeDecodeError as error:
        what = "not UTF-8 text"
        raise DataError(what, where=path, do="Save it as UTF-8.") from error
    except OSError as error:
        what = f"the file cannot be read ({error.__class__.__name__})"
        raise DataError(what, where=path) from error
