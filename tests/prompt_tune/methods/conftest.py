"""Tiny backbones in float64, and plain prompted towers, for the parity tests of methods."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone


@pytest.fixture(scope="session", params=["clip", "biomedclip"])
def double_backbone(
    request: pytest.FixtureRequest, tiny_models: ModuleType, tmp_path_factory: Any
) -> Backbone:
    """A tiny backbone whose weights are float64."""
    folder: Path = getattr(tiny_models, f"tiny_{request.param}")(
        tmp_path_factory.mktemp(request.param)
    )
    backbone = load_backbone(BackboneSpec(folder=str(folder)))
    backbone.model.double()
    return backbone


@pytest.fixture(scope="session")
def towers(root: Path, load: Callable[[Path], ModuleType]) -> ModuleType:
    """Prompted towers by open_clip's own forward."""
    return load(root / "tests" / "oracle" / "prompted_towers.py")
