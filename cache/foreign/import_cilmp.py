"""`llm_representations/<dataset>/<class>.pth` of the published CILMP code, into a sealed cache."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace as changed
from pathlib import Path

import numpy as np

from cache.blocks import ClassRecord
from cache.durable import storage_errors
from cache.errors import CacheFormatError, MissingKnowledgeError, ValueRefusedError
from cache.foreign.importing import (
    ImportReport,
    Labels,
    Piece,
    Place,
    file_digest,
    foreign_file,
    seal_import,
    slug,
)
from cache.foreign.sandbox import run_limited

SUFFIX = ".pth"


def import_cilmp(
    folder: Path,
    out: Path,
    labels: Labels,
    *,
    classes: Mapping[str, str] | None = None,
    replace: bool = False,
) -> ImportReport:
    """Makes a sealed cache of one file `<class>.pth` per class, each a bare tensor.

    Tensors are `[layers, width]`, of any width, float16, bfloat16, float32 or float64. Nothing is
    unpickled: each file is read as data by a child process with limits.

    Args:
        folder: `llm_representations/<dataset>`; other files in it are not looked at.
        out: the sealed cache to make.
        labels: what the files do not say.
        classes: name by class id; ids and names come from the file names otherwise.
        replace: exchange another cache that has the name `out`.

    Raises:
        CacheError: a file that is refused, or that does not fit the others; it is named.
        MissingKnowledgeError: a class of `classes` without a file.
        StorageError: the operating system refused something.
    """
    files, ignored = _files(folder)
    pieces, digests = [], {}
    for record, path in _named(folder, files, classes, labels.modality):
        piece = _piece(record, path)
        pieces.append(piece)
        digests[path.name] = piece.source
    recipe = {"imported": {"from": "cilmp", "files": digests}}
    used = set(digests)
    ignored += [path.name for path in files if path.name not in used]
    report = seal_import(pieces, out, labels, recipe, replace=replace)
    return changed(report, ignored=tuple(sorted(ignored)))


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    with storage_errors(folder):
        paths = sorted(folder.iterdir())
    files = [path for path in paths if path.suffix == SUFFIX]
    if not files:
        what, do = "no file is called <class>.pth", "Name the folder of one data set."
        raise CacheFormatError(what, where=folder, do=do)
    return files, [path.name for path in paths if path not in files]


def _named(
    folder: Path, files: list[Path], classes: Mapping[str, str] | None, modality: str
) -> Iterator[tuple[ClassRecord, Path]]:
    if classes is None:
        for path in files:
            if not slug(path.stem):
                what, do = "no class id can be made of the file name", "Give a table of classes."
                raise ValueRefusedError(what, where=folder, found=ascii(path.name), do=do)
            yield ClassRecord(slug(path.stem), path.stem, modality), path
        return
    for class_id, name in classes.items():
        own = [p for p in files if p.stem in {class_id, name}]
        own = own or [p for p in files if slug(p.stem) in {class_id, slug(name)}]
        if len(own) != 1:
            what = f"the class {class_id!r} ({name}) has {len(own) or 'no'} files"
            found = ", ".join(ascii(p.name) for p in (own or files)[:20])
            raise MissingKnowledgeError(what, where=folder, found=found, wanted=f"{name}{SUFFIX}")
        yield ClassRecord(class_id, name, modality), own[0]


def _piece(record: ClassRecord, path: Path) -> Piece:
    with foreign_file(path) as fd:
        digest, size = file_digest(fd), os.fstat(fd).st_size
        place = Place.checked(run_limited("tensor", path, fd), size, path)
    if len(place.shape) != 2:
        what = "a representation is a tensor of layers and width"
        raise CacheFormatError(what, where=path, found=list(place.shape), wanted="[layers, width]")

    def read() -> np.ndarray:
        with foreign_file(path) as fd:
            if file_digest(fd) != digest:
                what = "the file changed while it was read"
                raise CacheFormatError(what, where=path)
            return place.read(fd, path)

    return Piece(record, digest, place, read)
