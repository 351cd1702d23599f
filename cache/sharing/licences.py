"""Licences of language models: what they allow, and what whoever passes a cache on must do.

A cache holds what a model computed. Whether that falls under the model's licence is a question for
a lawyer; this table only says what the licence is and what its text asks of material under it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from cache.combining.joining import texts_of

Kind = Literal[
    "permissive", "copyleft", "custom", "no-derivatives", "non-commercial", "unknown"
]  # from lenient to strict
STRICTNESS: tuple[Kind, ...] = (
    "permissive",
    "copyleft",
    "custom",
    "no-derivatives",
    "non-commercial",
    "unknown",
)
REFUSED: frozenset[Kind] = frozenset({"no-derivatives", "non-commercial", "unknown"})
READ = "Read the licence before you pass anything on."


@dataclass(frozen=True)
class Licence:
    """One row of the table, or what a cache says.

    Args:
        names: patterns of SPDX ids and hub tags, in lower case; in a found licence, its one text.
        kind: what it is, for the gate of `push`.
        duties: what it asks of whoever passes material on.
    """

    names: tuple[str, ...]
    kind: Kind
    duties: tuple[str, ...] = ()


_KEEP = "Keep the copyright and licence notice."
_CREDIT = "Name the authors, link the licence and say what was changed."
_LLAMA = (
    "Pass a copy of the agreement on with the material.",
    "Keep the attribution notice of the agreement in a file called Notice.",
    "Services with more than 700 million users a month need another licence.",
    "Follow the acceptable use policy.",
)
_OUTPUTS = (
    "If outputs are used to train or improve a model that is passed on, its name must begin "
    'with "Llama".'
)


def _llama(version: str, built: str, *more: str) -> tuple[str, ...]:
    return (f'Show "{built}" prominently.', *_LLAMA, *more, f"Llama {version}: {READ}")


# The first match counts: the stricter rows stand first.
TABLE: tuple[Licence, ...] = (
    Licence(
        ("cc-by-nc-nd*",),
        "non-commercial",
        (_CREDIT, "No commercial use.", "Changed material must not be passed on."),
    ),
    Licence(
        ("cc-by-nc-sa*",),
        "non-commercial",
        (_CREDIT, "No commercial use.", "Pass changed material on under the same licence."),
    ),
    Licence(("cc-by-nc*",), "non-commercial", (_CREDIT, "No commercial use.")),
    Licence(
        (
            "qwen-research*",
            "h-research",
            "intel-research",
            "apple-amlr",
            "fair-noncommercial-research-license",
            "mnpl*",
            "mrl*",
            "c-uda",
        ),
        "non-commercial",
        ("For research or non-commercial use only.", READ),
    ),
    Licence(("cc-by-nd*",), "no-derivatives", (_CREDIT, "Changed material must not be passed on.")),
    Licence(
        ("apache-2.0",),
        "permissive",
        (_KEEP, "Pass a copy of the licence on.", "Keep the NOTICE file, if there is one."),
    ),
    Licence(
        (
            "mit",
            "mit-0",
            "isc",
            "bsd",
            "bsd-2-clause",
            "bsd-3-clause",
            "0bsd",
            "ncsa",
            "zlib",
            "bsl-1.0",
            "afl-3.0",
        ),
        "permissive",
        (_KEEP,),
    ),
    Licence(("postgresql", "ms-pl", "ecl-2.0", "cdla-permissive-*"), "permissive", (_KEEP,)),
    Licence(("unlicense", "cc0-1.0", "pddl", "pddl-1.0", "wtfpl"), "permissive"),
    Licence(
        ("cc-by-sa-[0-9].0", "cc-by-sa-2.5"),
        "copyleft",
        (_CREDIT, "Pass changed material on under this licence."),
    ),
    Licence(
        ("cc-by-[0-9].0", "cc-by-2.5", "odc-by", "odc-by-1.0", "etalab-2.0"),
        "permissive",
        (_CREDIT,),
    ),
    Licence(
        ("gpl*", "agpl*", "lgpl*", "mpl-2.0", "epl-*", "eupl*", "osl-3.0", "odbl*", "gfdl*"),
        "copyleft",
        (_KEEP, "Pass changed material on under this licence.", READ),
    ),
    Licence(
        ("llama2", "llama-2"),
        "custom",
        (
            *_LLAMA,
            "Outputs must not be used to improve any other large language model.",
            f"Llama 2: {READ}",
        ),
    ),
    Licence(
        ("llama3", "llama-3"),
        "custom",
        _llama(
            "3",
            "Built with Meta Llama 3",
            'A model improved with the materials must have a name that begins with "Llama 3".',
            "Outputs must not be used to improve any other large language model.",
        ),
    ),
    Licence(("llama3.1", "llama-3.1"), "custom", _llama("3.1", "Built with Llama", _OUTPUTS)),
    Licence(("llama3.2", "llama-3.2"), "custom", _llama("3.2", "Built with Llama", _OUTPUTS)),
    Licence(("llama3.3", "llama-3.3"), "custom", _llama("3.3", "Built with Llama", _OUTPUTS)),
    Licence(("llama4", "llama-4"), "custom", _llama("4", "Built with Llama", _OUTPUTS)),
    Licence(
        ("gemma", "gemma-terms-of-use"),
        "custom",
        (
            "Pass the Gemma Terms of Use and their use restrictions on.",
            "Add the notice that the Gemma Terms of Use ask for.",
            READ,
        ),
    ),
    Licence(("health-ai-developer-foundations", "hai-def"), "custom", (READ,)),
    Licence(("qwen", "tongyi-qianwen*", "deepseek*", "apple-ascl"), "custom", (READ,)),
    Licence(
        ("openrail", "openrail++", "*-openrail-m", "bigscience-bloom-rail-1.0"),
        "custom",
        ("Pass the use restrictions of the licence on.", READ),
    ),
)


_RESTRICTED = {"nc", "noncommercial", "commercial"}  # as a word of a tag


def _row(tag: str) -> Licence | None:
    return next((r for r in TABLE if any(fnmatchcase(tag, p) for p in r.names)), None)


def licence_of(text: str) -> Licence:
    """What is known of a licence by its SPDX id or hub tag, in any case; unknown if nothing."""
    tag = "-".join(text.strip().casefold().split())
    words = set(re.split(r"[^a-z0-9.+]+", tag))
    parts = [part for part in re.split(r"-(?:and|or)-|[,;/&()]+", tag) if part.strip("-")]
    row = _row(tag)
    if row is not None and (row.kind in REFUSED or not words & _RESTRICTED):
        return Licence((text.strip(),), row.kind, row.duties)
    if len(parts) > 1 or words & _RESTRICTED:  # the strictest part counts
        rows = [_row(part.strip("-")) for part in parts]
        kinds: list[Kind] = [one.kind if one else "unknown" for one in rows]
        kinds += ["non-commercial"] if words & _RESTRICTED else []
        duties = dict.fromkeys(duty for one in rows if one for duty in one.duties)
        strictest = max(kinds, key=STRICTNESS.index)
        return Licence((text.strip(),), strictest, (*duties, READ))
    return Licence((text.strip() or "not stated",), "unknown", (READ,))


def _about_licence(key: str) -> bool:
    return key in {"licence", "license"} or key.endswith(("_licence", "_license"))


def licences_of(provenance: Mapping[str, Any]) -> tuple[Licence, ...]:
    """Every licence a cache names, the strictest first; one unknown if it names none."""
    texts = {t for k, v in provenance.items() if _about_licence(k) for t in texts_of(str(v))}
    found = [licence_of(text) for text in sorted(texts or {""})]
    return tuple(sorted(found, key=lambda one: -STRICTNESS.index(one.kind)))


def gate_of(provenance: Mapping[str, Any]) -> str:
    """Whether the page of the source model asks for consent: yes, no, both or not stated."""
    found = sorted(set(texts_of(str(provenance.get("model_gated", "not stated")))))
    return " and ".join(found)


def describe_licences(provenance: Mapping[str, Any]) -> list[str]:
    """Licence, gate and duties of what a cache was made of, as lines."""
    lines = []
    for licence in licences_of(provenance):
        lines.append(f"licence {licence.names[0]}: {licence.kind}")
        lines += [f"  - {duty}" for duty in licence.duties]
    lines.append(f"gated: {gate_of(provenance)}")
    return lines


def notice(content_id: str, provenance: Mapping[str, Any]) -> str:
    """The text of the NOTICE that travels with a cache."""
    keys = ["model", "notice", *sorted(k for k in provenance if k.endswith(("_model", "_source")))]
    models = [t for key in keys for t in texts_of(str(provenance.get(key, ""))) if t]
    lines = [f"Knowledge cache {content_id}", *(f"made with: {one}" for one in models)]
    return "\n".join([*lines, "", *describe_licences(provenance), ""])
