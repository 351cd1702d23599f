"""The contract between the stages: the sealed knowledge cache, recipes, errors, assets.

Needs neither torch nor transformers. The names below are loaded when they are first used.
"""

import importlib

DISTRIBUTION = "vademecum"

_HOME = {
    "Alignment": "cache.store",
    "Block": "cache.store",
    "BlockSpec": "cache.blocks",
    "ClassRecord": "cache.blocks",
    "Entry": "cache.blocks",
    "ExtractionHeader": "cache.extraction",
    "KnowledgeCache": "cache.store",
    "ShardFolder": "cache.folder",
    "VerifyReport": "cache.inspect",
    "entry_key": "cache.blocks",
    "seal": "cache.sealing",
    "verify": "cache.inspect",
}

__all__ = ["DISTRIBUTION", *sorted(_HOME)]  # noqa: PLE0604 - all of them are strings


def __getattr__(name: str) -> object:
    """A public name, from the module that defines it."""
    if name not in _HOME:
        what = f"module 'cache' has no attribute {name!r}"
        raise AttributeError(what)
    return getattr(importlib.import_module(_HOME[name]), name)
