"""Greedy answers and the end token's states, against plain unbatched forwards."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig

from knowledge_extract.capture import Capture
from knowledge_extract.generate import generate, greedy, pad_right, read
from knowledge_extract.model import as_language_model
from knowledge_extract.pooling import reader_for, split_rows

END = 2
PROMPTS = [[1, 40, 50, 60, 70], [1, 90], [1, 30, 31, 32, 33, 34, 35, 36], [1, 90, 91]]
FAMILIES = ["llama", "gpt2", "gemma2"]


@pytest.fixture(params=FAMILIES)
def language(request, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder(request.param))
    return as_language_model(model, END, "none")


def reference(language, ids):
    """All hidden states of one unbatched forward, [depth + 1, tokens, width]."""
    with torch.inference_mode():
        out = language.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return torch.cat(out.hidden_states)


def run(language, prompts, most=7, stops=frozenset({END}), last_row="normed"):
    blocks = {"all": range(language.depth + 1), "last": [language.depth]}
    with Capture(language, blocks, last_row) as capture:
        step = language.batch_limit(max(map(len, prompts)) + most + 1) or len(prompts)
        parts = [
            generate(
                language,
                prompts[at : at + step],
                end=END,
                stops=stops,
                max_new_tokens=most,
                capture=capture,
                blocks=list(blocks),
            )
            for at in range(0, len(prompts), step)
        ]
    answers = [answer for part in parts for answer in part.answers]
    return answers, {b: torch.cat([part.states[b] for part in parts]) for b in blocks}


def test_greedy_waits_for_the_device_once():
    read_alone: list[object] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "local_scalar_dense" in str(func):
                read_alone.append(func)
            return func(*args, **(kwargs or {}))

    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 1.0, 4.0]])
    with Watch():
        assert greedy(logits, range(3)) == [1, 0, 2]
    assert len(read_alone) <= 1


def test_text_equals_the_library_s_greedy_decoding(language):
    answers, _ = run(language, PROMPTS)
    settings = GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=END, pad_token_id=0)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        out = language.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=settings,
        )
        wanted = out[0, len(prompt) :].tolist()
        assert answer == (wanted[: wanted.index(END)] if END in wanted else wanted)
    assert len({tuple(a) for a in answers}) > 1


def test_states_equal_one_unbatched_forward(language):
    answers, states = run(language, PROMPTS)
    assert states["all"].shape == (4, language.depth + 1, language.width)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        wanted = reference(language, [*prompt, *answer, END])[:, -1]
        torch.testing.assert_close(states["all"][row], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states["last"][row, 0], wanted[-1], rtol=1e-4, atol=1e-5)


def test_raw_last_row_is_the_last_layer_s_output(language):
    seen = []
    hook = language.layers[-1].register_forward_hook(
        lambda _m, _a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    reference(language, [*PROMPTS[0], END])
    hook.remove()
    _, states = run(language, PROMPTS[:1], most=0, last_row="raw")
    torch.testing.assert_close(states["all"][0, -1], seen[0][0, -1], rtol=1e-4, atol=1e-5)
    _, normed = run(language, PROMPTS[:1], most=0)
    assert not torch.allclose(normed["all"][0, -1], seen[0][0, -1], rtol=1e-2)


def test_a_row_does_not_depend_on_its_batch(language):
    together, states = run(language, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone, own = run(language, [prompt])
        assert alone[0] == together[row]
        torch.testing.assert_close(own["all"][0], states["all"][row], rtol=1e-4, atol=1e-5)


def test_an_answer_that_stops_is_closed_by_the_one_end_token(language):
    free, _ = run(language, PROMPTS)
    stop = free[0][3]
    answers, states = run(language, PROMPTS, stops=frozenset({stop}))
    assert answers[0] == free[0][: free[0].index(stop)]
    assert all(stop not in answer for answer in answers)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        wanted = reference(language, [*prompt, *answer, END])[:, -1]
        torch.testing.assert_close(states["all"][row], wanted, rtol=1e-4, atol=1e-5)


def test_without_a_capture_only_the_text_is_made(language):
    plain = generate(language, PROMPTS[:1], end=END, stops=frozenset({END}), max_new_tokens=7)
    assert plain.answers == run(language, PROMPTS[:1])[0]
    assert plain.states == {}


@pytest.mark.parametrize("pooling", ["last_token", "mean", "all_tokens"])
def test_pooling_of_given_texts(language, pooling):
    prompts = [p[:5] for p in PROMPTS]  # inside gemma2's window: one batch for all families
    _, mask = pad_right(prompts, END)
    content = mask.clone()
    content[:, 0] = False  # the start token is not part of the text
    layers = [0, 1, language.depth]
    with Capture(language, {"x": layers}, "normed") as capture:
        found = read(language, prompts, capture, {"x": reader_for(pooling, content)})["x"]
    rows = split_rows(pooling, found, content)
    for prompt, row in zip(prompts, rows, strict=True):
        wanted = reference(language, prompt)[layers].transpose(0, 1)[1:]
        wanted = {"last_token": wanted[-1:], "mean": wanted.mean(0, keepdim=True)}.get(
            pooling, wanted
        )
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


def test_padding_that_is_not_a_number_stays_out_of_a_mean():
    states = torch.ones(2, 3, 4)
    states[1, 2] = float("nan")
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.equal(reader_for("mean", mask)(states), torch.ones(2, 4))


def test_only_wanted_positions_are_kept(language):
    """What the hooks hold after a forward is as large as what is stored, not as the batch."""
    _, mask = pad_right(PROMPTS[:2], END)
    with Capture(language, {"x": [1, 2]}, "normed") as capture:
        capture.arm({"x": reader_for("last_token", mask)})
        ids, _ = pad_right(PROMPTS[:2], END)
        language.model(input_ids=ids, attention_mask=mask.long())
        sizes = [kept.untyped_storage().nbytes() for kept in capture._kept.values()]
    assert sizes == [2 * language.width * 4] * 2


def test_a_sliding_window_is_read_row_by_row(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("gemma2"))
    language = as_language_model(model, END, "none")
    assert language.batch_limit(12) is None
    assert language.batch_limit(13) == 1
    assert as_language_model(model, END, "int8").batch_limit(2) == 1
