"""What is kept of an answer, and why one is refused."""

import pytest

from knowledge_extract.phrasing import Rules, fault, is_enough, kept, names_class

SENTENCE = Rules("sentence", 12, avoid_name=False)
PHRASE = Rules("phrase", 5, avoid_name=True)
QUESTION = "What is the typical colour of a basophil in microscopy?"


@pytest.mark.parametrize(
    ("answer", "sentence", "phrase"),
    [
        (" The cell is dark. It is", "The cell is dark.", "cell is dark"),
        ("1. - **A large cell**\nB", "A large cell", "large cell"),
        (
            "It is 3.5 µm wide, i.e. small. Yes",
            "It is 3.5 µm wide, i.e. small.",
            "It is 3.5 µm wide",
        ),
        ('"usually a pale blue (or violet)"', "usually a pale blue (or violet)", "pale blue"),
        ("well-rounded - and flat", "well-rounded - and flat", "well-rounded"),
        ('a "spindle" cell, red', 'a "spindle" cell, red', "spindle cell"),
        ("\n", "", ""),
    ],
)
def test_what_is_kept(answer, sentence, phrase):
    assert kept(answer, SENTENCE) == sentence
    assert kept(answer, PHRASE) == phrase


@pytest.mark.parametrize(
    ("answer", "sentence", "phrase"),
    [
        (" The cell is dark.", True, True),
        (" The cell is dark", False, False),
        (" The cell, dark", False, True),
        (" It is 3.", False, False),
        (" It is large, e.g.", False, True),
        ("\n", False, False),
        ("dark\n", True, True),
        (" one two three four five six", False, True),
        (" usually a two three four five six", False, False),
    ],
)
def test_when_no_more_tokens_are_needed(answer, sentence, phrase):
    assert is_enough(answer, SENTENCE) is sentence
    assert is_enough(answer, PHRASE) is phrase


@pytest.mark.parametrize(
    ("text", "rules", "reason"),
    [
        ("The nucleus has two lobes.", SENTENCE, ""),
        ("Dark cell.", SENTENCE, "empty"),
        ("--", PHRASE, "empty"),
        (" ".join(["word"] * 13), SENTENCE, "too long"),
        ("dark blue or nearly black granules", PHRASE, "too long"),
        ("blue! or not", PHRASE, "not a single phrase"),
        ("The features of this cell:", SENTENCE, "a heading"),
        ("Sure, here is a list of features.", SENTENCE, "not about the question"),
        ("I'm sorry but I cannot see.", SENTENCE, "not about the question"),
        ("typical colour", PHRASE, "repeats the question"),
        (
            "What is the typical colour of a basophil in microscopy?",
            SENTENCE,
            "repeats the question",
        ),
        ("basophilic granules", PHRASE, "names the class"),
        ("The basophil is dark.", SENTENCE, ""),
        ("dark blue", PHRASE, ""),
    ],
)
def test_why_one_is_refused(text, rules, reason):
    assert fault(text, "basophil", QUESTION, rules, cut_off=False) == reason


def test_an_answer_that_may_go_on_is_refused():
    assert fault("dark blue", "basophil", QUESTION, PHRASE, cut_off=True) == "cut off"


@pytest.mark.parametrize(
    ("text", "name", "holds"),
    [
        ("two Lymphocytes", "lymphocyte", True),
        ("a left side", "left kidney", True),
        ("another shape", "immature granulocytes(myelocytes and other)", False),
        ("metamyelocyte", "immature granulocytes(myelocytes and other)", True),
        ("an IG cell", "ig", True),
        ("a big cell", "ig", False),
    ],
)
def test_the_name_of_a_class(text, name, holds):
    assert names_class(text, name) is holds
