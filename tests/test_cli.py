"""What a user sees when something is wrong: one line and an exit code, nothing half-written."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

COMMAND = Path(sys.executable).parent / "vademecum"


def _run(*arguments: object, home: Path, shell_limit: str = "") -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, VADEMECUM_HOME=str(home), HF_HUB_OFFLINE="1")
    words = [str(COMMAND), *map(str, arguments)]
    if shell_limit:
        words = ["bash", "-c", f'{shell_limit}; exec "$@"', "bash", *words]
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False)


def _refused(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == code, result.stderr
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[0]


EXTRACT = """
dataset: toy
model: {folder: FOLDER}
templates: {question: "What is {name}?"}
classes: [{id: a, name: a}]
blocks:
  answers: {kind: answers, max_new_tokens: 2}
"""


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["tune", "cilm", "--data", "x", "--out", "r"], 2, ["cilm", "Did you mean 'cilmp'"]),
        (["extract", "nothing.yaml", "--out", "c.h5"], 2, ["nothing.yaml"]),
        (["cache", "verify", "absent.h5"], 3, ["absent.h5"]),
        (["cache", "inspect", "text.h5"], 3, ["text.h5", "not a knowledge cache"]),
        (["assets", "fetch", "minilm"], 2, ["unknown asset 'minilm'", "minilm-l6-v2"]),
        (["eval", "nowhere"], 6, ["nowhere", "not a run folder"]),
        (["report", "nowhere", "--split", "test"], 6, ["not a run folder"]),
        (["extract", "absent-model.yaml", "--out", "c.h5"], 5, ["no-such-folder"]),
        (["extract", "unknown-key.yaml", "--out", "c.h5"], 2, ["datasett", "'dataset'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int,
    parts: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("text.h5").write_text("not hdf5 at all\n" * 1000)
    Path("absent-model.yaml").write_text(EXTRACT.replace("FOLDER", "no-such-folder"))
    Path("unknown-key.yaml").write_text(EXTRACT.replace("dataset:", "datasett:"))
    _refused(_run(*arguments, home=tmp_path / "home"), code, *parts)
    assert not list(tmp_path.glob("*c.h5*"))


def test_a_truncated_cache_is_refused_by_tune(
    tmp_path: Path, toy: ModuleType, tiny_models: ModuleType
) -> None:
    toy.cache(tmp_path / "toy.h5")
    whole = (tmp_path / "toy.h5").read_bytes()
    (tmp_path / "toy.h5").write_bytes(whole[:-1])
    folder = tiny_models.tiny_assembled(tmp_path / "backbone")
    result = _run(
        "tune", "demo-cilmp", "--data", toy.images(tmp_path / "images"),
        "--knowledge", tmp_path / "toy.h5", "--out", tmp_path / "run",
        "--set", f"backbone.folder={folder}", "--set", "samples.shots=2",
        home=tmp_path / "home",
    )  # fmt: skip
    _refused(result, 3, "toy.h5")
    assert not (tmp_path / "run" / "run.json").exists()


def test_no_room_for_the_weights_leaves_no_half_file(
    tmp_path: Path, toy: ModuleType, tiny_models: ModuleType
) -> None:
    """A file-size limit of 8 KiB stands for a full disk or a quota."""
    folder = tiny_models.tiny_assembled(tmp_path / "backbone")
    arguments = [
        "tune", "demo-coop", "--data", toy.images(tmp_path / "images"),
        "--out", tmp_path / "run", "--set", f"backbone.folder={folder}",
        "--set", "samples.shots=2", "--set", "train.epochs=1", "--set", "method.n_context=64",
        "--set", "method.context=null",
    ]  # fmt: skip
    result = _run(*arguments, home=tmp_path / "home", shell_limit="ulimit -f 8")
    _refused(result, 7)
    assert not list((tmp_path / "run").glob("*.safetensors"))
    again = _run(*arguments, home=tmp_path / "home")
    assert again.returncode == 0, again.stderr
