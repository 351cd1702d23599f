"""What sealing, merging and slicing share: entries into datasets, datasets into a durable file."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.blocks import KINDS, BlockSpec, Value, raw_bytes
from cache.durable import (
    Draft,
    drafting,
    free_space,
    make_folder,
    refuse_source_folder,
    storage_errors,
    sweep,
    sync_file,
)
from cache.errors import CacheFormatError, CacheMismatchError, StorageError
from cache.packing import Buffer, Source, pack, packed_size
from cache.sealed import SealedFile, is_sealed
from cache.tables import block_sources

Row = tuple[int, int, bytes, bytes, bytes]  # class, item, key, digest, source digest


def entry_sources(
    name: str,
    spec: BlockSpec,
    rows: Sequence[Row],
    counts: Sequence[int],
    read: Callable[[int], Mapping[str, Value]],
) -> dict[str, Source]:
    """The datasets of one block; arrays are read one entry at a time, while they are packed.

    Args:
        name: of the block.
        spec: of the block.
        rows: in file order.
        counts: the number of array rows of each entry; empty for kinds without arrays.
        read: gives the values of the n-th entry, after checking their digest.
    """
    numbers = range(len(rows))
    if spec.dtype is None:
        found = [read(n) for n in numbers]
        columns = {
            column: [values[column] for values in found] for column in KINDS[spec.kind].columns
        }
        return block_sources(name, spec, rows, columns, {})

    def stream() -> Iterator[Buffer]:
        for n in numbers:
            values = read(n)["values"]
            assert not isinstance(values, str | int)  # noqa: S101 - arrays only, see KINDS
            yield raw_bytes(values)

    return block_sources(name, spec, rows, {}, {"values": (counts, stream())})


def check_target(target: Path) -> None:
    """Nothing, if a cache may be made at `target`.

    Raises:
        CacheMismatchError: a file that is not a cache has this name.
        StorageError: it is a folder, or lies in the program's source.
    """
    refuse_source_folder(target)
    with storage_errors(target):
        is_folder, is_there = target.is_dir(), os.path.lexists(target)
    if is_folder:
        what = "is a folder"
        raise StorageError(what, where=target, do="Name a file.")
    if is_there and not is_sealed(target):
        what, do = "this file exists and is not a knowledge cache", "Choose another name."
        raise CacheMismatchError(what, where=target, do=do)


def write_sealed(
    content: Mapping[str, Any], sources: Mapping[str, Source], target: Path, *, replace: bool
) -> str:
    """Makes a sealed file, verified and durable when this returns; its content id.

    Args:
        content: of the header, without datasets.
        sources: the datasets.
        target: the file to make, with the folders above it; one with the same content is left as
            it is.
        replace: exchange a cache of another content that has this name; its readers keep the old.

    Raises:
        CacheMismatchError: another cache has this name and may not be replaced.
        CacheFormatError: what was written does not read back.
        StorageError: no space, no permission.
    """
    with storage_errors(target.parent):
        if not target.parent.is_dir():
            make_folder(target.parent)
        sweep(target.parent)
    free_space(target.parent, packed_size(sources))
    with drafting(target.parent) as draft:
        content_id = pack(draft, content, sources)
        draft.sync()
        _publish(draft, target, content_id, replace=replace)
    return content_id


def _publish(draft: Draft, target: Path, content_id: str, *, replace: bool) -> None:
    """Verifies the packed file and gives it its name."""
    with SealedFile(draft.path) as sealed:
        sealed.verify_bytes()
        sealed.verify_structure()
        if sealed.header.content_id != content_id:
            what = "what was written does not read back"
            raise CacheFormatError(what, where=target)
    if draft.publish(target, replace=replace):
        return
    with SealedFile(target) as sealed:
        if sealed.header.content_id != content_id:
            what = "another knowledge cache has this name"
            do = "Choose another name, or pass --replace."
            found = sealed.header.content_id
            raise CacheMismatchError(what, where=target, found=found, wanted=content_id, do=do)
        sealed.verify_bytes()
        sync_file(target)  # whoever made it may not have come that far
