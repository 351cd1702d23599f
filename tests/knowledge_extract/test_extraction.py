"""A whole extraction on tiny models: what is stored, resumed, refused."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cache.errors import CacheMismatchError, ModelError, StorageError, ValueRefusedError
from cache.store import KnowledgeCache
from knowledge_extract import engine, extract, extraction
from knowledge_extract.extraction import parts_folder
from knowledge_extract.job import prepare
from knowledge_extract.planning import plan
from knowledge_extract.settings import RunSettings

CPU = RunSettings(device="cpu", batch_size=2)


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is impossible from here on."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(extraction, "load_model", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.fixture
def interrupt_after(monkeypatch):
    """The user presses Ctrl-C after so many units."""

    def arm(units):
        real, done = engine.Engine.entries, []

        def entries(self, unit):
            if len(done) == units:
                raise KeyboardInterrupt
            done.append(unit)
            return real(self, unit)

        monkeypatch.setattr(engine.Engine, "entries", entries)
        return lambda: monkeypatch.setattr(engine.Engine, "entries", real)

    return arm


def test_what_is_stored(make_recipe, model_folder, tmp_path):
    result = extract(make_recipe(), tmp_path / "k.h5", CPU)
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    with KnowledgeCache.open(tmp_path / "k.h5", expect=result.content_id, verify="full") as found:
        assert found.dataset == "tiny"
        blocks = found.blocks
        answer = blocks["answers"].text("monocyte")
        assert answer["prompt"] == "What is monocyte of the blood?"
        assert answer["prompt_tokens"] == 1 + len("What is monocyte of the blood?")
        assert 0 <= answer["text_tokens"] <= 6
        assert blocks["layers"].array("monocyte").shape == (1, 3, 54)
        assert blocks["layers"].layers == (1, 2, 3)
        assert blocks["described"].layers == (0, 2, 3)
        assert blocks["descriptions"].text("platelet", 1)["text"] == "tiny"
        assert blocks["attributes"].text("basophil", 0) == {
            "attribute": "nucleus", "value": "lobed", "rank": 0,
        }  # fmt: skip
        assert blocks["attributes"].text("basophil", 2) == {
            "attribute": "size", "value": "round", "rank": 1,
        }  # fmt: skip
        ids = [1, *(6 + b for b in _bytes("The nucleus of basophil is lobed."))]
        wanted = _states(model, ids)
        state = blocks["attributed"].array("basophil", 0)
        np.testing.assert_allclose(state[0, 0], wanted[3, -1], rtol=1e-4, atol=1e-5)
        tokens = blocks["tokens"].array("platelet", 1)
        assert tokens.shape == (len("tiny"), 1, 54)
        ids = [1, *(6 + b for b in _bytes("tiny"))]
        np.testing.assert_allclose(tokens[:, 0], _states(model, ids)[1, 1:], rtol=1e-4, atol=1e-5)
        mean = _states(model, ids)[[0, 2, 3], 1:].mean(axis=1)
        np.testing.assert_allclose(
            blocks["described"].array("platelet", 1)[0], mean, rtol=1e-4, atol=1e-5
        )
        spec = blocks["layers"].spec["answers"]
        assert spec["end_token"] == 2
        assert spec["max_new_tokens"] == 6


def _bytes(text):
    """Token numbers of the byte-level alphabet, which is sorted by character."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index("Ġ" if c == " " else c) for c in text]


def _states(model, ids):
    with torch.inference_mode():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    return torch.cat(out.hidden_states).numpy()


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


@pytest.fixture
def loud_model(monkeypatch):
    """Every hidden state is so many times larger."""

    def arm(factor):
        real = engine.read

        def louder(*args):
            return {name: states * factor for name, states in real(*args).items()}

        monkeypatch.setattr(engine, "read", louder)

    return arm


def test_a_value_too_large_for_float16_is_refused(make_recipe, tmp_path, loud_model):
    loud_model(1e6)
    out = tmp_path / "k.h5"
    match = r"block (described|attributed|tokens), class \w+, item \d, layer \d.* is too large for"
    with pytest.raises(ValueRefusedError, match=match):
        extract(make_recipe(store_dtype="float16"), out, CPU)
    assert not out.exists()
    assert plan(make_recipe(store_dtype="float16"), out, CPU).cached > 0  # answers stay


