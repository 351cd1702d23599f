"""The cache with room: exact against plain recomputation, whoever leaves and whatever is shared."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3NextConfig

from knowledge_extract import generate as module
from knowledge_extract.capture import Capture
from knowledge_extract.generate import generate, read, shared_beginning
from knowledge_extract.keyvalues import RoomyLayer, roomy
from knowledge_extract.model import as_language_model
from knowledge_extract.pooling import rows_at

END = 2
SHARED = [1, 40, 50, 60, 70, 80, 90, 100, 110]
PROMPTS = [
    [*SHARED, 30],
    [*SHARED, 31, 32, 33, 34],
    [*SHARED, 90, 91],
    SHARED[:-1],
    [*SHARED, 90, 92, 93, 94, 95, 96],
]


@pytest.fixture(params=["llama", "gpt2"])
def language(request, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder(request.param)).double()
    return as_language_model(model, END, "none")


def step_by_step(language, prompt, most, stops):
    """Everything computed anew for every token: the answer, and the end token's states."""
    answer = []
    with torch.inference_mode():
        while len(answer) < most:
            out = language.model(torch.tensor([[*prompt, *answer]]), use_cache=False)
            token = int(out.logits[0, -1].argmax())
            if token in stops:
                break
            answer.append(token)
        ids = torch.tensor([[*prompt, *answer, END]])
        hidden = language.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    return answer, torch.cat(hidden)[:, -1].float()


def batched(language, prompts, most, stops):
    with Capture(language, {"all": range(language.depth + 1)}, "normed") as capture:
        options = {"end": END, "stops": stops, "max_new_tokens": most}
        made = generate(language, prompts, **options, capture=capture, blocks=["all"])
    return made.answers, made.states["all"]


def batch_sizes(language, monkeypatch):
    """Rows and tokens of every forward to come; none of them may attend to nothing."""
    sizes, real = [], module._forward

    def forward(language, part, **arguments):
        sizes.append(tuple(arguments["input_ids"].shape))
        assert arguments["attention_mask"].any(dim=1).all()
        return real(language, part, **arguments)

    monkeypatch.setattr(module, "_forward", forward)
    return sizes


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], PROMPTS[:3], [[1], [1, 40], [5]]])
def test_answers_and_states_equal_plain_recomputation(language, prompts):
    free = [step_by_step(language, prompt, 9, {END})[0] for prompt in prompts]
    early = {answer[n] for n, answer in zip((1, 4, 6), free) if len(answer) > n}
    for stops in (frozenset({END}), frozenset({END, *early})):
        answers, states = batched(language, prompts, 9, stops)
        for row, prompt in enumerate(prompts):
            answer, wanted = step_by_step(language, prompt, 9, stops)
            assert answers[row] == answer
            torch.testing.assert_close(states[row], wanted, rtol=1e-6, atol=1e-6)


def test_rows_that_are_done_leave_the_batch(language, monkeypatch):
    free, _ = batched(language, PROMPTS, 9, frozenset({END}))
    stops = frozenset({free[0][2], free[2][5]})
    wanted = [step_by_step(language, prompt, 9, stops) for prompt in PROMPTS]
    sizes = batch_sizes(language, monkeypatch)
    answers, states = batched(language, PROMPTS, 9, stops)
    assert answers == [answer for answer, _ in wanted]
    torch.testing.assert_close(states, torch.stack([s for _, s in wanted]), rtol=1e-6, atol=1e-6)
    lengths = [len(answer) for answer, _ in wanted]
    assert len(set(lengths)) > 2
    steps = [rows for rows, tokens in sizes if tokens == 1]
    # The last token of the prompt, those of the answer, and the end token: no row more.
    assert steps == [sum(n + 2 > step for n in lengths) for step in range(max(lengths) + 2)]


