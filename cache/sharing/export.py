"""A cache as safetensors, for programs that read nothing else."""

import importlib
import json
from pathlib import Path
from typing import Any

from cache.durable import make_folder, refuse_source_folder, storage_errors, write_atomic
from cache.errors import CacheMismatchError, MissingExtraError
from cache.inspect import verify
from cache.recipe import canonical_json
from cache.store import KnowledgeCache

INSTALL = "Install it with: pip install safetensors."


def export_safetensors(file: Path, out: Path) -> Path:
    """Writes every dataset of a cache as a tensor of the same name and returns `out`.

    Names, types and shapes are those of FORMAT.md, section 3: `BLOCK__values` with
    `BLOCK__offsets`, `BLOCK__class`, `BLOCK__item`; texts as UTF-8 bytes with their offsets. The
    metadata holds `vademecum_content_id`, `vademecum_dataset` and `vademecum_blocks` (canonical
    JSON: kind, layers, width, dtype, specification and id of every block). The same cache gives
    the same bytes. The cache is verified in full first; the file is built in memory.

    Raises:
        CacheFormatError: the cache is missing, foreign or damaged.
        CacheMismatchError: `out` exists.
        MissingExtraError: the package safetensors is not installed.
        StorageError: no space, no permission.
    """
    try:
        library = importlib.import_module("safetensors.numpy")
    except ImportError as error:
        what = "exporting needs the package 'safetensors', which is not installed"
        raise MissingExtraError(what, do=INSTALL) from error
    identity = verify(file).content_id
    with KnowledgeCache.open(file, expect=identity) as found:
        sealed = found.sealed
        tensors = {name: sealed.array(name) for name in sorted(sealed.header.extents)}
        metadata = {
            "vademecum_blocks": canonical_json(sealed.header.content["blocks"]).decode("ascii"),
            "vademecum_content_id": found.content_id,
            "vademecum_dataset": found.dataset,
        }
        refuse_source_folder(out)
        with storage_errors(out.parent):
            make_folder(out.parent)
        if not write_atomic(out, _in_order(library.save(tensors, metadata)), replace=False):
            what = "this file exists"
            raise CacheMismatchError(what, where=out, do="Choose another name.")
    return out


def _in_order(raw: bytes) -> bytes:
    """The same file with its header sorted: the library writes metadata in a random order."""
    length = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    sorted_header = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return raw[:8] + sorted_header.encode("utf-8").ljust(length) + raw[8 + length :]
