"""What `vademecum extract` says before and while it works."""

import json
import re

import pytest
from typer.testing import CliRunner

from cli import app
from knowledge_extract import crew

QUESTIONS = ["What is basophil?", "What is monocyte of the blood?", "What is platelet?"]
TEXTS = ["dark granules", "rare cell", "a folded nucleus", "no nucleus at all", "tiny"]
ATTRIBUTES = [
    "The size of basophil is small.",
    "The size of basophil is round.",
    "The nucleus of basophil is lobed.",
    "The size of monocyte of the blood is large.",
    "The size of platelet is tiny.",
]


@pytest.fixture
def call(recipe_data, tmp_path):
    """`vademecum extract` of the tiny recipe: exit code, standard output, standard error."""
    recipe, out = tmp_path / "r.yaml", tmp_path / "k.h5"
    recipe.write_text(json.dumps(recipe_data), encoding="utf-8")

    def run(*more):
        arguments = ["extract", str(recipe), "--out", str(out), "--device", "cpu", *more]
        result = CliRunner().invoke(app, [*arguments, "--batch-size", "2"])
        assert result.exit_code == 0, result.output
        return result.stdout, result.stderr

    return run


def test_the_plan_names_units_tokens_bytes_and_memory(call, no_model):
    said, _ = call("--plan")
    rows = dict(re.findall(r"^none +(\w+ +\w+) +(\d+ +\d+ +\d+)$", said, re.MULTILINE))
    one_each = {
        "generate answers": sum(1 + len(q) + 7 for q in QUESTIONS),  # six new tokens and the end
        "read descriptions": sum(1 + len(t) for t in TEXTS),
        "read attributes": sum(1 + len(t) for t in ATTRIBUTES),
    }
    units = {"generate answers": 2, "read descriptions": 3, "read attributes": 3}
    assert {" ".join(k.split()): [int(n) for n in v.split()] for k, v in rows.items()} == {
        name: [units[name], units[name], tokens] for name, tokens in one_each.items()
    }
    assert "entries: 31, of which 0 are there" in said
    (megabytes,) = re.findall(r"^size of the cache: at most (\d+\.\d) MB$", said, re.MULTILINE)
    assert 0.0 <= float(megabytes) < 0.2
    assert re.search(r"^predicted peak memory \(none\): 0\.00 GB$", said, re.MULTILINE)
    plain = json.loads(call("--plan", "--json")[0])
    assert plain["size"] == pytest.approx(float(megabytes) * 1e6, abs=5e4)
    assert plain["memory"]["none"] > 4 * 54 * 262  # the embeddings alone


def test_progress_is_plain_lines_where_there_is_no_terminal(call):
    said, shown = call()
    assert re.search(r"^extracting: 13/13$", shown, re.MULTILINE)
    assert all(
        re.fullmatch(r"extracting: \d+/13(, about \d+ s left)?", x) for x in shown.split("\n") if x
    )
    assert "31 entries computed, 0 were there" in said
    assert "finished: all 31 entries are there, no model will be loaded" in call("--plan")[0]
    again, silent = call()
    assert "everything was there; no model was loaded" in again
    assert silent == ""


def test_a_plan_of_interrupted_work_counts_what_is_left(call, interrupt_after):
    resume = interrupt_after(3)
    with pytest.raises(AssertionError):  # Ctrl-C ends with a code of its own
        call()
    resume()
    said, _ = call("--plan")
    left = re.findall(r"^none +\w+ +(\w+) +(\d+) +(\d+) ", said, re.MULTILINE)
    assert left == [("answers", "2", "0"), ("descriptions", "3", "2"), ("attributes", "3", "3")]


def test_no_weights_are_loaded_by_a_plan(call, no_model):
    """The negative control: the same fixture stops an extraction."""
    call("--plan")
    with pytest.raises(AssertionError):
        call()
    assert crew.load_model.__name__ == "refuse"