def test_a_prompt_of_one_token_beside_longer_ones(language, monkeypatch):
    sizes = batch_sizes(language, monkeypatch)
    answers, _ = batched(language, [[1], [1, 40, 41], [5]], 3, frozenset({END}))
    assert sizes[0] == (3, 2)
    assert answers[0] == step_by_step(language, [1], 3, {END})[0]


def test_without_states_the_end_token_is_not_fed(language, monkeypatch):
    wanted, _ = batched(language, PROMPTS, 5, frozenset({END}))
    sizes = batch_sizes(language, monkeypatch)
    made = generate(language, PROMPTS, end=END, stops=frozenset({END}), max_new_tokens=5)
    assert made.answers == wanted
    assert sum(tokens == 1 for _, tokens in sizes) == max(map(len, wanted))


def test_a_shared_beginning_is_read_once(language, monkeypatch):
    assert shared_beginning(PROMPTS) == 8
    assert shared_beginning([[1, 2], [1, 2]]) == 2
    assert shared_beginning([[3], [1, 2]]) == 0
    prompts = [p for p in PROMPTS if len(p) > 9]
    apart = [batched(language, [prompt], 3, frozenset({END})) for prompt in prompts]
    sizes = batch_sizes(language, monkeypatch)
    answers, states = batched(language, prompts, 3, frozenset({END}))
    assert sizes[:3] == [(1, 9), (4, 5), (4, 1)]
    assert answers == [one[0][0] for one in apart]
    torch.testing.assert_close(states, torch.cat([one[1] for one in apart]), rtol=1e-6, atol=1e-6)


def test_no_memory_is_taken_after_the_first_token():
    layer = RoomyLayer(3, 8)
    first = torch.randn(1, 2, 4, 5)
    keys, _ = layer.update(first, first)
    assert torch.equal(keys, first)
    place = layer.keys.data_ptr()
    step = torch.randn(3, 2, 1, 5)
    keys, values = layer.update(step, step + 1)
    assert torch.equal(keys, torch.cat([first.expand(3, -1, -1, -1), step], dim=2))
    assert torch.equal(values[:, :, -1:], step + 1)
    layer.reorder_cache(torch.tensor([0, 2]))
    keys, _ = layer.update(step[:2] * 2, step[:2])
    assert torch.equal(keys[1], torch.cat([first[0], step[2], step[1] * 2], dim=1))
    assert layer.keys.data_ptr() == place
    assert (layer.get_seq_length(), layer.get_max_length()) == (6, 8)


def test_models_that_keep_more_than_keys_and_values_use_their_own_cache():
    assert len(roomy(LlamaConfig(num_hidden_layers=3), 2, 9).layers) == 3
    window = Gemma2Config(num_hidden_layers=2, sliding_window=12)
    assert roomy(window, 2, 12) is not None
    assert roomy(window, 2, 13) is None
    assert roomy(Qwen3NextConfig(num_hidden_layers=4), 2, 9) is None


@pytest.mark.parametrize(("layers", "computed"), [([0], 0), ([1], 1), ([2, 1], 2)])
def test_nothing_above_the_highest_layer_is_computed(language, layers, computed):
    ran = []
    for layer in language.layers:
        layer.register_forward_pre_hook(lambda m, a: ran.append(m))
    head = language.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda m, a: pytest.fail("logits were computed"))
    with Capture(language, {"x": layers, "y": layers[:1]}, "normed") as capture:
        reader = rows_at([0], [3])
        found = read(language, [SHARED[:4]], capture, {"x": reader, "y": reader})
    assert len(ran) == max(computed, 1)  # the input of the first layer is seen as it begins
    with torch.inference_mode():
        hidden = language.model.base_model(
            torch.tensor([SHARED[:4]]), output_hidden_states=True
        ).hidden_states
    wanted = torch.stack([hidden[n][0, -1] for n in layers]).float()
    assert torch.equal(found["x"][0], wanted)
    assert torch.equal(found["y"][0], wanted[:1])
