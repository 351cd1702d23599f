"""Makes `import torchvision` work beside a CPU build of torch.

The torchvision wheel on the package index links CUDA libraries. Beside a CPU torch its compiled
part cannot load, so the operators it declares are missing and its Python part fails at import.
Two schemas are enough for everything this project uses. Where the compiled part loads, as on
every CUDA machine, nothing is done.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_alive: list[Any] = []  # a library's declarations vanish with it


def _declare_where_needed(spec: importlib.machinery.ModuleSpec) -> None:
    torch: Any = importlib.import_module("torch")
    for folder in spec.submodule_search_locations or ():
        for library in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                continue
            return
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    _alive.append(fragment)
    for operator in ("nms", "qnms"):
        fragment.define(_SCHEMA.format(operator))


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Steps in once, at the first import of torchvision, whoever asks for it."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the import system calls by name
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec("torchvision")
            if spec is not None:
                _declare_where_needed(spec)
        return None


def install() -> None:
    """Registers the step; costs nothing until torchvision is imported."""
    watching = any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path)
    if "torchvision" not in sys.modules and not watching and not _alive:
        sys.meta_path.insert(0, _BeforeTorchvision())
