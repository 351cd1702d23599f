"""What happens when an extraction stops, starts again, or meets the work of another."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from cache.errors import CacheMismatchError, StorageError
from cache.store import KnowledgeCache
from knowledge_extract import crew, engine, extract, extraction
from knowledge_extract.extraction import parts_folder
from knowledge_extract.planning import plan
from knowledge_extract.settings import RunSettings

CPU = RunSettings(device="cpu", batch_size=2)


def test_the_obstacle_is_real(make_recipe, tmp_path, no_model):
    """The negative control of the tests below: with work to do, they would fail."""
    with pytest.raises(AssertionError, match="the model was loaded"):
        extract(make_recipe(), tmp_path / "k.h5", CPU)


def test_a_second_run_loads_nothing(make_recipe, tmp_path, request):
    out = tmp_path / "k.h5"
    first = extract(make_recipe(), out, CPU)
    before = out.stat()
    request.getfixturevalue("no_model")
    second = extract(make_recipe(), out, CPU)
    assert second.content_id == first.content_id
    assert (second.computed, second.reused) == (0, first.computed)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_all_committed_but_not_sealed_loads_nothing(make_recipe, tmp_path, monkeypatch, request):
    out = tmp_path / "k.h5"

    def no_space(*_args, **_kwargs):
        raise StorageError("no space left")

    with monkeypatch.context() as full:
        full.setattr(extraction, "seal", no_space)
        with pytest.raises(StorageError, match="no space left"):
            extract(make_recipe(), out, CPU)
    assert not out.exists()
    request.getfixturevalue("no_model")
    result = extract(make_recipe(), out, CPU)
    assert result.computed == 0
    assert not parts_folder(out).exists()


@pytest.mark.parametrize("units", [0, 1, 3, 5])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    make_recipe, tmp_path, interrupt_after, units
):
    whole = extract(make_recipe(), tmp_path / "whole.h5", CPU)
    out = tmp_path / "k.h5"
    resume = interrupt_after(units)
    with pytest.raises(KeyboardInterrupt):
        extract(make_recipe(), out, CPU)
    assert not out.exists()
    resume()
    planned = plan(make_recipe(), out, CPU)
    assert 0 < planned.cached < planned.entries
    assert sum(s.units - s.to_do for s in planned.steps) == units
    result = extract(make_recipe(), out, CPU)
    assert result.reused == planned.cached
    assert result.computed == planned.entries - planned.cached
    assert result.content_id == whole.content_id
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from cache.shards import ShardFolder
from knowledge_extract import RunSettings, extract, load_extract_recipe
real, commits = ShardFolder.commit, []
def commit(self, entries, **kwargs):
    real(self, entries, **kwargs)
    commits.append(1)
    if len(commits) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
ShardFolder.commit = commit
run = RunSettings(device="cpu", batch_size=2)
extract(load_extract_recipe(sys.argv[1]), Path(sys.argv[2]), run)
"""


