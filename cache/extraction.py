"""What all shards of one extraction have in common, and how it is stored."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from cache.blocks import BlockSpec, ClassRecord
from cache.combining.joining import recipes_of
from cache.errors import CacheFormatError, ValueRefusedError
from cache.header import FORMAT, check_block_name
from cache.packing import Source
from cache.plain import TEXT_FIELDS, is_token, redact, refuse_depth, refuse_places, strict_json
from cache.recipe import canonical_json
from cache.sealed import SealedFile
from cache.tables import bytes_source, class_sources, read_classes


@dataclass(frozen=True)
class ExtractionHeader:
    """What every shard of one extraction has in common.

    Args:
        dataset: id of the data set the classes belong to.
        classes: in any order; they are stored sorted by id.
        blocks: specifications by block name.
        recipe: resolved and free of paths; texts may stand under `classes` and `templates`.
        provenance: texts that are the same whenever the same recipe is run with the same program.

    Raises:
        ValueRefusedError: a field that may not go into a cache; the message says where.
    """

    dataset: str
    classes: tuple[ClassRecord, ...]
    blocks: Mapping[str, BlockSpec]
    recipe: Mapping[str, Any]
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        if not is_token(str(self.dataset)):
            what = "not an id for a data set"
            raise ValueRefusedError(what, where="dataset", found=repr(self.dataset)[:80])
        refuse_places(self.dataset, "dataset")
        ids = [record.id for record in self.classes]
        twice = next((i for i, n in Counter(ids).items() if n > 1), None)
        if twice is not None or not ids:
            what = "a class stands twice" if ids else "an extraction needs classes"
            raise ValueRefusedError(what, where="classes", found=twice)
        if not self.blocks:
            what = "an extraction needs blocks"
            raise ValueRefusedError(what, where="blocks")
        for name in self.blocks:
            check_block_name(name)
        try:
            refuse_depth(self.recipe)
        except ValueError as error:
            raise ValueRefusedError(str(error), where="recipe") from error
        for part in recipes_of(self.recipe):
            refuse_places({k: v for k, v in part.items() if k not in TEXT_FIELDS}, "recipe")
        for key, text in self.provenance.items():
            if {type(text), type(key)} != {str}:
                what = "provenance is a table of texts"
                raise ValueRefusedError(what, where=f"provenance.{key}", found=repr(text)[:80])
        refuse_places(self.provenance, "provenance")
        object.__setattr__(self, "classes", tuple(sorted(self.classes, key=lambda r: r.id)))

    @cached_property
    def class_index(self) -> dict[str, int]:
        """Position of each class id in the sorted class table."""
        return {record.id: index for index, record in enumerate(self.classes)}

    def plain(self) -> dict[str, Any]:
        """Everything as plain data, as it is compared when an extraction goes on."""
        data = {
            "blocks": {name: spec.plain() for name, spec in self.blocks.items()},
            "classes": {record.id: asdict(record) for record in self.classes},
            "dataset": self.dataset,
            "provenance": self.provenance,
            "recipe": self.recipe,
        }
        plain: dict[str, Any] = json.loads(canonical_json(data))
        return plain

    def content(self, kind: str) -> dict[str, Any]:
        """The part of a file's header that comes from here."""
        plain = self.plain()
        recipe = redact(plain["recipe"])
        same = {"blocks": plain["blocks"], "dataset": self.dataset, "recipe": recipe}
        return {**same, "format": FORMAT, "kind": kind}

    def sources(self) -> dict[str, Source]:
        """The datasets that hold its texts."""
        return {
            **class_sources(self.classes),
            "recipe": bytes_source(canonical_json(self.recipe)),
            "provenance": bytes_source(canonical_json(self.provenance)),
        }


def stored_plain(sealed: SealedFile) -> dict[str, Any]:
    """An extraction header as it was stored; see `ExtractionHeader.plain`."""
    if sealed.header.kind != "extraction":
        what = "not the header of an extraction"
        raise CacheFormatError(what, where=sealed.path)
    try:
        recipe = strict_json(sealed.array("recipe").tobytes())
        provenance = strict_json(sealed.array("provenance").tobytes())
    except ValueError as error:
        what = "the recipe is not JSON"
        raise CacheFormatError(what, where=sealed.path) from error
    return {
        "blocks": dict(sealed.header.content["blocks"]),
        "classes": {record.id: asdict(record) for record in read_classes(sealed)},
        "dataset": sealed.header.content["dataset"],
        "provenance": provenance,
        "recipe": recipe,
    }