def test_or_everything_is_stored_as_float32_and_the_run_says_so(make_recipe, tmp_path, loud_model):
    loud_model(1e6)
    recipe, out = make_recipe(store_dtype="float16", on_overflow="float32"), tmp_path / "k.h5"
    result = extract(recipe, out, CPU)
    assert any("stored as float32" in note for note in result.notes)
    with KnowledgeCache.open(out) as found:
        assert found.blocks["tokens"].array("platelet").dtype == np.float32
        assert np.abs(found.blocks["tokens"].array("platelet")).max() > 65504
    assert extract(recipe, out, CPU).computed == 0
    assert [p.name for p in tmp_path.iterdir() if "parts" in p.name] == []


def test_an_interrupted_float32_run_stays_one(make_recipe, tmp_path, loud_model, interrupt_after):
    loud_model(1e6)
    recipe = make_recipe(store_dtype="float16", on_overflow="float32")
    whole = extract(recipe, tmp_path / "whole.h5", CPU)
    out = tmp_path / "k.h5"
    resume = interrupt_after(5)  # three units until the overflow, two after it
    with pytest.raises(KeyboardInterrupt):
        extract(recipe, out, CPU)
    resume()
    assert parts_folder(out, wide=True).is_dir()
    assert extract(recipe, out, CPU).content_id == whole.content_id


def test_a_state_that_is_not_a_number_is_refused(make_recipe, tmp_path, loud_model):
    loud_model(float("nan"))
    with pytest.raises(ValueRefusedError, match=r"block \w+, class \w+.*a value is not finite"):
        extract(make_recipe(on_overflow="float32"), tmp_path / "k.h5", CPU)


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


def test_answers_are_read_by_another_model_exactly_as_generated(
    make_recipe, recipe_data, tmp_path, monkeypatch
):
    """Quantisation is stood in for by another dtype here; the real ones are in test_real.py."""
    again = {"kind": "states", "of": "answers", "pooling": "end_token", "layers": "all"}
    blocks = {k: recipe_data["blocks"][k] for k in ("answers", "layers")}
    recipe = make_recipe(blocks=blocks | {"again": again | {"quantisation": "int8"}})
    real, loads = extraction.load_model, []

    def load(source, quantisation, *rest):
        loads.append(quantisation)
        return real(source, "none", *rest)

    monkeypatch.setattr(extraction, "load_model", load)
    extract(recipe, tmp_path / "k.h5", CPU)
    assert loads == ["none", "int8"]
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        for one in found.classes:
            a, b = (found.blocks[name].array(one.id) for name in ("layers", "again"))
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("**/answers-*"))


def test_lost_token_ids_are_generated_again(make_recipe, recipe_data, tmp_path, monkeypatch):
    again = {"kind": "states", "of": "answers", "pooling": "end_token", "layers": "all"}
    blocks = {k: recipe_data["blocks"][k] for k in ("answers", "layers")}
    recipe = make_recipe(blocks=blocks | {"again": again | {"quantisation": "int8"}})
    real, loads = extraction.load_model, []

    def load(source, quantisation, *rest):
        loads.append(quantisation)
        if quantisation == "int8" and len(loads) == 2:
            raise KeyboardInterrupt
        return real(source, "none", *rest)

    monkeypatch.setattr(extraction, "load_model", load)
    out = tmp_path / "k.h5"
    with pytest.raises(KeyboardInterrupt):
        extract(recipe, out, CPU)
    kept = sorted(parts_folder(out).glob("answers-*.json"))
    kept[0].write_text("{}", encoding="ascii")
    assert [s.to_do for s in plan(recipe, out, CPU).steps] == [1, 2]
    extract(recipe, out, CPU)
    assert loads == ["none", "int8", "none", "int8"]


def test_no_new_tokens_leave_an_empty_answer(make_recipe, recipe_data, model_folder, tmp_path):
    answers = {"kind": "answers", "max_new_tokens": 0}
    blocks = {"answers": answers, "layers": recipe_data["blocks"]["layers"]}
    extract(make_recipe(blocks=blocks), tmp_path / "k.h5", CPU)
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        assert found.blocks["answers"].text("platelet")["text"] == ""
        wanted = _states(model, [1, *(6 + b for b in _bytes("What is platelet?")), 2])[1:, -1]
        state = found.blocks["layers"].array("platelet")[0]
        np.testing.assert_allclose(state, wanted, rtol=1e-4, atol=1e-5)


