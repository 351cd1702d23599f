"""The lists of the demo: every line parses, every recipe validates, the prediction is printed."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import cli
from cache.errors import StorageError
from knowledge_extract import load_extract_recipe
from prompt_tune import demo
from prompt_tune.align_run import load_align_recipe
from prompt_tune.demo import Command, Step, commands, describe_prediction, predicted_seconds
from prompt_tune.recipe import load_tune_recipe

LOADERS = {
    "tune": load_tune_recipe, "align": load_align_recipe, "extract": load_extract_recipe,
}  # fmt: skip


def parsed(arguments: list[str]) -> dict[str, object]:
    """The values a command line gives, by the parser that the program uses; nothing is run."""

    def only_parse(command: Any) -> Any:
        for below in getattr(command, "commands", {}).values():
            below.callback = lambda **values: values
            only_parse(below)
        return command

    program = only_parse(typer.main.get_command(cli.app))
    return program.main(list(arguments), standalone_mode=False)


def options(command: Command, name: str) -> tuple[str, ...]:
    words = command.arguments
    return tuple(after for word, after in itertools.pairwise(words) if word == name)


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
@pytest.mark.parametrize("name", ["plain", "with spaces, a: colon and #"])
def test_every_line_parses_and_every_recipe_validates(
    tmp_path: Path, full: bool, name: str
) -> None:
    out = tmp_path / name
    steps = commands(out, full=full)
    assert out.is_dir()
    for step in steps:
        assert shlex.split(step.line) == step.arguments
        values = parsed(step.arguments)
        if (load := LOADERS.get(step.arguments[0])) is not None:
            recipe = load(step.arguments[1], options(step, "--set"))
            assert values["out"].parent == out
        if step.arguments[0] == "tune":
            assert recipe.backbone.aligned == str(out / "backbone")
            assert recipe.backbone.hub is None
    made = {w for s in steps if s.arguments[0] == "tune" for w in options(s, "--out")}
    seen = {s.arguments[1] for s in steps if s.arguments[0] == "eval"}
    compared = steps[-1].arguments
    reported = set(compared[1 : compared.index("--split")])
    assert reported == seen
    assert made - seen <= {str(out / "cilmp-visual-smoke")}


def test_the_full_list_has_controls_and_an_ensemble_as_the_short_one_has(tmp_path: Path) -> None:
    def reported(full: bool) -> list[str]:
        words = commands(tmp_path, full=full)[-1].arguments
        return words[: words.index("--split")]

    assert reported(full=True) == reported(full=False)
    images = {s.arguments[-1]: s.step.trains for s in commands(tmp_path, full=True)}
    assert set(images.values()) == {0, 100 * (11959 // 64) * 64}
    scales = {
        load_tune_recipe(s.arguments[1], options(s, "--set")).knowledge.scale
        for s in commands(tmp_path, full=True)
        if s.arguments[0] == "tune" and s.arguments[1] == "cilmp-published"
    }
    assert scales == {"raw", "unit"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file: is a file; wanted a folder"):
        commands(tmp_path / "file")
    with pytest.raises(StorageError, match=r"below: a part of the path is not a folder"):
        commands(tmp_path / "file" / "below")


def test_the_prediction_is_positive_grows_and_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([0.4, 1.2, 0.4, 1.2])  # of a batch of four
    monkeypatch.setattr(demo, "_seconds", lambda work, device: next(speeds))
    step = Step(run="eval x", encodes=10, trains=20)
    command = Command("eval x", ["eval", "x"], step)
    assert predicted_seconds([command], device="cpu") == pytest.approx(10 * 0.1 + 20 * 0.3)
    (tmp_path / "full.yaml").write_text('- {run: "assets list", encodes: 360000}\n')
    monkeypatch.setattr(demo, "LISTS", tmp_path)
    monkeypatch.setattr("prompt_tune.setup.pick_device", lambda device: "cpu")
    shown = CliRunner().invoke(cli.app, ["demo", "--full", "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "predicted: 10.0 hours of image encoding and training" in shown.stdout


INTERRUPTED = """
import signal, sys, time
from pathlib import Path
import cli
from prompt_tune import demo

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
demo.LISTS = Path(sys.argv.pop(1))

@cli.app.command()
def wait():
    print("waiting", flush=True)
    time.sleep(60)

cli.main()
"""


def test_an_interrupt_in_a_step_ends_the_demo(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("- assets list\n- wait\n- assets list --json\n")
    words = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    job = subprocess.Popen(
        [*words, "demo", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, VADEMECUM_HOME=str(tmp_path / "home")),
    )  # fmt: skip
    assert job.stdout is not None
    while (line := job.stdout.readline()) != "waiting\n":
        assert line, "it ended before the second step"
    job.send_signal(signal.SIGINT)
    try:
        out, error = job.communicate(timeout=30)
    finally:
        job.kill()
    assert (job.returncode, out) == (130, "")
    assert error == "The same command goes on where this one stopped.\n"


def test_the_speed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(run="eval x", encodes=1)
    assert predicted_seconds([Command("eval x", ["eval", "x"], step)], device="cpu") > 0
    assert describe_prediction(3 * 24 * 3600).startswith("predicted: 3 days of image")


def test_what_is_finished_is_left_out(tmp_path: Path) -> None:
    def command(name: str) -> Command:
        words = ["tune", "coop", "--out", str(tmp_path / name)]
        return Command(shlex.join(words), words, Step(run="x", trains=1))

    fields = {"format": 1, "digest": "d", "recipe": {}, "bindings": {}, "local": {"data": "x"}}
    for name, status in (("finished", "finished"), ("running", "running")):
        (tmp_path / name).mkdir()
        run = fields | {"status": status, "parameters": {}, "training": {}}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    assert [command(n).done for n in ("finished", "running", "absent")] == [True, False, False]
    assert predicted_seconds([command("finished")]) == 0.0
    (tmp_path / "backbone").mkdir()
    align = ["align", "x", "--out", str(tmp_path / "backbone")]
    assert not Command("", align, Step(run="x")).done
    (tmp_path / "backbone" / "alignment.json").write_text("{}")
    assert Command("", align, Step(run="x")).done
