"""A toy problem that a module tunes on."""

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def problem(
    tmp_path_factory: pytest.TempPathFactory, toy: ModuleType, tiny_models: ModuleType
) -> Iterator[SimpleNamespace]:
    """Images, a sealed cache and a tiny backbone, in a home of the module's own."""
    folder = tmp_path_factory.mktemp("problem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VADEMECUM_HOME", str(folder / "home"))
        yield SimpleNamespace(
            folder=folder,
            content=toy.cache(folder / "toy.h5"),
            data=str(toy.images(folder / "images")),
            knowledge=folder / "toy.h5",
            backbone=tiny_models.tiny_assembled(folder / "backbone"),
            classes=toy.CLASSES,
        )
