"""Any order of put, kill, reopen, seal, merge, corruption and two writers, against a dictionary.

VADEMECUM_EXAMPLES raises the number of sequences, 120 by default.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cache import KnowledgeCache, ShardFolder, seal, verify
from cache.combining.merging import MergeConflictsError, merge
from cache.durable import TEMP
from cache.errors import CacheFormatError

EXAMPLES = int(os.environ.get("VADEMECUM_EXAMPLES", "120"))
MEMORY = Path("/dev/shm")  # fsync costs nothing there

_spec = importlib.util.spec_from_file_location("make", Path(__file__).with_name("make.py"))
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

BLOCKS = {name: make.BLOCKS[name] for name in ("embedded", "answers")}
PLACES = [
    ("embedded", "ig", 0),
    ("embedded", "ig", 1),
    ("embedded", "basophil", 0),
    ("answers", "ig", 0),
    ("answers", "basophil", 3),
]
some = st.lists(st.sampled_from(PLACES), min_size=1, max_size=3, unique=True)
seeds = st.integers(0, 1)
writers = st.integers(0, 1)
CALLS = ("open", "pwrite", "fsync", "link", "replace", "unlink", "rmdir")


class Killed(BaseException):
    """The process is gone: nothing it had planned to do happens any more."""


@contextmanager
def killed_at(count: int) -> Iterator[None]:
    """The call to the operating system with this number, and all after it, never return."""
    real, left = {name: getattr(os, name) for name in CALLS}, count

    def wrap(name):
        def call(*arguments, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real[name](*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        with suppress(Killed):
            yield
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


def wanted_values(place, seed):
    return make.entry(*place, seed).values


def same(found, wanted):
    return all(
        (found[name] == value).all() if hasattr(value, "shape") else found[name] == value
        for name, value in wanted.items()
    )


class Cache(RuleBasedStateMachine):
    """`model` is what was acknowledged and not yet sealed: the seed of every place.

    Sealed files are known by name; `files` says what each must hold.
    """

    files = Bundle("files")

    def __init__(self):
        super().__init__()
        self.where = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
        self.header = make.header(blocks=BLOCKS, recipe={}, classes=make.CLASSES[:2])
        self.parts, self.count = self.where / "k.parts", 0
        self.model, self.sealed = {}, {}

    def teardown(self):
        for path in self.sealed:
            verify(path)
        shutil.rmtree(self.where)

    def name(self):
        self.count += 1
        return self.where / f"{self.count}.h5"

    @initialize()
    def start(self):
        self.writers = [ShardFolder(self.parts, header=self.header) for _ in range(2)]

    @rule(writer=writers)
    def reopen(self, writer):
        self.writers[writer] = ShardFolder(self.parts, header=self.header)

    def bury(self):
        """What a sweep does once the process is really gone."""
        for path in self.where.rglob(TEMP + "*"):
            path.unlink()

    def both_reopen(self):
        self.reopen(0)
        self.reopen(1)

    @rule(writer=writers, places=some, seed=seeds)
    def put(self, writer, places, seed):
        made = [make.entry(*place, seed) for place in places]
        self.writers[writer].commit(made, batch_shape=(len(made),))
        for place in places:
            self.model.setdefault(place, seed)

    @rule(writer=writers, places=some, seed=seeds, at=st.integers(0, 25))
    def put_and_die(self, writer, places, seed, at):
        made = [make.entry(*place, seed) for place in places]
        done = False
        with killed_at(at):
            self.writers[writer].commit(made, batch_shape=(len(made),))
            done = True
        self.bury()
        self.reopen(writer)
        present = self.present()
        for place in places:
            if done or place in present:
                self.model.setdefault(place, seed)

    @rule(first=some, second=some)
    def race(self, first, second):
        """The second writer commits at the moment the first one is about to publish."""
        one, two = self.writers
        link, left = os.link, [True]

        def late(*arguments):
            if left:
                left.clear()
                two.commit([make.entry(*place, 1) for place in second], batch_shape=(1,))
            return link(*arguments)

        os.link = late
        try:
            one.commit([make.entry(*place, 0) for place in first], batch_shape=(1,))
        finally:
            os.link = link
        if left:  # the first had nothing new to say
            two.commit([make.entry(*place, 1) for place in second], batch_shape=(1,))
        for place in sorted({*first, *second} - set(self.model)):
            allowed = [0] * (place in first) + [1] * (place in second)
            views = {self.seed_of(writer, place, allowed) for writer in self.writers}
            assert len(views) == 1  # everybody sees the same winner
            self.model[place] = views.pop()

    def seed_of(self, folder, place, allowed):
        folder.present()
        found = folder.entry(make.key(make.entry(*place))).values
        return next(seed for seed in allowed if same(found, wanted_values(place, seed)))

    def present(self):
        folder = ShardFolder(self.parts, header=self.header, create=False)
        keys = folder.present()
        found = {place for place in PLACES if make.key(make.entry(*place)) in keys}
        assert len(found) == len(keys)
        return found

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def corrupt_a_shard(self, data):
        keys = {make.key(make.entry(*place)): place for place in self.model}
        self.writers[0].present()
        held = {}
        for one in self.writers[0].committed(keys):
            held.setdefault(one.shard, []).append(keys[one.key.hex()])
        shard = data.draw(st.sampled_from(sorted(held)))
        path = self.parts / shard
        at = data.draw(st.integers(0, path.stat().st_size - 1))
        flip(path, at)
        self.both_reopen()
        for place in held[shard]:
            del self.model[place]
        # A shard that lost a race may hold another version, which counts from now on.
        for place in self.present() & set(held[shard]):
            self.model[place] = self.seed_of(self.writers[0], place, [0, 1])
        assert list(self.parts.glob(f"{shard}*.damaged"))

    @precondition(lambda self: self.model)
    @rule(target=files, writer=writers)
    def seal(self, writer):
        path, expected = self.name(), {make.key(make.entry(*place)) for place in self.model}
        content_id = seal(self.writers[writer], path, expected=expected)
        assert seal(self.writers[1 - writer], path, expected=expected) == content_id
        return self.was_sealed(path)

    def was_sealed(self, path):
        self.sealed[path], self.model = self.model, {}
        self.check(path)
        self.both_reopen()
        return path

    @precondition(lambda self: self.model)
    @rule(target=files, writer=writers, at=st.integers(0, 60))
    def seal_and_die(self, writer, at):
        path, expected = self.name(), {make.key(make.entry(*place)) for place in self.model}
        with killed_at(at):
            seal(self.writers[writer], path, expected=expected)
        self.bury()
        self.both_reopen()
        if not path.exists():
            assert self.present() == set(self.model)  # nothing was removed before it was safe
            return multiple()
        seal(self.writers[writer], path, expected=expected)
        return self.was_sealed(path)

    @rule(target=files, one=files, two=files, prefer=st.booleans())
    def merge(self, one, two, prefer):
        path, a, b = self.name(), self.sealed[one], self.sealed[two]
        conflicts = sorted(place for place in set(a) & set(b) if a[place] != b[place])
        if conflicts and not prefer:
            with pytest.raises(MergeConflictsError) as info:
                merge([one, two], path)
            found = sorted((c.block, c.class_id, c.item) for c in info.value.conflicts)
            assert found == conflicts
            assert not path.exists()
            return multiple()
        report = merge([one, two], path, prefer=one if prefer else None)
        assert report.preferred == len(conflicts)
        other = self.name()
        merge([two, one], other, prefer=one if prefer else None)
        assert other.read_bytes() == path.read_bytes()
        other.unlink()
        self.sealed[path] = {**b, **a}
        self.check(path)
        return path

    @rule(one=files, data=st.data())
    def corrupt_a_file(self, one, data):
        at = data.draw(st.integers(0, one.stat().st_size - 1))
        flip(one, at)
        with pytest.raises(CacheFormatError):
            merge([one], self.where / "never.h5")
        assert not (self.where / "never.h5").exists()
        flip(one, at)

    def check(self, path):
        with KnowledgeCache.open(path) as found:
            entries = [e for block in found.blocks.values() for e in block.entries()]
            places = {(e.block, e.class_id, e.item): e.values for e in entries}
            assert set(places) == set(self.sealed[path])
            for place, values in places.items():
                assert same(values, wanted_values(place, self.sealed[path][place]))

    @invariant()
    def what_was_acknowledged_is_there(self):
        if not self.parts.exists():
            assert not self.model
            return
        folder = ShardFolder(self.parts, header=self.header, create=False)
        keys = folder.present()
        assert len(keys) == len(self.model)
        for place, seed in self.model.items():
            assert same(
                folder.entry(make.key(make.entry(*place))).values, wanted_values(place, seed)
            )

    @invariant()
    def no_draft_is_left(self):
        assert not list(self.where.rglob(TEMP + "*"))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 0x10]))


def test_any_order_of_operations_keeps_what_was_acknowledged():
    run_state_machine_as_test(
        Cache,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=8,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
