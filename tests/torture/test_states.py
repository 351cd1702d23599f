"""Every state a crash can leave, from a trace of the system calls."""

import random

import pytest
from crash_states import State, crashes, power_cuts
from enumerate_states import crash_verdict, power_verdict, recording
from syscall_trace import Snapshot, whole_lines, why_not
from workload import SCENES

REASON = why_not()
traced = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@traced
@pytest.mark.parametrize("scene", SCENES)
def test_no_crash_loses_what_was_acknowledged(scratch, scene):
    found = recording(scene, scratch / "t")
    killed = crash_verdict(found, scratch, seed=1, tears=1)
    cut = power_verdict(found, scratch, seed=2, count=6 * len(found.operations))
    assert (killed.lost, killed.wrong) == (0, 0), killed.why
    assert (cut.lost, cut.wrong) == (0, 0), cut.why
    assert killed.cases > 1.4 * len(found.operations)
    assert any(operation[0] == "ack" for operation in found.operations)


@traced
@pytest.mark.parametrize(
    ("scene", "control"),
    [
        ("commit", "no fsync"),
        ("commit", "no folder fsync"),
        ("resume", "no fsync"),
        ("seal over an old one", "no fsync"),
        ("seal", "no folder fsync"),
        ("seal", "shards deleted early"),
        *[("merge", control) for control in ("no fsync", "no folder fsync") if "merge" in SCENES],
    ],
)
def test_a_broken_protocol_is_noticed(scratch, scene, control):
    found = recording(scene, scratch / "t", control)
    cut = power_verdict(found, scratch, seed=3, count=150)
    assert cut.lost > 0


# The model, on a file of three steps.
STEPS = [
    ("names", [(0, "draft", 1)]),
    ("write", 1, 0, b"a" * 600),
    ("write", 1, 600, b"b" * 600),
    ("sync", 1),
    ("names", [(0, "name", 1)]),
    ("ack", "batch 0"),
    ("sync", 0),
    ("names", [(0, "draft", None)]),
]


def looks(states):
    return {State(s.disk, (), "").looks()[0] for s in states}


def test_a_killed_process_leaves_a_prefix():
    states = list(crashes(Snapshot(), STEPS, random.Random(0), tears=3))
    assert len(states) == 9 + 6
    seen = looks(states)
    assert () in seen
    assert (("draft", b""),) in seen
    assert (("draft", b"a" * 600),) in seen
    whole = b"a" * 600 + b"b" * 600
    assert (("draft", whole), ("name", whole)) in seen
    assert (("name", whole),) in seen
    assert not [one for one in seen if dict(one).get("name", whole) != whole]
    assert [s.acks for s in states[-3:]] == [("batch 0",)] * 3


def test_a_power_cut_keeps_what_was_synced_and_any_part_of_the_rest():
    states = list(power_cuts(Snapshot(), STEPS, random.Random(0), 400))
    whole = b"a" * 600 + b"b" * 600
    early = [s for s in states if int(s.label.split()[2][:-1]) < 4]
    drafts = {dict(one)["draft"] for one in looks(early) if "draft" in dict(one)}
    zeros = bytes(600) + b"b" * 600  # the second write without the first
    assert {b"", b"a" * 600, zeros, whole, b"a" * 512} <= drafts
    assert any(b"\0" * 88 in one and one.startswith(b"a" * 512) for one in drafts)  # a sector
    late = looks(s for s in states if int(s.label.split()[2][:-1]) in (4, 5, 6))
    both = {(), (("draft", whole),), (("name", whole),), (("draft", whole), ("name", whole))}
    assert late == both
    last = looks(s for s in states if int(s.label.split()[2][:-1]) == 8)
    assert last == {(("name", whole),), (("draft", whole), ("name", whole))}


def test_an_interrupted_line_of_a_trace_is_one_again():
    lines = [
        "7 fsync(3 <unfinished ...>",
        "8 close(4)                = 0",
        "7 <... fsync resumed>)    = 0",
        "7 +++ exited with 0 +++",
    ]
    assert list(whole_lines(lines)) == ["8 close(4)                = 0", "7 fsync(3 )    = 0"]
