"""Names to modules: one file in a folder is one entry, and nothing is imported to list them."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from cache.errors import UnknownNameError


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known name, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listing = f"Known: {', '.join(known)}."
    return f"Did you mean {near[0]!r}? {listing}" if near else listing


class Registry:
    """The modules of one package folder, each offering one object under a fixed attribute.

    Args:
        package: dotted name of the package whose modules are the entries.
        folder: the folder of that package.
        attribute: the name every module defines.
        kind: what an entry is, for messages ("tuning method").

    A module name `linear_probe` is the entry `linear-probe`.
    """

    def __init__(self, package: str, folder: Path, attribute: str, kind: str) -> None:
        self.package, self.folder, self.attribute, self.kind = package, folder, attribute, kind

    def __iter__(self) -> Iterator[str]:
        names = (m.name for m in pkgutil.iter_modules([str(self.folder)]))
        return iter(sorted(n.replace("_", "-") for n in names if not n.startswith("_")))

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def __getitem__(self, name: str) -> object:
        """The entry called `name`.

        Raises:
            UnknownNameError: no module of that name.
        """
        if name not in self:
            what = f"unknown {self.kind} {name!r}"
            raise UnknownNameError(what, do=suggest(name, self))
        module = importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
        entry: object = getattr(module, self.attribute)
        return entry
