"""What is kept of a sampled answer, and why one is refused.

An answer is read as its first sentence, or its first line where that ends before, without the marks
of a list and quotation marks; a phrase as the words before the first comma, semicolon, colon,
bracket or dash in it.

Words are runs of letters and digits, compared without case. The class's name stands in a text when
one of its words of four letters or more does, without the plural's s and also as a part of another
word ("basophilic"); where the name has only shorter words, when one of these does.
"""

import re
from dataclasses import dataclass
from typing import Literal

Form = Literal["sentence", "phrase"]

SMALL_WORDS = frozenset({"from", "other", "that", "this", "with", "without"})
_MARK = re.compile(r"^(?:[-*•>#]+|\(?\d{1,2}[.):]|[A-Za-z][.)])\s+|^[\"“'*_]+")
_END = re.compile(r"[.!?][\"”')]?(?=\s|$)")
_NO_END = re.compile(r"(?:\b(?:e\.g|i\.e|approx|etc|vs|cf|ca|fig|dr|no)|(?:^|[\s(])\w|\d)\.$", re.I)
_WORD = re.compile(r"[^\W_]+")
_TALK = re.compile(
    r"^(?:sure|certainly|of course|here (?:is|are)|here's|i|i'm|i’m|as an ai|sorry|answer"
    r"|the answer)\b",
    re.IGNORECASE,
)
_BREAK = re.compile(r"[,;:()\[\]–—]|\s-\s")
_BEFORE = re.compile(
    r"^(?:(?:an?|the|also|generally|mostly|normally|often|sometimes|typically|usually)\s+)+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Rules:
    """What an answer must be; see `asked.Sampled`."""

    form: Form
    max_words: int
    avoid_name: bool


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.casefold())


def _line(text: str) -> str:
    """The first line without list marks and quotes."""
    line = text.strip().partition("\n")[0].strip()
    while (bare := _MARK.sub("", line)) != line:
        line = bare
    return line.rstrip("\"”'*_ ")


def _first_sentence(line: str) -> str | None:
    for match in _END.finditer(line):
        if not _NO_END.search(line[: match.start() + 1]):
            return line[: match.end()]
    return None


def is_enough(text: str, rules: Rules) -> bool:
    """True if more tokens would change nothing about what is kept of an answer."""
    line = _line(text)
    if not line:
        return False
    if "\n" in text.lstrip() or len(words(kept(text, rules))) > rules.max_words:
        return True
    broken = rules.form == "phrase" and _BREAK.search(line, 1) is not None
    return broken or _first_sentence(line) is not None


def kept(text: str, rules: Rules) -> str:
    """The sentence or phrase in an answer; the whole line where it has no end."""
    line = _line(text)
    line = _first_sentence(line) or line
    if rules.form == "sentence":
        return line
    phrase = re.sub('["“”*]', "", _BREAK.split(line, maxsplit=1)[0].rstrip("."))
    return _BEFORE.sub("", phrase).strip("'_ ")


def names_class(text: str, name: str) -> bool:
    """True if a text holds a word of a class's name, also inside another word."""
    own = words(name)
    telling = [w for w in own if len(w) >= 4 and w not in SMALL_WORDS]
    if not telling:
        return not set(own).isdisjoint(words(text))
    stems = [word.rstrip("s") for word in telling]
    return any(stem in word for stem in stems for word in words(text))


def fault(text: str, name: str, question: str, rules: Rules, *, cut_off: bool) -> str:
    """Why a kept text is refused, in a few words; empty if it is sound.

    Args:
        text: what was kept of the answer.
        name: of the class.
        question: as it was asked, without the chat template.
        rules: what it must be.
        cut_off: whether it may be no more than a part of what the model would have written.
    """
    own = words(text)
    asked = " ".join(words(question))
    phrase = rules.form == "phrase"
    faults = {
        "empty": not own or (not phrase and len(own) < 3),
        "too long": len(own) > rules.max_words,
        "cut off": cut_off,
        "not a single phrase": phrase and bool(re.search(r"[!?|=]|\.\s", text)),
        "a heading": text.endswith(":"),
        "not about the question": bool(_TALK.match(text)),
        "repeats the question": bool(own)
        and (" " + " ".join(own) + " " in f" {asked} " or asked in " ".join(own)),
        "names the class": rules.avoid_name and names_class(text, name),
    }
    return next((reason for reason, holds in faults.items() if holds), "")
