"""Texts to token ids: chat templates, start tokens, and the one end token."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache.errors import ModelError, RecipeError
from cache.recipe import digest_of
from knowledge_extract.quiet import quiet
from knowledge_extract.source import ModelSource

# Some chat templates write today's date; a cache must not depend on the day it was made.
FIXED_DATE = "26 Jul 2024"
NO_CLOCK = "{% macro strftime_now(format) %}" + FIXED_DATE + "{% endmacro %}"


@dataclass(frozen=True)
class Reading:
    """A text as the model reads it.

    Args:
        text: after the template, special tokens included where the template writes them.
        ids: token ids.
        content: which of them come from the text and not from the tokenizer's own additions.
    """

    text: str
    ids: tuple[int, ...]
    content: tuple[bool, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of what the model reads."""
        return digest_of({"text": self.text, "ids": list(self.ids)})


def end_tokens(generation: Any, config: Any, tokenizer: Any) -> tuple[int, frozenset[int]]:
    """The model's end token, and every token at which generation stops.

    The stops are `eos_token_id` of the generation config, else of the config, else of the
    tokenizer. Of several, the tokenizer's own end token is *the* end token; if it is not among
    them, the first is. It closes the sequence of every class, also where an answer was cut off or
    stopped at another one, so that the states of all classes are states of the same token.

    Raises:
        ModelError: the model names no end token.
    """
    for owner in (generation, config, tokenizer):
        given = getattr(owner, "eos_token_id", None)
        if given is not None and given != []:
            stops = [given] if isinstance(given, int) else [int(i) for i in given]
            own = getattr(tokenizer, "eos_token_id", None)
            return (own if own in stops else stops[0]), frozenset(stops)
    what = "the model names no end token, so its answers cannot be closed"
    raise ModelError(what, do="Set eos_token_id in its generation_config.json.")


class Prompter:
    """Turns questions and texts into token ids.

    Args:
        tokenizer: of the language model.
        chat: `auto` uses the tokenizer's chat template where it has one, `always` demands it,
            `never` ignores it.

    Raises:
        ModelError: `always`, and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, chat: str) -> None:
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        if chat == "always" and not template:
            what = "chat_template is 'always', and the tokenizer has no chat template"
            raise ModelError(what, do="Use auto or never.")
        self.chat = bool(template) and chat != "never"
        self.template_digest = digest_of({"chat": template if self.chat else None})

    def question(self, text: str, begin: str = "") -> Reading:
        """A question as one user turn with the opening of the answer, or as plain text.

        Args:
            text: of the question.
            begin: the first words of the answer.
        """
        if self.chat:
            template = self.tokenizer.get_chat_template()
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                chat_template=NO_CLOCK + template if "strftime_now" in template else template,
                add_generation_prompt=True,
                tokenize=False,
                date_string=FIXED_DATE,
            )
            return self._encode(text + begin, special=False)
        text = f"{text} {begin}" if begin else text
        reading = self._encode(text, special=True)
        end = self.tokenizer.eos_token_id
        if len(reading.ids) > 1 and reading.ids[-1] == end and not reading.content[-1]:
            return Reading(text, reading.ids[:-1], reading.content[:-1])
        return reading

    def plain(self, text: str) -> Reading:
        """A text as it stands, with the tokenizer's own start token if it adds one."""
        return self._encode(text, special=True)

    def decode(self, ids: Sequence[int], *, strip: bool = True) -> str:
        """Generated ids as text, without special tokens and outer white space."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return text.strip() if strip else text

    def _encode(self, text: str, *, special: bool) -> Reading:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self.tokenizer(
                text, add_special_tokens=special, return_special_tokens_mask=True, verbose=False
            )
        ids = list(made["input_ids"])
        # With special=False every token is content, also those a chat template wrote.
        content = [not (special and added) for added in made["special_tokens_mask"]]
        start = getattr(self.tokenizer, "bos_token_id", None)
        while start is not None and len(ids) > 1 and ids[0] == ids[1] == start:
            del ids[1], content[1]
        if not any(content):
            what = "a text has no token"
            raise RecipeError(what, found=repr(text))
        return Reading(text, tuple(ids), tuple(content))


def load_prompter(source: ModelSource, chat: str) -> Prompter:
    """The tokenizer of a source with a chat mode.

    Raises:
        ModelError: the tokenizer cannot be loaded, or has no template and must.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.texts(), **source.hub_options())
    except (OSError, ValueError, ImportError) as error:
        what = "the tokenizer cannot be loaded"
        raise ModelError(what, where=source.label, found=str(error)[:300]) from error
    return Prompter(tokenizer, chat)


def load_configs(source: ModelSource) -> tuple[Any, Any]:
    """The model's configuration and generation configuration (None where it has none).

    Raises:
        ModelError: the configuration cannot be read.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.texts(), **source.hub_options())
    except (OSError, ValueError, KeyError) as error:
        what = "the model's configuration cannot be read"
        raise ModelError(what, where=source.label, found=str(error)[:300]) from error
    try:
        with quiet():
            generation = GenerationConfig.from_pretrained(source.texts(), **source.hub_options())
    except OSError:
        generation = None
    return config, generation
