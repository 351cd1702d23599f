"""Several recipes for one model, and several processes for one recipe."""

import os
import signal
from dataclasses import replace

import pytest

from cache import progress
from cache.errors import ModelError, StorageError, SystemRefusedError, ValueRefusedError
from knowledge_extract import crew, extract, extract_many, processes
from knowledge_extract.engine import Fp16OverflowError
from knowledge_extract.job import prepare
from knowledge_extract.planning import plan
from knowledge_extract.processes import Processes, devices_for
from knowledge_extract.settings import RunSettings

CPU = RunSettings(device="cpu", batch_size=2)
STATES = {"kind": "states", "of": "answers", "pooling": "end_token", "layers": "all"}


@pytest.fixture
def loads(monkeypatch):
    """What was loaded, in order; int8 is stood in for by the plain model."""
    real, found = crew.load_model, []

    def load(source, quantisation, dtype, *rest):
        found.append((source.label, quantisation, dtype))
        return real(source, "none", dtype, *rest)

    monkeypatch.setattr(crew, "load_model", load)
    return found


def test_recipes_of_one_model_share_one_load(make_recipe, recipe_data, tmp_path, loads):
    again = recipe_data["blocks"] | {"again": STATES | {"quantisation": "int8"}}
    recipes = {
        "both": make_recipe(blocks=again),
        "other-words": make_recipe(templates={"question": "Describe {name}."}, blocks=again),
        "fewer": make_recipe(classes=recipe_data["classes"][:1], store_dtype="float16"),
        "other-type": make_recipe(compute_dtype="bfloat16"),
    }
    outs = {name: tmp_path / f"{name}.h5" for name in recipes}
    results = extract_many([(recipes[name], outs[name]) for name in recipes], CPU)
    assert [(quantisation, dtype) for _, quantisation, dtype in loads] == [
        ("none", "float32"),
        ("int8", "float32"),
        ("none", "bfloat16"),
    ]
    assert [result.path for result in results] == list(outs.values())
    for number in (0, 2):
        alone = extract(list(recipes.values())[number], tmp_path / f"alone{number}.h5", CPU)
        assert alone.content_id == results[number].content_id
        assert alone.computed == results[number].computed
    assert [p.name for p in tmp_path.iterdir() if "parts" in p.name] == []


def test_nothing_is_loaded_when_nothing_is_missing(make_recipe, tmp_path, request):
    wanted = [(make_recipe(), tmp_path / "a.h5"), (make_recipe(last_row="raw"), tmp_path / "b.h5")]
    first = extract_many(wanted, CPU)
    request.getfixturevalue("no_model")
    again = extract_many(wanted, CPU)
    assert [r.content_id for r in again] == [r.content_id for r in first]
    assert [r.computed for r in again] == [0, 0]


def test_every_recipe_is_checked_before_a_model_is_loaded(make_recipe, tmp_path, no_model):
    absent = make_recipe(model={"folder": str(tmp_path / "absent")})
    with pytest.raises(ModelError, match="no such model folder"):
        extract_many([(make_recipe(), tmp_path / "a.h5"), (absent, tmp_path / "b.h5")], CPU)
    twice = [(make_recipe(), tmp_path / "a.h5")] * 2
    with pytest.raises(StorageError, match=r"a\.h5: two recipes would make this file\. Give one"):
        extract_many(twice, CPU)


def test_what_is_complete_is_sealed_before_the_next_model(make_recipe, tmp_path, loads):
    broken = make_recipe(compute_dtype="bfloat16")
    real = crew.load_model

    def load(source, quantisation, dtype, *rest):
        if dtype == "bfloat16":
            raise ModelError("the model cannot be loaded")
        return real(source, quantisation, dtype, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "load_model", load)
        with pytest.raises(ModelError, match="cannot be loaded"):
            extract_many([(broken, tmp_path / "b.h5"), (make_recipe(), tmp_path / "a.h5")], CPU)
        assert not (tmp_path / "a.h5").exists()
        with pytest.raises(ModelError, match="cannot be loaded"):
            extract_many([(make_recipe(), tmp_path / "a.h5"), (broken, tmp_path / "b.h5")], CPU)
    assert (tmp_path / "a.h5").exists()


