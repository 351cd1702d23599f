"""Token ids: start tokens, chat templates, end tokens."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache.errors import ModelError, RecipeError
from knowledge_extract.prompts import FIXED_DATE, Prompter, end_tokens

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)
BOS, EOS = tiny.BOS, tiny.EOS


def tokens(prompter, reading):
    return prompter.tokenizer.convert_ids_to_tokens(list(reading.ids))


def test_chat_template_with_its_own_start_token_is_not_given_another():
    prompter = Prompter(tiny.byte_tokenizer(chat=tiny.CHAT, start=True), "auto")
    reading = prompter.question("Hi")
    assert tokens(prompter, reading) == ["<s>", "<|user|>", "H", "i", "<|bot|>"]
    assert reading.text == "<s><|user|>Hi<|bot|>"


def test_a_template_without_a_start_token_is_left_without_one():
    """As the library's own `apply_chat_template(tokenize=True)` does."""
    prompter = Prompter(tiny.byte_tokenizer(chat=tiny.CHAT.removeprefix("<s>")), "auto")
    assert tokens(prompter, prompter.question("Hi")) == ["<|user|>", "H", "i", "<|bot|>"]


def test_a_template_that_doubles_the_start_token_is_repaired():
    prompter = Prompter(tiny.byte_tokenizer(chat="<s>" + tiny.CHAT), "always")
    assert tokens(prompter, prompter.question("Hi")).count("<s>") == 1


@pytest.mark.parametrize("start", [True, False])
def test_plain_text_keeps_the_start_token_the_tokenizer_adds(start):
    prompter = Prompter(tiny.byte_tokenizer(start=start), "auto")
    for reading in (prompter.question("Hi"), prompter.plain("Hi")):
        assert tokens(prompter, reading) == ["<s>"] * start + ["H", "i"]
        assert reading.content == (False,) * start + (True, True)


def test_a_text_that_writes_a_start_token_does_not_double_it():
    prompter = Prompter(tiny.byte_tokenizer(start=True), "never")
    assert tokens(prompter, prompter.plain("<s>Hi")) == ["<s>", "H", "i"]


def test_never_ignores_a_chat_template():
    prompter = Prompter(tiny.byte_tokenizer(chat=tiny.CHAT), "never")
    assert tokens(prompter, prompter.question("Hi")) == ["<s>", "H", "i"]
    assert prompter.template_digest != Prompter(prompter.tokenizer, "auto").template_digest


def test_always_needs_a_chat_template():
    with pytest.raises(ModelError, match="'always', and the tokenizer has no chat template"):
        Prompter(tiny.byte_tokenizer(), "always")


def test_an_end_token_the_tokenizer_appends_does_not_end_the_prompt():
    from tokenizers import processors

    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    prompter = Prompter(tokenizer, "auto")
    assert tokens(prompter, prompter.question("Hi")) == ["H", "i"]
    assert prompter.plain("Hi").content == (True, True, False)


def test_a_template_that_writes_the_date_gives_the_same_text_on_any_day():
    template = "{{ strftime_now('%d %b %Y') }}|{{ date_string }}|{{ messages[0]['content'] }}"
    prompter = Prompter(tiny.byte_tokenizer(chat=template), "auto")
    assert prompter.question("Hi").text == f"{FIXED_DATE}|{FIXED_DATE}|Hi"


def test_a_text_without_a_token_is_refused():
    with pytest.raises(RecipeError, match="a text has no token; found ''"):
        Prompter(tiny.byte_tokenizer(), "auto").plain("")


@pytest.mark.parametrize(
    ("generation", "config", "own", "wanted"),
    [
        (7, 8, 9, (7, {7})),
        (None, 8, 9, (8, {8})),
        (None, None, 9, (9, {9})),
        ([7, 9], 8, 9, (9, {7, 9})),  # the tokenizer's own, where it is among them
        ([7, 6], 8, 9, (7, {6, 7})),  # else the first
    ],
)
def test_the_rule_for_the_end_token(generation, config, own, wanted):
    owners = [SimpleNamespace(eos_token_id=i) for i in (generation, config, own)]
    assert end_tokens(*owners) == wanted


def test_a_model_without_an_end_token_is_refused():
    with pytest.raises(ModelError, match="names no end token"):
        end_tokens(None, SimpleNamespace(eos_token_id=None), SimpleNamespace(eos_token_id=None))


def test_decoding_leaves_special_tokens_out():
    prompter = Prompter(tiny.byte_tokenizer(), "auto")
    ids = [*prompter.tokenizer(" né", add_special_tokens=False)["input_ids"], tiny.STOP]
    assert prompter.decode(ids) == "né"
