"""Hostile files: all refused with one clear line, none opens another file, none costs much."""

import shutil

import pytest
import sweep

from cache import verify
from cache.sealed import SealedFile

LIES = "the HDF5 structure is not the one its header describes"
HANG = 1.0  # seconds of processor time; the table of corruption.py says what is usual
MEMORY = 64.0  # MiB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("attacks")


@pytest.fixture(scope="module")
def attacks(folder):
    return sweep.build_all(folder)


@pytest.fixture(scope="module")
def outcomes(folder, attacks):
    return sweep.probe(folder, attacks, "verify")


def test_there_are_enough_of_them(attacks):
    names = {
        form: {a.name for a in attacks if a.form == form} for form in {a.form for a in attacks}
    }
    assert len(names["plain"]) >= 110
    assert len(names["sealed"]) >= 110
    assert len(names["header"] | names["prefix"]) >= 150
    assert len(names["content"]) >= 55
    assert len(names["special"]) >= 15


def test_every_one_is_refused(outcomes):
    assert [o.label for o in outcomes if o.refused_by is None] == []


def test_refusals_are_one_clear_line_of_the_right_class(outcomes):
    steps = [(o, step) for o in outcomes for step in o.steps]
    other = [f"{o.label}: {s['other']}: {s['text']}" for o, s in steps if s.get("other")]
    assert other == []
    assert [f"{o.label}: {s['text']}" for o, s in steps if s["refused"] and not s["clear"]] == []
    assert [o.label for o, s in steps if s["refused"] and str(o.attack.path) not in s["text"]] == []


def test_what_has_no_right_header_is_refused_when_opened(outcomes):
    early = [o for o in outcomes if o.attack.form in {"plain", "special"}]
    assert {o.label: o.refused_by for o in early if o.refused_by != "open"} == {}
    late = {o.attack.name for o in outcomes if o.attack.form == "header" and o.refused_by != "open"}
    # These point at real bytes with wrong digests, or lie about names only.
    assert late == {"shape shorter", "offsets swapped", "dataset moved", "data sets swapped"}


def test_a_hostile_structure_under_right_digests_is_refused_by_comparison(outcomes):
    sealed = [o for o in outcomes if o.attack.form == "sealed"]
    assert {o.label: o.refused_by for o in sealed if o.refused_by != "verify"} == {}
    assert [o.label for o in sealed if LIES not in o.steps[-1]["text"]] == []
    for outcome in sealed:
        with SealedFile(outcome.attack.path) as opened:
            opened.verify_bytes()  # every digest is right: nothing but the comparison finds it


def test_none_costs_much(outcomes):
    assert {o.label: o.seconds for o in outcomes if o.seconds > HANG} == {}
    assert {o.label: o.probe["mib"] for o in outcomes if o.probe["mib"] > MEMORY} == {}


def test_none_makes_python_open_another_file(outcomes):
    assert {o.label: o.probe["opened"] for o in outcomes if o.probe["opened"]} == {}


def test_opening_and_reading_never_load_the_hdf5_library(folder, attacks):
    found = sweep.probe(folder, attacks, "open")
    assert [o.label for o in found if o.probe["h5py"]] == []


def test_none_makes_the_process_touch_another_file(folder, attacks, tmp_path):
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    sweep.probe(folder, attacks, "verify", tmp_path / "trace")
    assert sweep.strangers(tmp_path / "trace", attacks) == []


def test_the_trace_sees_what_an_ordinary_reader_does(folder, attacks, tmp_path):
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    wanted = {"external_storage", "external_link_as_group", "virtual_other_file"}
    some = [a for a in attacks if a.form == "sealed" and a.name in wanted]
    assert len(some) == 3
    sweep.probe(folder, some, "naive", tmp_path / "trace")
    victims = [line for line in sweep.strangers(tmp_path / "trace", some) if "victim.h5" in line]
    assert {line.split(": ")[1] for line in victims} == wanted


def test_the_file_they_are_made_from_is_sound(folder, attacks):
    verify(folder / "sound.h5")
