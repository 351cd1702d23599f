"""`cache` and `cli` are common names: the command refuses to run when another package wins."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).parent / "vademecum"


def _run(folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [str(COMMAND), "--help"], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_a_data_folder_called_cache_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    assert _run(tmp_path).returncode == 0


def test_another_cache_on_the_path_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "cache"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('imported a stranger')\n")
    result = _run(tmp_path, other.parent)
    assert result.returncode == 7
    assert "another package stands in the way: cache: found" in result.stderr
    assert "Remove it, or use a fresh venv." in result.stderr


def test_nobody_else_ships_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in ("cache", "cli", "knowledge_extract", "prompt_tune"):
        assert set(owners.get(name, [])) <= {"vademecum"}
