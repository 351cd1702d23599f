"""A whole extraction on tiny models: what is stored, resumed, refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cache.errors import CacheMismatchError, ModelError, RecipeError, ValueRefusedError
from cache.store import KnowledgeCache
from knowledge_extract import crew, engine, extract
from knowledge_extract.extraction import parts_folder
from knowledge_extract.job import prepare
from knowledge_extract.planning import plan
from knowledge_extract.settings import RunSettings

CPU = RunSettings(device="cpu", batch_size=2)


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


def test_answers_are_read_by_another_model_exactly_as_generated(
    make_recipe, recipe_data, tmp_path, monkeypatch
):
    """Quantisation is stood in for by another dtype here; the real ones are in test_real.py."""
    again = {"kind": "states", "of": "answers", "pooling": "end_token", "layers": "all"}
    blocks = {k: recipe_data["blocks"][k] for k in ("answers", "layers")}
    recipe = make_recipe(blocks=blocks | {"again": again | {"quantisation": "int8"}})
    real, loads = crew.load_model, []

    def load(source, quantisation, *rest):
        loads.append(quantisation)
        return real(source, "none", *rest)

    monkeypatch.setattr(crew, "load_model", load)
    extract(recipe, tmp_path / "k.h5", CPU)
    assert loads == ["none", "int8"]
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        for one in found.classes:
            a, b = (found.blocks[name].array(one.id) for name in ("layers", "again"))
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("**/answers-*"))


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


def test_the_folder_of_a_target_is_made(make_recipe, tmp_path):
    result = extract(make_recipe(), tmp_path / "absent" / "below" / "k.h5", CPU)
    made = sorted(path.name for path in (tmp_path / "absent" / "below").iterdir())
    assert made == ["k.h5", "k.h5.run.json"] and result.path.is_file()


def test_a_refusal_makes_no_folder(make_recipe, tmp_path):
    with pytest.raises(ModelError):
        extract(make_recipe(model={"folder": "nowhere"}), tmp_path / "absent" / "k.h5", CPU)
    with pytest.raises(RecipeError, match="--device: no such device; found 'gpu'"):
        extract(make_recipe(), tmp_path / "absent" / "k.h5", RunSettings(device="gpu"))
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


def test_overwriting_keeps_the_entries_that_stay_the_same(make_recipe, recipe_data, tmp_path):
    out = tmp_path / "k.h5"
    classes, blocks = recipe_data["classes"], recipe_data["blocks"]
    fewer = {name: blocks[name] for name in ("answers", "layers", "descriptions")}
    first = extract(make_recipe(classes=classes[:2], blocks=fewer), out, CPU)
    assert first.reused == 0
    with KnowledgeCache.open(out) as found:
        kept = {b: dict(zip(found.blocks[b].keys(), found.blocks[b].digests())) for b in fewer}
    with pytest.raises(
        CacheMismatchError, match="pass --overwrite: it keeps the entries that stay"
    ):
        extract(make_recipe(), out, CPU)
    again = extract(make_recipe(), out, CPU, overwrite=True)
    assert again.reused == first.computed
    with KnowledgeCache.open(out, verify="full") as found:
        for name, entries in kept.items():
            now = dict(zip(found.blocks[name].keys(), found.blocks[name].digests()))
            assert all((now[key] == digest).all() for key, digest in entries.items())
