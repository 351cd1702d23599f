"""Random edits of small caches, judged by full verification."""

import corruption
import pytest

from cache.sealed import SealedFile

EDITS = 3000


def test_no_random_edit_is_accepted():
    found = corruption.random_edits(EDITS, seed=20, processes=2)
    bad = {n: found[n] for n in ("accepted", "crashed", "other_exceptions")}
    assert bad == dict.fromkeys(bad, 0), found
    assert found["cases"] == EDITS == found["refused"] + found["other_sound"]
    assert found["slowest_s"] < 2
    assert found["largest_rss_mib"] < 64


@pytest.mark.parametrize("check", ["verify_bytes", "verify_structure"])
def test_a_reader_that_leaves_a_check_out_is_found(monkeypatch, check):
    monkeypatch.setattr(SealedFile, check, lambda sealed: None)
    assert corruption.random_edits(400, seed=1)["accepted"] > 0


def test_a_crash_and_an_exception_of_another_class_are_counted(monkeypatch):
    real, calls = corruption.verify, []

    def spoilt(path, **named):
        calls.append(path)
        if len(calls) == 6:
            corruption.os.kill(corruption.os.getpid(), corruption.signal.SIGKILL)
        if len(calls) == 4:
            raise ZeroDivisionError
        return real(path, **named)

    monkeypatch.setattr(corruption, "verify", spoilt)
    # The first call of a worker is its warm-up; a worker that died is replaced by another.
    seed = corruption.seeds()[0]
    found = corruption.run(lambda n: seed.raw[:n], seed, 12)
    assert (found["cases"], found["crashed"], found["other_exceptions"]) == (12, 2, 2)
    assert found["refused"] == 8