def test_the_plan_loads_no_weights_and_counts_right(make_recipe, tmp_path, no_model, monkeypatch):
    recipe, out = make_recipe(), tmp_path / "k.h5"
    before = plan(recipe, out, CPU)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="the model was loaded"):
        extract(recipe, out, CPU)
    monkeypatch.undo()
    result = extract(recipe, out, CPU)
    assert before.entries == result.computed + result.reused
    assert (before.cached, before.sealed) == (0, False)
    assert set(before.memory) == {"none"}
    with KnowledgeCache.open(out) as found:
        states = sum(
            found.blocks[name].array(c.id, i).nbytes
            for name in ("layers", "described", "attributed", "tokens")
            for c in found.classes
            for i in range(found.blocks[name].items(c.id))
        )
    assert states < before.size < states + 20_000
    assert "finished: all" in plan(recipe, out, CPU).describe()
    assert "predicted peak memory (none)" in before.describe()


def test_predicted_weights_are_the_weights(make_recipe, model_folder):
    from knowledge_extract.memory import weight_bytes

    job = prepare(make_recipe(), CPU)
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    numbers = sum(p.numel() for p in model.parameters())
    assert weight_bytes(job.config, "none", "float32") == 4 * numbers
    linear = sum(
        m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)
    )
    assert weight_bytes(job.config, "int8", "float32") == linear + 4 * (numbers - linear)


def test_no_path_goes_into_the_cache(make_recipe, model_folder, tmp_path):
    extract(make_recipe(), tmp_path / "k.h5", CPU)
    raw = (tmp_path / "k.h5").read_bytes()
    assert str(model_folder("llama").parent).encode() not in raw
    assert str(tmp_path).encode() not in raw
    assert b"tiny-llama" in raw


def test_batch_size_is_not_part_of_the_recipe(make_recipe, tmp_path):
    one = prepare(make_recipe(), RunSettings(device="cpu", batch_size=1))
    two = prepare(make_recipe(), RunSettings(device="cpu", batch_size=8))
    assert one.all_keys() == two.all_keys()
    assert one.resolved() == two.resolved()


@pytest.mark.parametrize(
    "change",
    [
        {"compute_dtype": "bfloat16"},
        {"last_row": "raw"},
        {"store_dtype": "float16"},
        {"quantisation": "nf4"},
        {"templates": {"question": "Describe {name}."}},
    ],
)
def test_what_defines_the_values_defines_the_keys(make_recipe, change):
    one, two = prepare(make_recipe(), CPU), prepare(make_recipe(**change), CPU)
    piece, other = (job.pieces["answers"][0] for job in (one, two))
    assert one.key("layers", piece) != two.key("layers", other)


def test_chat_mode_defines_the_keys(make_recipe, model_folder):
    model = {"folder": str(model_folder("llama", chat=True))}
    chat, plain = (
        prepare(make_recipe(model=model, chat_template=mode), CPU) for mode in ("auto", "never")
    )
    assert chat.prompter.chat
    assert not plain.prompter.chat
    keys = [job.key("layers", job.pieces["answers"][0]) for job in (chat, plain)]
    assert keys[0] != keys[1]


def test_a_text_longer_than_the_context_is_refused(make_recipe, recipe_data):
    classes = [dict(recipe_data["classes"][0], descriptions=["x" * 300])]
    match = r"descriptions, class basophil, item 0: a text is longer.*found 301 tokens.*most 256"
    with pytest.raises(ModelError, match=match):
        prepare(make_recipe(classes=classes), CPU)


def test_a_target_in_no_folder(make_recipe, tmp_path):
    with pytest.raises(StorageError, match=r"absent: no such folder. Create it first."):
        extract(make_recipe(), tmp_path / "absent" / "k.h5", CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_second_architecture(make_recipe, model_folder, tmp_path):
    recipe = make_recipe(model={"folder": str(model_folder("gpt2"))})
    extract(recipe, tmp_path / "k.h5", CPU)
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        assert found.blocks["layers"].array("platelet").shape == (1, 4, 40)


def test_importing_the_stage_is_light(root):
    code = (
        "import sys, knowledge_extract; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert out.stdout.decode().strip() == "[]"