def test_a_killed_process_loses_nothing_that_was_committed(
    make_recipe, recipe_data, tmp_path, root
):
    recipe, out = tmp_path / "r.yaml", tmp_path / "k.h5"
    recipe.write_text(json.dumps(recipe_data), encoding="utf-8")
    arguments = [sys.executable, "-c", KILLED, str(recipe), str(out)]
    killed = subprocess.run(arguments, cwd=root, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert plan(make_recipe(), out, CPU).cached > 0
    resumed = extract(make_recipe(), out, CPU)
    assert resumed.reused > 0
    assert resumed.content_id == extract(make_recipe(), tmp_path / "whole.h5", CPU).content_id


def test_a_damaged_shard_is_done_again(make_recipe, tmp_path, interrupt_after):
    whole = extract(make_recipe(), tmp_path / "whole.h5", CPU)
    out = tmp_path / "k.h5"
    resume = interrupt_after(3)
    with pytest.raises(KeyboardInterrupt):
        extract(make_recipe(), out, CPU)
    resume()
    shard = max(
        (p for p in parts_folder(out).glob("*.h5") if p.name != "extraction.h5"),
        key=lambda p: p.stat().st_size,
    )
    raw = bytearray(shard.read_bytes())
    raw[-100] ^= 1
    shard.write_bytes(raw)
    result = extract(make_recipe(), out, CPU)
    assert result.content_id == whole.content_id
    assert any("is done again" in note for note in result.notes)


def test_out_of_memory_halves_the_batch_and_the_shard_says_so(make_recipe, tmp_path, monkeypatch):
    run = RunSettings(device="cpu", batch_size=4)
    plain = extract(make_recipe(), tmp_path / "plain.h5", run)
    real, out = engine.read, tmp_path / "k.h5"

    def tight(language, sequences, *rest):
        if len(sequences) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(language, sequences, *rest)

    shapes = {}
    sealed = extraction.seal
    monkeypatch.setattr(engine, "read", tight)
    monkeypatch.setattr(
        extraction, "seal", lambda f, *a, **k: shapes.update(f.batch_shapes()) or sealed(f, *a, **k)
    )
    result = extract(make_recipe(), out, run)
    assert "out of memory: went on with batches of 2" in result.notes
    # Answers: three at once before memory ran out. Then never more than two.
    assert sorted({s[0] for s in shapes.values() if len(s) == 2}) == [1, 2, 3]
    assert result.content_id != ""
    assert plain.computed == result.computed
    with KnowledgeCache.open(out) as a, KnowledgeCache.open(tmp_path / "plain.h5") as b:
        for item in range(2):
            one, two = (c.blocks["tokens"].array("basophil", item) for c in (a, b))
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    side = json.loads((tmp_path / "k.h5.run.json").read_text("utf-8"))
    assert (side["halved"], side["smallest_batch"]) == (1, 2)


def test_a_cache_of_another_recipe_is_not_touched(make_recipe, tmp_path):
    out = tmp_path / "k.h5"
    first = extract(make_recipe(), out, CPU)
    other = make_recipe(last_row="raw")
    match = "made by another recipe: last_row differs; found 'normed', wanted 'raw'.*--overwrite"
    for call in (extract, plan):
        with pytest.raises(CacheMismatchError, match=match):
            call(other, out, CPU)
    again = extract(other, out, CPU, overwrite=True)
    assert again.content_id != first.content_id
    with KnowledgeCache.open(out) as found:
        assert found.recipe["last_row"] == "raw"


def test_work_of_another_recipe_is_not_mixed_in(make_recipe, tmp_path, interrupt_after):
    resume = interrupt_after(2)
    with pytest.raises(KeyboardInterrupt):
        extract(make_recipe(), tmp_path / "k.h5", CPU)
    resume()
    with pytest.raises(CacheMismatchError, match=r"belongs to another recipe: blocks.answers.spec"):
        extract(
            make_recipe(chat_template="never", compute_dtype="bfloat16"), tmp_path / "k.h5", CPU
        )


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_lost_token_ids_are_generated_again(
    make_recipe, recipe_data, tmp_path, monkeypatch, damage
):
    again = {"kind": "states", "of": "answers", "pooling": "end_token", "layers": "all"}
    blocks = {k: recipe_data["blocks"][k] for k in ("answers", "layers")}
    recipe = make_recipe(blocks=blocks | {"again": again | {"quantisation": "int8"}})
    real, loads = crew.load_model, []

    def load(source, quantisation, *rest):
        loads.append(quantisation)
        if quantisation == "int8" and len(loads) == 2:
            raise KeyboardInterrupt
        return real(source, "none", *rest)

    monkeypatch.setattr(crew, "load_model", load)
    out = tmp_path / "k.h5"
    with pytest.raises(KeyboardInterrupt):
        extract(recipe, out, CPU)
    kept = sorted(parts_folder(out).glob("answers-*.json"))
    record = json.loads(kept[0].read_text("ascii"))
    next(iter(record["ids"].values())).append(77)
    kept[0].write_text("{}" if damage == "lost" else json.dumps(record), encoding="ascii")
    assert [s.to_do for s in plan(recipe, out, CPU).steps] == [1, 2]
    extract(recipe, out, CPU)
    assert loads == ["none", "int8", "none", "int8"]
