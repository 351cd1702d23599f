"""Small caches for these tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def make() -> ModuleType:
    """Builders of small headers, entries and caches."""
    spec = importlib.util.spec_from_file_location("make", Path(__file__).with_name("make.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sealed_bytes(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small cache with every kind of block."""
    path = tmp_path_factory.mktemp("sealed") / "k.h5"
    make.cache_at(path)
    return path.read_bytes()


@pytest.fixture
def sealed(sealed_bytes: bytes, tmp_path: Path) -> Path:
    """A small cache with every kind of block."""
    path = tmp_path / "k.h5"
    path.write_bytes(sealed_bytes)
    return path
