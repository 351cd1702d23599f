"""Caches of every released format open for ever, with the values they were made with."""

import importlib.util
import json
from pathlib import Path

import pytest

from cache import verify
from cache.header import FORMAT

FROZEN = Path(__file__).resolve().parent.parent / "frozen"


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_a_frozen_cache_gives_what_was_recorded(root, number):
    path = FROZEN / f"format-{number}.h5"
    recorded = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert module_at(FROZEN / "freeze.py").facts(path) == recorded
    assert verify(path, expect=recorded["content_id"]).entries == 24
    kinds = {block["kind"] for block in recorded["blocks"].values()}
    assert kinds == {"states", "embeddings", "texts", "attributes"}
    identity, entries = module_at(root / "docs" / "read_cache.py").read(path)
    assert (identity, len(entries)) == (recorded["content_id"], 24)


def test_the_content_id_of_format_1_is_the_one_that_was_published():
    recorded = json.loads((FROZEN / "format-1.json").read_text("utf-8"))
    golden = "d6b2e99d7b24714fc422a1ede94ffb2829604effbbc05a8abaf2e1f2e0ca411d"
    assert recorded["content_id"] == golden
