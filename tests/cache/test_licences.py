"""What is known of licences, and what a push asks before it goes on."""

import pytest

from cache.recipe import canonical_json
from cache.sharing.licences import (
    REFUSED,
    STRICTNESS,
    TABLE,
    describe_licences,
    gate_of,
    licence_of,
    licences_of,
    notice,
)

KNOWN = {
    "permissive": (
        "Apache-2.0",
        "apache-2.0",
        "MIT",
        "bsd",
        "BSD-3-Clause",
        "cc-by-4.0",
        "CC0-1.0",
    ),
    "copyleft": ("cc-by-sa-4.0", "gpl-3.0", "AGPL-3.0-only", "mpl-2.0"),
    "custom": ("llama2", "llama3", "Llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "qwen"),
    "no-derivatives": ("cc-by-nd-4.0", "CC-BY-ND-4.0"),
    "non-commercial": ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "CC-BY-NC-ND-4.0", "qwen-research"),
    "unknown": ("other", "unknown", "", "Apache-2.0 with the Commons Clause", "mit-ish", "llama5"),
}


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, ts in KNOWN.items() for t in ts])
def test_a_licence_is_classed_by_its_id_in_any_case(kind: str, text: str) -> None:
    assert licence_of(text).kind == kind


def test_exactly_the_strict_kinds_are_refused() -> None:
    assert {"no-derivatives", "non-commercial", "unknown"} == REFUSED
    assert {row.kind for row in TABLE} | {"unknown"} == set(STRICTNESS)


def test_no_row_is_hidden_behind_a_more_lenient_one() -> None:
    for row in TABLE:
        for name in row.names:
            example = name.replace("[0-9]", "4").replace("*", "")
            assert licence_of(example).kind == row.kind, name


def test_the_stricter_of_two_rows_that_fit_counts() -> None:
    duties = licence_of("cc-by-nc-nd-4.0").duties
    assert "Changed material must not be passed on." in duties


def test_llama_licences_come_with_their_duties() -> None:
    three, later = licence_of("llama3").duties, licence_of("llama3.1").duties
    assert any("Built with Meta Llama 3" in duty for duty in three)
    assert any("must not be used to improve any other" in duty for duty in three)
    assert not any("must not be used to improve any other" in duty for duty in later)
    assert any('must begin with "Llama"' in duty for duty in later)


def test_of_merged_caches_the_strictest_licence_counts_and_all_are_shown() -> None:
    texts = canonical_json(["Apache-2.0", "cc-by-nc-4.0"]).decode()
    gates = canonical_json(["no", "yes"]).decode()
    provenance = {"model_licence": texts, "model_gated": gates}
    assert [one.kind for one in licences_of(provenance)] == ["non-commercial", "permissive"]
    assert gate_of(provenance) == "no and yes"
    lines = describe_licences(provenance)
    assert "licence Apache-2.0: permissive" in lines
    assert "licence cc-by-nc-4.0: non-commercial" in lines
    assert "gated: no and yes" in lines


def test_a_cache_without_a_licence_has_an_unknown_one() -> None:
    assert describe_licences({"model": "org/name"})[0] == "licence not stated: unknown"
    assert licences_of({"x_licence": "MIT", "licence": "gpl-3.0"})[0].kind == "copyleft"


def test_a_text_that_only_looks_like_a_list_is_one_licence() -> None:
    for text in ("[Apache-2.0", '["Apache-2.0", 1]', '["mit",  "isc"]'):
        assert [one.kind for one in licences_of({"licence": text})] == ["unknown"]


def test_the_notice_names_content_model_licence_and_duties() -> None:
    text = notice("ab" * 32, {"model": "org/name", "model_licence": "apache-2.0"})
    assert text.startswith(f"Knowledge cache {'ab' * 32}\nmade with: org/name\n")
    assert "licence apache-2.0: permissive" in text
    assert "  - Pass a copy of the licence on." in text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("cc-by-2.0 and cc-by-nc-2.0", "non-commercial"),
        ("Apache-2.0 or MIT", "permissive"),
        ("mit, cc-by-nd-4.0", "no-derivatives"),
        ("apache-2.0/gemma", "custom"),
        ("cc-by-4.0-nc", "unknown"),
        ("bsd-nc", "unknown"),
        ("bsd-3-clause-no-military", "unknown"),
        ("some-non-commercial-licence", "unknown"),
        ("cc-by-4.0", "permissive"),
        ("cc-by-2.5", "permissive"),
    ],
)
def test_of_several_parts_the_strictest_counts(text, kind):
    assert licence_of(text).kind == kind
