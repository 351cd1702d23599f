"""What a user sees when something is wrong: one line and an exit code, nothing half-written."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import cli

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
    _refused(result, 7, "the file would be larger than allowed here")
    assert not list((tmp_path / "run").glob("*.safetensors"))
    again = _run(*arguments, home=tmp_path / "home")
    assert again.returncode == 0, again.stderr


ABSENT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # looks like a package that is not installed
import cli
cli.main()
"""


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("torch", ["tune", "coop", "--data", "x", "--out", "r"], "tune"),
        ("open_clip", ["eval", "run"], "tune"),
        ("onnx", ["align", "clip-minilm", "--data", "bloodmnist", "--out", "b"], "tune"),
        ("transformers", ["extract", "bloodmnist-demo", "--out", "c.h5"], "extract"),
    ],
)
def test_an_absent_extra_is_one_line(
    tmp_path: Path, package: str, command: list[str], extra: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", ABSENT, package, *command],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=dict(os.environ, VADEMECUM_HOME=str(tmp_path / "home")),
    )  # fmt: skip
    _refused(
        result, 7, f"needs the package '{package}', which is not installed. Install it with: "
        f"pip install -c constraints.txt -e '.[{extra}]' in the checkout.",
    )  # fmt: skip


def test_an_import_that_fails_inside_the_project_is_not_taken_for_an_absent_extra(
    tmp_path: Path,
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", ABSENT, "prompt_tune.tuning", "tune", "coop", "--data", "x",
         "--out", "r"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "ModuleNotFoundError" in result.stderr


def test_the_version_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    found = CliRunner().invoke(cli.app, ["--version"])
    number = importlib.metadata.version("vademecum")
    assert (found.exit_code, found.stdout) == (0, f"vademecum {number}\n")
    monkeypatch.setattr(importlib.metadata, "version", absent)
    found = CliRunner().invoke(cli.app, ["--version"])
    assert (found.exit_code, found.stdout) == (0, "vademecum (not installed)\n")


def test_assets_verify_fails_where_one_is_not_there(tmp_path: Path) -> None:
    result = _run("assets", "verify", "minilm-l6-v2", home=tmp_path / "home")
    assert result.returncode == 3
    assert "absent" in result.stdout


UNREACHABLE = """
import pathlib, sys, time
OUT = pathlib.Path("k.h5")
time.sleep = lambda seconds: None  # between the client's attempts
import huggingface_hub
from cache.errors import VademecumError
huggingface_hub.logging.set_verbosity_warning()
NONE = dict(one_of=["b", "c"], others=["d", "e"])
try:
    {call}
except VademecumError as error:
    print(error, file=sys.stderr)
assert huggingface_hub.logging.get_verbosity() == huggingface_hub.logging.WARNING
"""


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (
            "from knowledge_extract.source import from_hub; from_hub('a/b', 'main', offline=False)",
            ["a/b: revision 'main' is not on this machine", "HF_HUB_OFFLINE=1"],
        ),
        (
            "import prompt_tune.hub_files as h; h.hub_folder('a/b', None, first='a.json', **NONE)",
            ["a/b: the hub model has no a.json here", "HF_HUB_OFFLINE=1"],
        ),
        (
            "from cache.sharing.remote import pull; pull('hf://a/b/k.h5', OUT)",
            ["hf://a/b/k.h5: the connection failed"],
        ),
        (
            "from knowledge_extract.source import _fetch_weights; _fetch_weights('a/b', 40 * 'c')",
            [],
        ),
    ],
    ids=["extract", "tune", "pull", "weights that may be here"],
)
def test_a_hub_that_is_not_reached_is_one_line(tmp_path: Path, call: str, parts: list[str]) -> None:
    env = dict(os.environ, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    env.pop("HF_HUB_OFFLINE", None)
    result = subprocess.run(
        [sys.executable, "-c", UNREACHABLE.format(call=call)],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == bool(parts), result.stderr
    for part in parts:
        assert part in result.stderr


def test_a_hub_that_is_away_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from prompt_tune.hub_files import hub_folder

    asked = []

    def download(_repo: str, name: str, *, local_files_only: bool, **_: object) -> str:
        asked.append((name, local_files_only))
        if name in {"config", "weights"}:
            return str(tmp_path / name)
        raise huggingface_hub.errors.LocalEntryNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = hub_folder("a/b", None, first="config", one_of=["weights"], others=["x", "y", "z"])
    assert found == tmp_path
    waited = {"config": False, "weights": False, "x": False, "y": True, "z": True}
    assert dict(asked) == waited


def test_no_room_for_a_hub_model_is_not_called_offline() -> None:
    import errno

    from cache.errors import ModelError, StorageError
    from prompt_tune.hub_files import hub_errors

    wrapped = ConnectionError("the client wraps it")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(StorageError, match=r"org/name: no space left. Free"),
        hub_errors("org/name"),
    ):
        raise wrapped
    with pytest.raises(ModelError, match="cannot be fetched"), hub_errors("org/name"):
        raise OSError(errno.ECONNREFUSED, "refused")
