"""The card of a cache: what it is, what made it and how to cite it, as Markdown.

Everything in a cache may come from a stranger, so every text is escaped before it stands in the
card: it can neither format, link nor hide anything.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.combining.joining import recipes_of, texts_of
from cache.inspect import safe_text, verify
from cache.recipe import canonical_json
from cache.sharing.licences import describe_licences
from cache.store import Block, KnowledgeCache

LONGEST = 500  # characters of a foreign text
_MARKED = re.compile(r"([\\`*_\[\]|~#!@$]|:(?=\S)|(?<=www)\.|^[-+=])", re.IGNORECASE)
_NUMBERED = re.compile(r"^(\d+)([.)])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escaped(text: object) -> str:
    """A foreign text for Markdown: one line, without markup, links or hidden characters."""
    shown = safe_text(" ".join(str(text).split()), LONGEST)
    shown = _NUMBERED.sub(r"\1\\\2", _MARKED.sub(r"\\\1", shown))
    return "".join(_HTML.get(character, character) for character in shown)


def card(file: Path) -> str:
    """The card of a cache, as Markdown. The file is verified in full first.

    Raises:
        CacheFormatError: missing, foreign or damaged.
    """
    identity = verify(file).content_id
    with KnowledgeCache.open(file, expect=identity) as found:
        return "\n".join(_lines(found)) + "\n"


def _lines(found: KnowledgeCache) -> Iterator[str]:
    yield from ("---", "library_name: vademecum", "tags: [knowledge-cache]", "---", "")
    yield f"# Knowledge cache of {escaped(found.dataset)}"
    yield ""
    yield "Hidden states and texts that language models gave for the classes of a data set,"
    yield "computed once and sealed into one HDF5 file."
    yield from _section("Citing and pinning", _pinning(found.content_id))
    yield from _section("Contents", _contents(found))
    yield from _section("Classes", _classes(found))
    yield from _section("Source models", _models(found))
    yield from _section("Licence and notices", _licence(found.provenance))
    yield from _section("Privacy", _PRIVACY)
    yield from _section("Limits", _LIMITS)


_PRIVACY = (
    "The format has a place for class names, for texts about classes and for numbers computed from",
    "such texts; it has none for images, patients, persons, hosts, times or file paths, and the",
    "reader refuses paths. What the texts say is up to whoever wrote them: `vademecum cache push`",
    "looks for personal data before it passes a cache on.",
)
_LIMITS = (
    "Not a medical device. Texts of a language model may be wrong. For research only; nothing here",
    "may be used to diagnose or treat.",
)


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield from ("", f"## {title}", "", *lines)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _pinning(content_id: str) -> Iterator[str]:
    yield f"Content id: `{content_id}`"
    yield ""
    yield "It names the content, wherever the file lies. Cite it, and pin it:"
    yield ""
    yield "```"
    yield f"vademecum cache verify FILE --expect {content_id}"
    yield f'KnowledgeCache.open(path, expect="{content_id}")'
    yield "```"


def _contents(found: KnowledgeCache) -> Iterator[str]:
    entries = sum(map(len, found.blocks.values()))
    yield f"- data set: `{found.dataset}`"
    yield f"- classes: {len(found.classes)}"
    yield f"- blocks: {len(found.blocks)}, with {entries} entries"
    yield f"- size: {found.size} bytes ({found.size / 1e6:.2f} MB)"
    yield ""
    heads = ("block", "kind", "entries", "layers", "width", "dtype", "quantisation", "block id")
    yield from _table(heads, (_block(block) for block in found.blocks.values()))


def _block(block: Block) -> tuple[str, ...]:
    layers = f"{len(block.layers)} ({_ranges(block.layers)})" if block.layers else "-"
    quantisation = escaped(block.spec.get("quantisation", "-"))
    facts = (str(len(block)), layers, str(block.width or "-"), block.dtype or "-", quantisation)
    return (f"`{block.name}`", block.kind, *facts, f"`{block.id}`")


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in few characters.

    >>> _ranges((1, 2, 3, 30))
    '1-3, 30'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _classes(found: KnowledgeCache) -> Iterator[str]:
    rows = (
        (f"`{one.id}`", *(escaped(text) or "-" for text in (one.name, one.modality, one.source)))
        for one in found.classes
    )
    return _table(("id", "name", "modality", "source"), rows)


def _models(found: KnowledgeCache) -> Iterator[str]:
    models = {canonical_json(m): m for r in recipes_of(found.recipe) if (m := r.get("model"))}
    if not models:
        yield "The recipe names no model."
    for raw in sorted(models):
        yield from _model(models[raw])
    digests: dict[str, list[str]] = {}
    for block in found.blocks.values():
        if "model" in block.spec:
            facts = [f"{key} {block.spec[key]}" for key in _SETTINGS if key in block.spec]
            digests.setdefault(escaped(", ".join(facts)), []).append(f"`{block.name}`")
    yield from (f"- blocks {', '.join(names)}: {facts}" for facts, names in digests.items())


_SETTINGS = ("model", "tokenizer", "compute_dtype", "quantisation")


def _model(model: object) -> Iterator[str]:
    if not isinstance(model, Mapping):
        yield f"- model: {escaped(model)}"
        return
    for key, value in sorted(model.items()):
        if isinstance(value, Mapping | list) and len(canonical_json(value)) > LONGEST:
            yield f"- {escaped(key)}: {len(value)} values"
        else:
            yield f"- {escaped(key)}: {escaped(_plain(value))}"
    yield ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value).decode("ascii")


def _licence(provenance: Mapping[str, Any]) -> Iterator[str]:
    for line in describe_licences(provenance):
        indented = line.startswith(" ")
        yield ("  - " if indented else "- ") + escaped(line.strip().removeprefix("- "))
    yield ""
    for key, text in sorted(provenance.items()):
        shown = " / ".join(escaped(one) for one in texts_of(str(text)))
        yield f"- {escaped(key)}: {shown}"
