"""`vademecum list`: every method, recipe and data set by name, without loading any."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import cli
from cache.errors import UnknownNameError
from knowledge_extract.presets import FOLDER, preset_names
from prompt_tune.data import presets
from prompt_tune.data.source import preset
from prompt_tune.listing import listing
from prompt_tune.methods import METHODS
from prompt_tune.recipe import PRESETS


def test_everything_is_listed_with_a_line() -> None:
    found = listing(others={"extraction": FOLDER})
    names = {kind: [row["name"] for row in rows] for kind, rows in found.items()}
    assert names == {
        "methods": list(METHODS),
        "recipes": sorted(path.stem for path in PRESETS.glob("*.yaml")),
        "alignment": ["clip-minilm"],
        "extraction": preset_names(),
        "data": list(presets()),
    }
    for rows in found.values():
        for row in rows:
            assert row["about"] and "\n" not in row["about"], row
    for row in found["data"]:
        facts = preset(row["name"])
        assert (row["classes"], row["modality"]) == (len(facts.classes), facts.modality)
    (about,) = (row["about"] for row in found["extraction"] if row["name"] == "bloodmnist-texts")
    assert about.endswith("values of 4 attributes per class.")  # a sentence over three lines


def test_the_command_prints_a_kind_or_all() -> None:
    text = CliRunner().invoke(cli.app, ["list"]).stdout
    assert "  coop " in text and "8 classes, blood-cell microscopy" in text
    assert "vademecum tune cilmp --knowledge FILE" in text and "bloodmnist-demo" in text
    found = json.loads(CliRunner().invoke(cli.app, ["list", "methods", "--json"]).stdout)
    assert list(found) == ["methods"]
    with pytest.raises(UnknownNameError, match=r"unknown kind 'method'. Did you mean 'methods'"):
        listing("method")


def test_nothing_heavy_is_loaded() -> None:
    code = (
        "import sys, cli\n"
        "cli.app(['list'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'open_clip'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
