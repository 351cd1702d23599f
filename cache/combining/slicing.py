"""Slicing: some classes of a sealed cache as a cache of their own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.combining.gathering import OpenBlock, gathered
from cache.combining.joining import as_one, classes_of, recipes_of, with_classes
from cache.errors import MissingKnowledgeError
from cache.extraction import ExtractionHeader
from cache.inspect import verify
from cache.publishing import check_target, write_sealed
from cache.store import KnowledgeCache


def slice_classes(file: Path, classes: Sequence[str], out: Path, *, replace: bool = False) -> str:
    """Makes a cache with some classes of another, and returns its content id.

    The class table, every block and the list of classes in the recipe hold only these classes.
    Merging slices that cover a cache gives its bytes back, if its recipe lists the classes sorted
    by id, as extraction writes it.

    Args:
        file: the cache; verified in full before it is used.
        classes: ids, in any order.
        out: the file to make.
        replace: exchange a cache of another content called `out`; its readers keep the old.

    Raises:
        MissingKnowledgeError: a class the cache does not hold, or no class at all.
        CacheFormatError: `file` is missing, foreign or damaged.
        CacheMismatchError: `out` is something else.
        StorageError: no space, no permission.
    """
    check_target(out)
    identity = verify(file).content_id
    with KnowledgeCache.open(file, expect=identity) as opened:
        if not classes:
            what, do = "no class was named", "Name at least one."
            raise MissingKnowledgeError(what, where=file, do=do)
        records = tuple(opened.classes[opened.position(name)] for name in sorted(set(classes)))
        wanted = {record.id for record in records}
        header = ExtractionHeader(
            opened.dataset,
            records,
            opened.sealed.header.specs,
            as_one(_restricted(recipe, wanted) for recipe in recipes_of(opened.recipe)),
            opened.provenance,
        )
        sources = header.sources()
        for name, spec in header.blocks.items():
            rows = [row for row in OpenBlock(opened, name).rows() if row.class_id in wanted]
            sources |= gathered(name, spec, rows, header.class_index)
        return write_sealed(header.content("knowledge"), sources, out, replace=replace)


def _restricted(recipe: Mapping[str, Any], wanted: set[str]) -> Mapping[str, Any]:
    listed = classes_of(recipe)
    if listed is None:
        return recipe
    return with_classes(recipe, {name: one for name, one in listed.items() if name in wanted})
