"""Image folders: `root/split/class/image.png`, or `root/class/image.png` without splits."""

import unicodedata
from pathlib import Path

from cache.errors import DataError
from prompt_tune.data.declaration import ALIASES, DataDeclaration
from prompt_tune.data.layout import SUFFIXES, Found, Layout, Part, file_part, saved_by_datasets


def _folders(path: Path) -> list[Path]:
    return sorted((p for p in path.iterdir() if p.is_dir() and p.name[0] != "."), key=_name)


def _name(path: Path) -> str:
    return unicodedata.normalize("NFC", path.name)


def _images(folder: Path, root: Path) -> list[str]:
    """Image files below `folder`, relative to `root`, in code-point order; hidden ones skipped."""
    found = (p.relative_to(root) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    return sorted(p.as_posix() for p in found if not any(part[0] == "." for part in p.parts))


def _part(root: Path) -> Part:
    pairs = [(name, _name(f)) for f in _folders(root) for name in _images(f, root)]
    return file_part(root, [n for n, _ in pairs], [label for _, label in pairs])


def _split_folders(root: Path, declaration: DataDeclaration) -> list[Path]:
    known = {alias for names in ALIASES.values() for alias in names}
    known |= set(declaration.splits.values())
    train = {*ALIASES["train"], declaration.splits.get("train", "train")}
    folders = _folders(root)
    return [f for f in folders if _name(f) in known] if train & set(map(_name, folders)) else []


def read(place: str, declaration: DataDeclaration) -> Found:
    """The images below a folder; a class is a folder, its name with underscores as spaces.

    Raises:
        DataError: not a folder, or no images in it.
    """
    root = Path(place)
    if not root.is_dir():
        what = "no such folder"
        raise DataError(what, where=root, do="Check the path.")
    splits = _split_folders(root, declaration)
    parts = {_name(f): _part(f) for f in splits} if splits else {"": _part(root)}
    if not any(part.labels for part in parts.values()):
        what = "no images in this folder"
        wanted = "root/class/image.png or root/split/class/image.png"
        raise DataError(what, where=root, wanted=wanted)
    labels = sorted({label for part in parts.values() for label in part.labels})
    return Found(parts, tuple((label, label.replace("_", " ")) for label in labels))


def _matches(path: Path) -> bool:
    return path.is_dir() and not saved_by_datasets(path)


LAYOUT = Layout(matches=_matches, read=read)
