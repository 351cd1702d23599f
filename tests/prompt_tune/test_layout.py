"""Where the parts of a prompt stand, and what is refused."""

from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from cache.errors import ModelError, PromptOverflowError
from prompt_tune.towers.layout import PromptLayout, Stage
from prompt_tune.towers.tokens import token_ids


@pytest.fixture(scope="module")
def causal() -> SimpleNamespace:
    tokenizer = SimpleTokenizer()
    return SimpleNamespace(context_length=77, tokenize=lambda texts: token_ids(tokenizer, texts))


def places(layout: PromptLayout, c: int) -> dict[str, list[int]]:
    return {
        name: list(part.positions[c if part.classes > 1 else 0])
        for name, part in layout.parts.items()
    }


def test_every_class_has_its_own_positions_in_the_order_of_the_method(causal):
    layout = PromptLayout.build(
        causal, ["cat", "brown_dog"], n_context=4, row_counts=[5, 3], intervened=(2, 1)
    )
    assert places(layout, 0) == {
        "start": [0],
        "context": [1, 2, 3, 4],
        "prefix": [5, 6],
        "middle": [7, 8],
        "suffix": [9],
        "name": [10, 11],
        "end": [12],
    }
    assert places(layout, 1) == {
        "start": [0],
        "context": [1, 2, 3, 4],
        "prefix": [5, 6],
        "middle": [],
        "suffix": [7],
        "name": [8, 9, 10],
        "end": [11],
    }
    assert layout.lengths == (13, 12)
    assert layout.class_names == ("cat", "brown dog")


def test_name_tokens_are_those_of_the_whole_sentence(causal):
    names = ["basophil", "granulocytes (promyelocytes, myelocytes)", "dyed-lifted polyps"]
    layout = PromptLayout.build(causal, names, n_context=4)
    whole = open_clip.tokenize([f"a photo of a {name}." for name in names])
    for ids, name, length in zip(whole, layout.name_ids, layout.lengths, strict=True):
        # The published end position: start + context + tokens of the name + ".".
        assert int(ids.argmax()) == length - 1
        assert ids[5:length].tolist() == [*name, layout.end_id]
    assert int(whole[0, 0]) == layout.start_id


def test_prompts_without_rows_have_no_parts_for_them(causal):
    layout = PromptLayout.build(causal, ["cat"], n_context=0)
    assert set(layout.parts) == {"start", "name", "end"}


def test_the_ending_is_tokenised_with_the_name(causal):
    ids = token_ids(SimpleTokenizer(), ["cat, a scan."])[0]
    layout = PromptLayout.build(causal, ["cat"], n_context=1, ending=", a scan.")
    assert [layout.start_id, *layout.name_ids[0], layout.end_id] == ids


def test_a_prompt_that_is_too_long_is_counted_out(causal):
    with pytest.raises(PromptOverflowError) as caught:
        PromptLayout.build(
            causal, ["cat", "large brown dog seen"], n_context=4, row_counts=[60, 72]
        )
    assert str(caught.value) == (
        "class 'large brown dog seen': the prompt is longer than the text tower's context; "
        "found 83 tokens (1 start + 4 context + 72 knowledge + 5 name + 1 end), "
        "wanted at most 77. Lower knowledge.keep or method.n_context, or shorten the class name."
    )


def test_a_prompt_of_exactly_the_context_is_accepted(causal):
    layout = PromptLayout.build(causal, ["cat"], n_context=4, row_counts=[69])
    assert layout.lengths == (77,)
    with pytest.raises(PromptOverflowError, match="found 78 tokens"):
        PromptLayout.build(causal, ["cat"], n_context=4, row_counts=[70])


def test_without_rows_the_message_does_not_name_them(causal):
    with pytest.raises(PromptOverflowError, match=r"\(1 start \+ 80 context \+ 2 name") as caught:
        PromptLayout.build(causal, ["cat"], n_context=80)
    assert "knowledge" not in str(caught.value)


def test_too_few_rows_name_the_class(causal):
    with pytest.raises(ModelError) as caught:
        PromptLayout.build(
            causal, ["cat", "dog"], n_context=4, row_counts=[8, 7], intervened=(4, 4)
        )
    assert str(caught.value) == (
        "class 'dog': too few knowledge rows to intervene on; found 7, "
        "wanted at least 8 (4 prefix + 4 suffix). "
        "Store more rows, or lower method.prefix and method.suffix."
    )


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(None), "whether there is a context"),
        (Stage(torch.zeros(3, 8)), r"context has shape \(3, 8\)"),
        (Stage(torch.zeros(4, 8), prefix=torch.zeros(1, 2, 1, 8)), "whether there is a prefix"),
        (Stage(torch.zeros(3, 4, 8)), r"context has shape \(3, 4, 8\)"),
    ],
)
def test_a_stage_that_does_not_fit_is_refused(causal, stage, message):
    layout = PromptLayout.build(causal, ["cat", "dog"], n_context=4)
    with pytest.raises(ValueError, match=message):
        layout.streams(stage, torch.float32, complete=True)


def test_row_counts_for_other_classes_are_refused(causal):
    with pytest.raises(ValueError, match="1 row counts for 2 classes"):
        PromptLayout.build(causal, ["cat", "dog"], n_context=4, row_counts=[3])


def test_another_tokenizer_is_named():
    with pytest.raises(ModelError, match="tokenizer is not supported; found object"):
        token_ids(object(), ["cat"])
