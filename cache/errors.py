"""Every error a user can cause, in one tree.

    VademecumError                 exit 2
    ├── RecipeError                2   a recipe, an override or a command-line value is wrong
    │   └── UnknownNameError       2   a name that is in no registry
    ├── CacheError                 3
    │   ├── CacheFormatError       3   not a sealed cache, or damaged
    │   ├── CacheMismatchError     3   another recipe, another content id
    │   ├── MissingKnowledgeError  3   a class, block, layer or item the cache does not hold
    │   └── ValueRefusedError      3   non-finite or out of range for its type
    ├── DataError                  4   images, labels, splits
    ├── ModelError                 5   a model that is absent, gated or does not fit
    │   └── PromptOverflowError    5   a prompt longer than the text tower's context
    ├── RunError                   6   a run folder that is damaged or belongs to another recipe
    └── SystemRefusedError         7
        ├── MissingExtraError      7   an optional dependency is not installed
        └── StorageError           7   no space, no permission, not a folder

A message is one line: what is wrong, where, what was found, what was wanted, what to do.
"""

from typing import ClassVar


class VademecumError(Exception):
    """One clear line for the user; `exit_code` is what the command line returns.

    Args:
        what: what is wrong, a short clause.
        where: the file, dotted key, class or image it is about.
        found: what was there.
        wanted: what would have been right.
        do: what the user can do about it, a full sentence.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        wanted: object = None,
        do: str | None = None,
    ) -> None:
        message = what if where is None else f"{where}: {what}"
        details = [
            f"{label} {value}"
            for label, value in (("found", found), ("wanted", wanted))
            if value is not None
        ]
        if details:
            message += "; " + ", ".join(details)
        if do is not None:
            message += ". " + do
        super().__init__(" ".join(message.split()))


class RecipeError(VademecumError):
    """A recipe, an override or a command-line value is wrong."""


class UnknownNameError(RecipeError):
    """A name that is in no registry."""


class CacheError(VademecumError):
    """Something about a knowledge cache."""

    exit_code = 3


class CacheFormatError(CacheError):
    """The file is not a sealed cache, or it is damaged."""


class CacheMismatchError(CacheError):
    """The file is sound but not the one that was asked for."""


class MissingKnowledgeError(CacheError):
    """A class, block, layer or item that the cache does not hold."""


class ValueRefusedError(CacheError):
    """A value that must not be stored: non-finite, or too large for its type."""


class DataError(VademecumError):
    """Images, labels or splits are not usable."""

    exit_code = 4


class ModelError(VademecumError):
    """A language model or backbone is absent, gated, or does not fit the request."""

    exit_code = 5


class PromptOverflowError(ModelError):
    """A prompt is longer than the context of its text tower."""


class RunError(VademecumError):
    """A run folder is damaged, unfinished, or belongs to another recipe."""

    exit_code = 6


class SystemRefusedError(VademecumError):
    """The machine cannot do what was asked."""

    exit_code = 7


class MissingExtraError(SystemRefusedError):
    """An optional dependency is not installed."""


class StorageError(SystemRefusedError):
    """No space, no permission, or not a folder."""
