"""Hidden states in a foreign HDF5 file, one dataset per class, into a sealed cache."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import Any

from cache.blocks import ClassRecord
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
from cache.recipe import digest_of

RANKS = {"states": (2, 3), "embeddings": (2,)}


def import_hdf5(
    file: Path,
    out: Path,
    labels: Labels,
    *,
    classes: Mapping[str, str] | None = None,
    replace: bool = False,
) -> ImportReport:
    """Makes a sealed cache of a foreign HDF5 file with one dataset of floats per class.

    The name of a dataset is the name of its class; it may stand in one level of groups. States are
    `[layers, width]` or `[rows, layers, width]`, embeddings `[rows, width]`. The HDF5 library sees
    the file in a child process with limits only, and only to say where the values lie; anything but
    such datasets (links, filters, chunks, other types) is refused.

    Args:
        file: the foreign file.
        out: the sealed cache to make.
        labels: what the file does not say.
        classes: name by class id; a dataset is called by one of the two. Other datasets must be
            sound too, but are not used.
        replace: exchange another cache that has the name `out`.

    Raises:
        CacheError: something in the file that is not allowed; what and where.
        MissingKnowledgeError: a class of `classes` without a dataset.
        StorageError: the operating system refused something.
    """
    if labels.kind not in RANKS:
        what = "only states and embeddings are imported"
        raise ValueRefusedError(what, where="kind", found=repr(labels.kind)[:80])
    with foreign_file(file) as fd:
        digest, size = file_digest(fd), os.fstat(fd).st_size
        places = _places(run_limited("hdf5", file, fd), size, file)
        pieces = []
        for name, record in _named(file, list(places), classes, labels.modality):
            _check_rank(file, name, places[name], labels.kind)
            source = digest_of({"file": digest, "name": name})
            read = partial(places[name].read, fd, file)
            pieces.append((name, Piece(record, source, places[name], read)))
        recipe = {"imported": {"from": "hdf5", "files": {file.name: digest}}}
        report = seal_import([p for _, p in pieces], out, labels, recipe, replace=replace)
    return changed(report, ignored=tuple(sorted(set(places) - {name for name, _ in pieces})))


def _places(said: Any, size: int, file: Path) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for one in said if type(said) is list else [{}]:
        if type(one) is not dict or set(one) != {"name", "place"} or type(one["name"]) is not str:
            what = "reading it gave no sound answer"
            raise CacheFormatError(what, where=file)
        name = one["name"]
        if name in places:
            what = f"two groups hold a dataset {name!a}"
            raise CacheFormatError(what, where=file)
        places[name] = Place.checked(one["place"], size, file)
    return places


def _named(
    file: Path, names: list[str], classes: Mapping[str, str] | None, modality: str
) -> Iterator[tuple[str, ClassRecord]]:
    """Each dataset that is used, and its class."""
    if classes is None:
        for name in names:
            if not slug(name):
                what, do = "no class id can be made of the name", "Give a table of classes."
                raise ValueRefusedError(what, where=file, found=ascii(name), do=do)
            yield name, ClassRecord(slug(name), name, modality)
        return
    for class_id, name in classes.items():
        own = [n for n in names if n in {class_id, name}]
        if len(own) != 1:
            what = f"the class {class_id!r} ({name}) has {len(own) or 'no'} datasets"
            raise MissingKnowledgeError(what, where=file, found=", ".join(map(ascii, names[:20])))
        yield own[0], ClassRecord(class_id, name, modality)


def _check_rank(file: Path, name: str, place: Place, kind: str) -> None:
    if len(place.shape) not in RANKS[kind]:
        wanted = "[rows, width]" if kind == "embeddings" else "[layers, width], rows before it"
        what = f"{name!a} is no array of {kind}"
        raise CacheFormatError(what, where=file, found=list(place.shape), wanted=wanted)