def test_two_processes_make_what_one_makes(make_recipe, recipe_data, tmp_path, capfd):
    """Answers made by one process are read, under another quantisation, by both."""
    blocks = {name: recipe_data["blocks"][name] for name in ("answers", "layers", "attributed")}
    recipe = make_recipe(blocks=blocks | {"again": STATES | {"quantisation": "nf4"}})
    run = replace(CPU, threads=1)
    one = extract(recipe, tmp_path / "one.h5", run)
    capfd.readouterr()
    two = extract(recipe, tmp_path / "two.h5", replace(run, processes=2))
    assert (two.content_id, two.computed) == (one.content_id, one.computed)
    assert (tmp_path / "two.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()
    said = capfd.readouterr().err
    assert "extracting: 8/8" in said
    assert "extracting (nf4): 3/3" in said


def test_a_killed_process_is_one_line_and_loses_nothing(make_recipe, tmp_path, monkeypatch):
    recipe, out = make_recipe(), tmp_path / "k.h5"
    seen, real_init, real_advance = [], Processes.__init__, progress.Track.advance

    def init(self, run):
        real_init(self, run)
        seen.append(self)

    def advance(self, by=1, note=""):
        real_advance(self, by, note)
        os.kill(seen[0].pids[0], signal.SIGKILL)

    monkeypatch.setattr(Processes, "__init__", init)
    monkeypatch.setattr(progress.Track, "advance", advance)
    match = r"^process 1 on cpu: an extraction process was ended by SIGKILL\. What was committed"
    with pytest.raises(SystemRefusedError, match=match):
        extract(recipe, out, replace(CPU, threads=1, processes=2))
    monkeypatch.undo()
    assert plan(recipe, out, CPU).cached > 0
    resumed = extract(recipe, out, replace(CPU, threads=1))
    assert resumed.reused > 0
    whole = extract(recipe, tmp_path / "whole.h5", replace(CPU, threads=1))
    assert resumed.content_id == whole.content_id


STAND_IN = """
import json, sys
request = json.loads(sys.stdin.readline())
assert set(request) == {"open", "unit"} and json.loads(sys.argv[1])["threads"] == 3
print(%r)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("reply", "error", "match"),
    [
        ('{"error": "ValueRefusedError", "message": "inf"}', ValueRefusedError, "^inf$"),
        ('{"error": "Fp16OverflowError", "message": "tokens"}', Fp16OverflowError, "tokens"),
        (
            '{"error": "KeyError", "message": "x"}',
            SystemRefusedError,
            r"^process [12] on cpu: an extraction process failed; found KeyError: x. What was",
        ),
    ],
)
def test_what_goes_wrong_in_a_process_is_said_here(
    make_recipe, tmp_path, monkeypatch, reply, error, match
):
    monkeypatch.setattr(processes, "WORKER", ("-c", STAND_IN % reply))
    place = crew.Workplace(prepare(make_recipe(), CPU), tmp_path / "k.h5.parts", wide=False)
    team = Processes(replace(CPU, processes=2, threads=3))
    quantisation, units = place.job.passes[0]
    with pytest.raises(error, match=match):
        list(team.work(place, quantisation, units, 2))
    assert team.pids == []


def test_a_process_that_leaves_without_a_word(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "WORKER", ("-c", "raise SystemExit(5)"))
    with pytest.raises(SystemRefusedError, match="ended with code 5"):
        extract(make_recipe(), tmp_path / "k.h5", replace(CPU, processes=2))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"processes": 0}, "the number of processes is wrong; found 0, wanted 1 or more"),
        ({"processes": 2, "device_map": "auto"}, "a device map spreads one model over all devices"),
        ({"processes": 3, "device": "cuda"}, "found 3 processes for 2 GPUs, device cuda"),
        ({"processes": 2, "device": "cuda:1"}, "found 2 processes for 2 GPUs, device cuda:1"),
    ],
)
def test_processes_that_cannot_be(monkeypatch, settings, match):
    monkeypatch.setattr(processes, "pick_device", lambda wanted: wanted)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemRefusedError, match=match):
        devices_for(replace(CPU, **settings))


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(processes, "pick_device", lambda _: "cuda")
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    assert devices_for(RunSettings(processes=2)) == ["cuda:0", "cuda:1"]
