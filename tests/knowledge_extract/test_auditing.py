"""Auditing: what a cache holds is what its model says."""

import json

import numpy as np
import pytest

from cache.blocks import Entry
from cache.errors import CacheMismatchError, ModelError
from cache.extraction import ExtractionHeader
from cache.folder import ShardFolder
from cache.sealing import seal
from cache.store import KnowledgeCache
from knowledge_extract import extract
from knowledge_extract.auditing import AuditReport, Finding, audit
from knowledge_extract.settings import RunSettings
from knowledge_extract.tolerance import COMPUTE, tolerance

CPU = RunSettings(device="cpu", batch_size=3)


@pytest.fixture
def model(model_folder):
    return str(model_folder("llama"))


@pytest.fixture
def honest(make_recipe, tmp_path):
    extract(make_recipe(), tmp_path / "honest.h5", CPU)
    return tmp_path / "honest.h5"


def resealed(path, out, change=lambda e: e, **fields):
    """What a forger makes: another cache with the same header, every digest right."""
    with KnowledgeCache.open(path) as found:
        header = {
            "dataset": found.dataset,
            "classes": found.classes,
            "blocks": found.sealed.header.specs,
            "recipe": found.recipe,
            "provenance": found.provenance,
        }
        made = ExtractionHeader(**{**header, **fields})
        folder = ShardFolder(out.with_suffix(".parts"), header=made)
        entries = [change(entry) for block in found.blocks.values() for entry in block.entries()]
        folder.commit(entries, batch_shape=(1,))
        seal(folder, out)
    return out


def test_every_entry_of_an_honest_cache_agrees(honest, model):
    report = audit(honest, k=1000, model=model, run=CPU)
    assert report.passed
    assert len(report.findings) == report.entries == 31
    assert {one.verdict for one in report.findings} == {"agrees"}
    worst = max(one.difference for one in report.findings if one.difference is not None)
    assert 0 <= worst < COMPUTE["float32"]
    assert json.loads(json.dumps(report.to_json()))["passed"] is True
    assert report.describe().startswith("31 of 31 entries computed again: 31 agree\n")


def test_a_false_entry_is_named(honest, model, tmp_path):
    def change(entry):
        if (entry.block, entry.class_id) == ("layers", "monocyte"):
            values = entry.values["values"].copy()
            values[0, 1] *= 1.001
            return Entry(*_place(entry), {"values": values}, entry.source_digest)
        if (entry.block, entry.class_id, entry.item) == ("answers", "platelet", 0):
            other = {**entry.values, "text": "something kinder"}
            return Entry(*_place(entry), other, entry.source_digest)
        return entry

    report = audit(resealed(honest, tmp_path / "false.h5", change), k=1000, model=model, run=CPU)
    assert not report.passed
    wrong = {(e.block, e.class_id) for e in report.findings if e.verdict != "agrees"}
    assert wrong == {("layers", "monocyte"), ("answers", "platelet")}
    assert "differs: block layers, class monocyte, item 0: 0.001 of its norm" in report.describe()
    assert "differs: block answers, class platelet, item 0: another text" in report.describe()


def _place(entry):
    return entry.block, entry.class_id, entry.item


def test_the_file_cannot_talk_the_auditor_into_a_loose_tolerance(honest, model, tmp_path):
    def change(entry):
        if entry.block != "described":
            return entry
        values = np.asarray(entry.values["values"]) * np.float32(1.01)
        return Entry(*_place(entry), {"values": values}, entry.source_digest)

    with KnowledgeCache.open(honest) as found:
        loose = {**found.provenance, "tolerance.described": "1000"}
        assert found.provenance["tolerance.layers"] == "1e-05"
    forged = resealed(honest, tmp_path / "loose.h5", change, provenance=loose)
    assert not audit(forged, k=1000, model=model, run=CPU).passed
    assert audit(forged, k=1000, model=model, run=CPU, allowed=0.02).passed


def finding(verdict):
    return Finding("answers", "a", 0, verdict, None, None)


@pytest.mark.parametrize(
    ("verdicts", "passed"),
    [
        (["agrees"] * 3, True),
        (["agrees"] * 2 + ["undecided"], True),
        (["agrees"] * 3 + ["undecided"] * 2, False),
        (["undecided"] * 3, False),
        (["agrees"] * 9 + ["differs"], False),
        ([], False),
    ],
)
def test_many_undecided_entries_do_not_pass(verdicts, passed):
    assert AuditReport("id", 1, 9, tuple(map(finding, verdicts))).passed is passed


def test_only_the_answer_a_state_was_read_of_excuses_it(make_recipe, recipe_data, model, tmp_path):
    """In bfloat16; the model's other answer of the same class fell otherwise."""
    blocks = {k: recipe_data["blocks"][k] for k in ("answers", "layers")}
    blocks["others"] = {"kind": "answers", "max_new_tokens": 3}
    extract(make_recipe(blocks=blocks, compute_dtype="bfloat16"), tmp_path / "k.h5", CPU)

    def change(entry):
        if entry.block == "others":
            return Entry(*_place(entry), {**entry.values, "text": "no"}, entry.source_digest)
        if entry.block == "layers":
            values = np.asarray(entry.values["values"]) * np.float32(3)
            return Entry(*_place(entry), {"values": values}, entry.source_digest)
        return entry

    forged = resealed(tmp_path / "k.h5", tmp_path / "forged.h5", change)
    found = audit(forged, k=1000, model=model, run=CPU).findings
    verdicts = {one.block: one.verdict for one in found}
    assert verdicts["others"] == "undecided"
    assert verdicts["layers"] == "differs"


def test_the_seed_repeats_the_draw(honest, model):
    draws = [audit(honest, k=4, model=model, seed=s, run=CPU).findings for s in (1, 1, 2)]
    places = [[(one.block, one.class_id, one.item) for one in draw] for draw in draws]
    assert len(places[0]) == 4
    assert places[0] == places[1] != places[2]


def test_answers_another_model_reads_are_generated_first(make_recipe, recipe_data, model, tmp_path):
    blocks = {k: recipe_data["blocks"][k] for k in ("answers", "layers")}
    blocks["again"] = {**blocks["layers"], "quantisation": "nf4"}
    extract(make_recipe(blocks=blocks, store_dtype="float16"), tmp_path / "k.h5", CPU)
    report = audit(tmp_path / "k.h5", k=1000, model=model, run=CPU)
    assert {one.verdict for one in report.findings} == {"agrees"}
    assert {one.block for one in report.findings} == {"answers", "layers", "again"}


def test_a_local_model_must_be_named_and_must_be_the_one(honest, model_folder, tmp_path):
    with pytest.raises(ModelError, match=r"was a local folder called 'tiny-llama'. Say where it"):
        audit(honest, run=CPU)
    with pytest.raises(CacheMismatchError, match=r"block \w+ was made in another way: spec\."):
        audit(honest, k=1000, model=str(model_folder("llama", chat=True)), run=CPU)


def test_a_cache_from_elsewhere_cannot_be_repeated(honest, model, tmp_path):
    strange = resealed(honest, tmp_path / "strange.h5", recipe={"imported": "elsewhere"})
    with pytest.raises(CacheMismatchError, match="was not made by `vademecum extract`"):
        audit(strange, model=model, run=CPU)


def test_the_tolerance_is_that_of_compute_and_storage(honest):
    with KnowledgeCache.open(honest) as found:
        specs = found.sealed.header.specs
    assert tolerance(specs["answers"]) is None
    assert tolerance(specs["layers"]) == 1e-5
