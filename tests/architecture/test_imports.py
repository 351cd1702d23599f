"""Imports go one way, and the check that says so fails when they do not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LINT = Path(sys.executable).parent / "lint-imports"


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LINT), "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    for package in ("cache", "knowledge_extract", "prompt_tune"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / package, tmp_path / package, ignore=ignore)
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_tree_keeps_every_contract(copy: Path) -> None:
    result = _lint(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("cache", "import torch"),
        ("cache", "import transformers"),
        ("cache", "import prompt_tune"),
        ("prompt_tune", "import knowledge_extract"),
        ("knowledge_extract", "import prompt_tune"),
        ("prompt_tune", "import accelerate"),
        ("prompt_tune", "import bitsandbytes"),
        ("knowledge_extract", "import open_clip"),
    ],
)
def test_a_wrong_import_breaks_a_contract(copy: Path, package: str, line: str) -> None:
    (copy / package / "wrong.py").write_text(f'"""Wrong."""\n\n{line}\n')
    result = _lint(copy)
    assert result.returncode != 0
    assert "BROKEN" in result.stdout


def test_help_imports_no_stage() -> None:
    code = (
        "import sys, cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'h5py', 'datasets', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
