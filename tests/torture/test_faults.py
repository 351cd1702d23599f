"""Calls that fail, real faults, kills and signals, and many processes at once."""

import contextlib
import errno

import pytest
import real_faults
from checking import in_file, in_folder
from crowd import crowd, two_jobs
from faults import ERRORS, PLAYED, Sweep, System
from kills import LIMIT, interrupt, kill_commits, kill_scenes
from workload import BATCHES, header, keys

from cache import ShardFolder, seal, sealing

MOUNTS = real_faults.why_not()


@pytest.mark.parametrize("scene", PLAYED)
def test_any_call_may_fail(scratch, scene):
    sweep = Sweep(scene, scratch)
    runs = [sweep.run("once", rotate=True)]
    runs += [sweep.run(how, rotate=True, stride=13) for how in ("writing", "all")]
    runs += [sweep.run("killed", stride=5)]
    runs += [sweep.run(how, stride=17) for how in ("short", "torn")]
    for found in runs:
        assert (found.lost, found.wrong) == (0, 0), found.why
    assert runs[0].cases > 60


def test_a_swallowed_error_would_be_noticed(scratch, monkeypatch):
    real = System._wrap

    def forgiving(self, name, call):
        wrapped = real(self, name, call)
        if name != "fsync":
            return wrapped

        def swallow(fd):
            with contextlib.suppress(OSError):
                wrapped(fd)

        return swallow

    monkeypatch.setattr(System, "_wrap", forgiving)
    found = Sweep("seal", scratch).run("once", [errno.EIO])
    assert found.wrong > 0
    assert "a failed fsync was passed over" in found.why[0]


def test_the_errors_are_those_of_the_issue():
    names = {errno.errorcode[number] for number in ERRORS}
    assert names == {"EIO", "ENOSPC", "EFBIG", "EDQUOT", "EINTR"}


@pytest.mark.parametrize("fault", real_faults.FAULTS)
def test_real_faults(tmp_path, fault):
    if fault in real_faults.MOUNTS and MOUNTS is not None:
        pytest.skip(MOUNTS)
    root = tmp_path / "place"
    root.mkdir()
    if fault == "no permission":  # another user must come as far as here
        for path in (tmp_path, *tmp_path.parents):
            if not path.stat().st_mode & 0o001 and path.owner() != "root":
                pytest.skip(f"{path} is closed to others")
            if not path.stat().st_mode & 0o001:
                path.chmod(path.stat().st_mode | 0o011)
    if fault in real_faults.PREPARED:
        real_faults.prepare(root)
    found = real_faults.meet(fault, root)
    root.chmod(0o755)
    assert (found["lost"], found["wrong"]) == (0, 0), found["lines"]
    assert len(found["lines"]) == 1


def test_kill_9_while_committing_loses_nothing(tmp_path):
    found = kill_commits(60, 1, tmp_path)
    assert (found.lost, found.wrong) == (0, 0), found.why
    assert found.acked > 3
    assert found.inside > 3, "the kills missed the commit path"


def test_kill_9_while_sealing_and_merging_loses_nothing(scratch):
    for seed in (2, 12, 22):  # on a busy machine most kills may come too early or too late
        place = scratch / str(seed)
        place.mkdir()
        found = kill_scenes(30, seed, place)
        assert (found.lost, found.wrong) == (0, 0), found.why
        if found.inside > 3:
            break
    assert found.inside > 3, "the kills missed the work"


def test_a_signal_ends_the_work_at_once_and_leaves_nothing(scratch):
    found = interrupt(48, 3, scratch)
    assert (found.lost, found.wrong, found.temps) == (0, 0, 0), found.why
    assert found.slowest < LIMIT
    assert found.acked > 0


def test_readers_writers_and_a_sealer_at_once(scratch):
    for seconds in (3, 15):  # a busy machine may seal nothing in the first
        place = scratch / str(seconds)
        place.mkdir()
        found = crowd(seconds, place)
        if found["seals"]:
            break
    assert (found["lost"], found["wrong"]) == (0, 0), found["why"]
    assert found["acked"] > 10
    assert found["reads"] > 100
    assert found["seals"] > 0


def test_sealing_keeps_what_another_job_commits_meanwhile(scratch, monkeypatch):
    where = scratch / "k.parts"
    mine, theirs = (ShardFolder(where, header=header()) for _ in range(2))
    mine.commit(BATCHES[0], batch_shape=(2,))
    real = sealing.write_sealed

    def slow(*arguments, **named):
        theirs.commit(BATCHES[1], batch_shape=(2,))
        return real(*arguments, **named)

    monkeypatch.setattr(sealing, "write_sealed", slow)
    seal(mine, scratch / "k.h5")
    assert set(in_file(scratch / "k.h5")) == keys(0)
    assert in_folder(ShardFolder(where, header=header())) == dict.fromkeys(keys(1), True)


def test_two_jobs_with_one_recipe_make_one_complete_cache(scratch):
    found = two_jobs(12, 4, scratch)
    assert (found["lost"], found["wrong"]) == (0, 0), found["why"]
    assert sum(found["how"].values()) == 12
