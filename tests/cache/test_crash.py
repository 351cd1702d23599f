"""Crashes and failing system calls at every point of commit and seal."""

import contextlib
import errno
import os
import random
import signal
import time

import pytest

from cache import KnowledgeCache, ShardFolder, seal, verify
from cache.durable import TEMP
from cache.errors import StorageError, VademecumError

CALLS = (
    "open",
    "pwrite",
    "fsync",
    "link",
    "replace",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "pread",
)


class Died(BaseException):
    """The process is gone."""


class System:
    """Counts the calls to the operating system and interferes at the n-th."""

    def __init__(self, monkeypatch, at, how):
        self.count, self.at, self.how, self.down = 0, at, how, False
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, real):
        def call(*arguments, **named):
            if self.down:
                raise Died
            if self.how == "torn" and real.__name__ != "pwrite":
                return real(*arguments, **named)
            self.count += 1
            if self.count >= self.at and self.how == "crash":
                self.down = True
                raise Died
            if self.count == self.at and self.how == "torn":
                self.down = True
                fd, data, offset = arguments
                real(fd, bytes(data)[: len(data) // 2], offset)
                raise Died
            once = self.count == self.at and self.how[0] == "once"
            if once or (self.count >= self.at and self.how[0] == "always"):
                raise OSError(self.how[1], os.strerror(self.how[1]))
            return real(*arguments, **named)

        return call


def points(scenario, how, most=400):
    """Runs `scenario(interference)` for every point until one is never reached."""
    for at in range(1, most):
        if not scenario(at, how):
            return at - 1
    raise AssertionError("the scenario never ends")


def few(make):
    """An extraction so small that every point of sealing it is visited quickly."""
    blocks = {name: make.BLOCKS[name] for name in ("embedded", "answers")}
    return {"blocks": blocks, "classes": make.CLASSES[:1], "recipe": {}}


def few_entries(make):
    return [
        one
        for one in make.entries(few(make)["blocks"])
        if (one.class_id, one.item) == ("basophil", 0)
    ]


@pytest.fixture
def ready(make, tmp_path):
    """Makes folders in which a small extraction is complete but not sealed, two shards each."""
    folder = ShardFolder(tmp_path / "ready.parts", header=make.header(**few(make)))
    for one in few_entries(make):
        folder.commit([one], batch_shape=(1,))
    files = {path.name: path.read_bytes() for path in folder.folder.iterdir()}

    def copy(where):
        where.mkdir()
        for name, raw in files.items():
            (where / name).write_bytes(raw)
        return ShardFolder(where, header=make.header(**few(make)))

    return copy


def check(make, where, acknowledged, **changes):
    """Every acknowledged entry is there and exact; nothing wrong was let in."""
    folder = ShardFolder(where, header=make.header(**changes))
    assert folder.damaged == []
    present = folder.present()
    by_key = {make.key(one): one for one in make.entries()}
    assert acknowledged <= present <= set(by_key)
    for key in present:
        found, wanted = folder.entry(key).values, by_key[key].values
        for name, value in found.items():
            same = value == wanted[name]
            assert same.all() if hasattr(same, "all") else same
    assert not [path for path in where.iterdir() if path.name.startswith(TEMP)]
    return folder


@pytest.mark.parametrize("how", ["crash", "torn"])
def test_a_crash_at_any_point_of_a_commit_loses_nothing(make, tmp_path, monkeypatch, how):
    batches = [make.entries()[:2], make.entries()[2:3]]

    def scenario(at, how):
        where, acknowledged = tmp_path / f"{at}.parts", set()
        with monkeypatch.context() as patch:
            system = System(patch, at, how)
            patch.setattr("cache.durable._is_alive", lambda pid: False)
            try:
                folder = ShardFolder(where, header=make.header())
                for batch in batches:
                    folder.commit(batch, batch_shape=(2,))
                    acknowledged |= {make.key(one) for one in batch}
            except Died:
                pass
        monkeypatch.setattr("cache.durable._is_alive", lambda pid: False)
        check(make, where, acknowledged)
        return system.down

    assert points(scenario, how) > 12


@pytest.mark.parametrize("how", ["crash", "torn"])
def test_a_crash_at_any_point_of_sealing_loses_nothing(make, ready, tmp_path, monkeypatch, how):
    monkeypatch.setattr("cache.durable._is_alive", lambda pid: False)
    made, changes = few_entries(make), few(make)
    expected, before, wanted = {make.key(one) for one in made}, set(), set()

    def scenario(at, how):
        where, target = tmp_path / f"{at}.parts", tmp_path / f"{at}.h5"
        folder = ready(where)
        with monkeypatch.context() as patch:
            system = System(patch, at, how)
            with contextlib.suppress(Died):
                seal(folder, target)
        if target.exists():
            before.add("sealed")
            wanted.add(verify(target).content_id)
        else:
            before.add("not sealed")
            wanted.add(seal(check(make, where, expected, **changes), target))
        return system.down

    assert points(scenario, how) > 20
    assert before == {"sealed", "not sealed"}
    assert len(wanted) == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("times", ["once", "always"])
def test_any_failing_call_of_a_commit_is_one_line_and_loses_nothing(
    make, tmp_path, monkeypatch, times, number
):
    first, second = make.entries()[:2], make.entries()[2:5]
    refused, lines = [], []

    def scenario(at, how):
        where = tmp_path / f"{at}.parts"
        folder = ShardFolder(where, header=make.header())
        folder.commit(first, batch_shape=(2,))
        acknowledged = {make.key(one) for one in first}
        with monkeypatch.context() as patch:
            system = System(patch, at, how)
            try:
                folder.commit(second, batch_shape=(3,))
                acknowledged |= {make.key(one) for one in second}
            except StorageError as error:
                lines.append(str(error))
                refused.append(at)
        if times == "once":
            assert not [p for p in where.iterdir() if p.name.startswith(TEMP)] or at in refused
        monkeypatch.setattr("cache.durable._is_alive", lambda pid: False)
        again = check(make, where, acknowledged)
        again.commit(second, batch_shape=(3,))
        assert len(again.present()) == 5
        return system.count >= at

    assert points(scenario, (times, number)) > 8
    assert len(refused) > 6
    assert not [line for line in lines if "\n" in line]


@pytest.mark.parametrize("times", ["once", "always"])
def test_any_failing_call_of_sealing_is_one_line_and_loses_nothing(
    make, ready, tmp_path, monkeypatch, times
):
    made, changes, wanted, lines = few_entries(make), few(make), set(), []
    expected = {make.key(one) for one in made}
    make.tiny_cache_at(tmp_path / "old.h5")
    before = (tmp_path / "old.h5").read_bytes()
    monkeypatch.setattr("cache.durable._is_alive", lambda pid: False)

    def scenario(at, how):
        where, target = tmp_path / f"{at}.parts", tmp_path / f"{at}.h5"
        target.write_bytes(before)
        folder = ready(where)
        with monkeypatch.context() as patch:
            system = System(patch, at, how)
            try:
                seal(folder, target, replace=True)
            except VademecumError as error:
                lines.append(str(error))
        if target.read_bytes() == before:
            seal(check(make, where, expected, **changes), target, replace=True)
        wanted.add(verify(target).content_id)
        return system.count >= at

    assert points(scenario, (times, errno.ENOSPC)) > 20
    assert lines
    assert not [line for line in lines if "\n" in line]
    assert len(wanted) == 1


def _commit_for_ever(make, where, pipe):
    folder = ShardFolder(where, header=make.header())
    os.write(pipe, b"r")
    for number in range(100_000):
        one = make.entry("layers", "ig", number)
        folder.commit([one], batch_shape=(1,))
        os.write(pipe, number.to_bytes(4, "little"))


def test_kill_9_in_the_commit_path_loses_nothing(make, tmp_path):
    random_ = random.Random(0)
    kills, acked, left = 60, 0, 0
    for number in range(kills):
        where = tmp_path / f"{number}.parts"
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            try:
                _commit_for_ever(make, where, writing)
            finally:
                os._exit(1)
        os.close(writing)
        assert os.read(reading, 1) == b"r"
        time.sleep(random_.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raw = b""
        while piece := os.read(reading, 65536):
            raw += piece
        os.close(reading)
        count = len(raw) // 4
        acked += count
        left += any(path.name.startswith(TEMP) for path in where.iterdir())
        folder = ShardFolder(where, header=make.header())
        assert folder.damaged == []
        present = folder.present()
        assert count <= len(present) <= count + 1
        for item in range(count):
            one = make.entry("layers", "ig", item)
            found = folder.entry(make.key(one)).values["values"]
            assert (found == one.values["values"].astype("f2")).all()
        assert not [path for path in where.iterdir() if path.name.startswith(TEMP)]
    assert min(acked - 20, left - 3) > 0, "the kills missed the commit path"


def test_a_disk_that_is_full_keeps_what_was_committed(make, tmp_path, monkeypatch):
    folder = ShardFolder(tmp_path / "k.parts", header=make.header())
    folder.commit(make.entries()[:4], batch_shape=(4,))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        StorageError, match=r"k.parts: no space left. Free some space; what was committed is safe."
    ):
        folder.commit(make.entries()[4:8], batch_shape=(4,))
    with pytest.raises(StorageError, match="no space left"):
        seal(folder, tmp_path / "k.h5")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.parts"]
    check(make, tmp_path / "k.parts", {make.key(one) for one in make.entries()[:4]})
    seal(folder, tmp_path / "k.h5")
    with KnowledgeCache.open(tmp_path / "k.h5", verify="full") as found:
        assert len(found.blocks["layers"]) == 4
