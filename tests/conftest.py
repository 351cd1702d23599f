"""Shared by all tests."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from cache.torchvision_schemas import install

install()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

ROOT = Path(__file__).resolve().parent.parent


def load_module(path: Path) -> ModuleType:
    """A test helper module by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Research notes and golden tensors that lie beside the checkout on some machines."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder with golden tensors beside the checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """Builders of tiny random models."""
    return load_module(ROOT / "tests" / "tiny_models.py")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """Builders of a toy problem."""
    return load_module(ROOT / "tests" / "toy.py")


@pytest.fixture(scope="session")
def load() -> Callable[[Path], ModuleType]:
    """Loads a test helper module by its path."""
    return load_module
