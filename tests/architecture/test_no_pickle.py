"""No pickle anywhere: the linter refuses the ways in, and this the two it cannot see."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("cache", "knowledge_extract", "prompt_tune", "bench", "docs")
UNSAFE = re.compile(r"allow_pickle\s*=\s*True|weights_only\s*=\s*False")


def test_no_argument_turns_unpickling_on(root: Path) -> None:
    files = [root / "cli.py", *(f for p in PACKAGES for f in (root / p).rglob("*.py"))]
    assert len(files) > 100
    assert not [f for f in files if UNSAFE.search(f.read_text("utf-8"))]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import dill", "import shelve",
        "import marshal", "import torch\n\ntorch.load('x')", "import h5py\n\nh5py.File('x')",
        "import pandas as pd\n\npd.read_pickle('x')",
    ],
)  # fmt: skip
def test_the_linter_refuses_it(root: Path, line: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename",
         str(root / "cache" / "new.py"), "-"],
        input=f'"""New."""\n\n{line}\n', capture_output=True, text=True, cwd=root, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    assert "TID251" in result.stdout
