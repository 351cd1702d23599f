"""Two jobs on one recipe, and several recipes in one job."""

import json
import os
import subprocess
import sys

from typer.testing import CliRunner

import cli
from cache.inspect import verify


def test_two_jobs_finish_with_one_complete_cache(recipe_data, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_data))
    command = [
        sys.executable, "-c", "import cli; cli.main()", "extract", str(tmp_path / "recipe.yaml"),
        "--out", str(tmp_path / "k.h5"), "--device", "cpu", "--batch-size", "1", "--json",
    ]  # fmt: skip
    env = dict(os.environ, VADEMECUM_HOME=str(tmp_path / "home"), OMP_NUM_THREADS="1")
    jobs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        for _ in range(2)
    ]
    said = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], [err.decode()[-800:] for _, err in said]
    made = {json.loads(out)["content_id"] for out, _ in said}
    assert made == {verify(tmp_path / "k.h5").content_id}
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"recipe.yaml", "k.h5", "k.h5.run.json", "home"}


def test_several_recipes_on_the_command_line(recipe_data, tmp_path):
    for name, classes in (("one", recipe_data["classes"][:1]), ("two", recipe_data["classes"])):
        data = {**recipe_data, "classes": classes}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(data))
    files = [str(tmp_path / f"{name}.yaml") for name in ("one", "two")]
    result = CliRunner().invoke(
        cli.app, ["extract", *files, "--out", str(tmp_path / "all"), "--device", "cpu", "--json"]
    )
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    for name, row in zip(("one", "two"), made, strict=True):
        assert verify(tmp_path / "all" / f"{name}.h5").content_id == row["content_id"]
