"""Shards: resume, damage, several writers, sealing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache import BlockSpec, ClassRecord, Entry, KnowledgeCache, ShardFolder, seal, verify
from cache.durable import TEMP
from cache.errors import (
    CacheFormatError,
    CacheMismatchError,
    MissingKnowledgeError,
    StorageError,
    ValueRefusedError,
)
from cache.sealed import SealedFile


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(make, tmp_path):
    return ShardFolder(tmp_path / "k.parts", header=make.header())


def test_an_extraction_goes_on_where_it_stopped(make, folder, tmp_path):
    made = make.entries()
    for start in range(0, 12, 4):
        folder.commit(made[start : start + 4], batch_shape=(4, 17))
    again = ShardFolder(tmp_path / "k.parts", header=make.header())
    assert again.present() == {make.key(one) for one in made[:12]} == folder.present()
    assert set(again.batch_shapes().values()) == {(4, 17)}
    assert len(again.batch_shapes()) == 3
    one = again.entry(make.key(made[1]))
    assert (one.block, one.class_id, one.item, one.source_digest) == (
        made[1].block,
        made[1].class_id,
        made[1].item,
        made[1].source_digest,
    )
    with pytest.raises(MissingKnowledgeError, match="no such entry was committed"):
        again.entry("0" * 64)
    again.commit(made[12:], batch_shape=(12,))
    assert seal(again, tmp_path / "k.h5") == make.cache_at(tmp_path / "at-once.h5")
    assert (tmp_path / "k.h5").read_bytes() == (tmp_path / "at-once.h5").read_bytes()
    assert names(tmp_path) == ["at-once.h5", "k.h5"]


def test_what_is_present_is_not_stored_again(make, folder):
    made = make.entries()[:4]
    folder.commit(made, batch_shape=(4,))
    before = names(folder.folder)
    folder.commit(made, batch_shape=(2,))
    folder.commit(made[1:3], batch_shape=(2,))
    folder.commit([], batch_shape=())
    assert names(folder.folder) == before


def test_the_first_of_two_jobs_wins(make, folder, tmp_path):
    other = ShardFolder(tmp_path / "k.parts", header=make.header())
    first = [make.entry("attributes", "ig", item, seed=1) for item in range(3)]
    later = [make.entry("attributes", "ig", item, seed=2) for item in range(4)]
    folder.commit(first, batch_shape=(3,))
    other.commit(later, batch_shape=(4,))
    for job in (folder, other):
        assert len(job.present()) == 4
        for one in first:
            assert dict(job.entry(make.key(one)).values) == dict(one.values)
    assert dict(other.entry(make.key(later[3])).values) == dict(later[3].values)


def test_a_race_for_the_same_batch_has_one_winner(make, folder, tmp_path, monkeypatch):
    other = ShardFolder(tmp_path / "k.parts", header=make.header())
    mine = [make.entry("layers", "ig", seed=1)]
    theirs = [make.entry("layers", "ig", seed=2)]
    real = os.link

    def late(*arguments):
        monkeypatch.setattr(os, "link", real)
        other.commit(theirs, batch_shape=(1,))
        return real(*arguments)

    monkeypatch.setattr(os, "link", late)
    folder.commit(mine, batch_shape=(1,))
    stored = theirs[0].values["values"].astype("f2")
    for job in (folder, other, ShardFolder(tmp_path / "k.parts", header=make.header())):
        assert (job.entry(make.key(mine[0])).values["values"] == stored).all()
    assert len(folder.batch_shapes()) == 1


def test_a_race_of_overlapping_batches_has_the_same_winner_for_everybody(
    make, folder, tmp_path, monkeypatch
):
    other = ShardFolder(tmp_path / "k.parts", header=make.header())
    mine = [make.entry("layers", "ig", item, seed=1) for item in (0, 1)]
    theirs = [make.entry("layers", "ig", item, seed=2) for item in (1, 2)]
    real = os.link

    def late(*arguments):
        monkeypatch.setattr(os, "link", real)
        other.commit(theirs, batch_shape=(2,))
        return real(*arguments)

    monkeypatch.setattr(os, "link", late)
    folder.commit(mine, batch_shape=(2,))
    jobs = [folder, other, ShardFolder(tmp_path / "k.parts", header=make.header())]
    for job in jobs:
        job.present()
    values = {job.entry(make.key(mine[1])).values["values"].tobytes() for job in jobs}
    assert len(values) == 1
    assert len(folder.batch_shapes()) == 2
    first, second = (tmp_path / name for name in ("1.h5", "2.h5"))
    copies = [
        seal(ShardFolder(_copy(folder.folder, tmp_path / f"{n}.parts"), header=make.header()), path)
        for n, path in enumerate((first, second))
    ]
    assert copies[0] == copies[1]
    assert first.read_bytes() == second.read_bytes()


def _copy(source, target):
    target.mkdir()
    for path in reversed(names(source)):
        (target / path).write_bytes((source / path).read_bytes())
    return target


def test_the_earlier_shard_wins_however_it_is_named(make, tmp_path):
    for seed in range(4):  # names are digests, so some later shard sorts before the earlier one
        where = tmp_path / f"{seed}.parts"
        job = ShardFolder(where, header=make.header())
        early = [make.entry("layers", "ig", item, seed=1) for item in (0, seed + 1)]
        job.commit(early, batch_shape=(2,))
        late = [make.entry("layers", "ig", item, seed=2) for item in (0, seed + 9)]
        with_all = ShardFolder(tmp_path / f"{seed}.other", header=make.header())
        with_all.commit([make.entry("embedded", "ig")], batch_shape=(1,))
        with_all.commit(late, batch_shape=(2,))  # sequence 2, as if it had seen the first
        for path in with_all.folder.glob("*.h5"):
            with SealedFile(path) as sealed:
                if sealed.header.content.get("sequence") == 2:
                    (where / path.name).write_bytes(path.read_bytes())
        again = ShardFolder(where, header=make.header())
        wanted = early[0].values["values"].astype("f2")
        assert (again.entry(make.key(early[0])).values["values"] == wanted).all()


WRITER = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
spec = importlib.util.spec_from_file_location("make", sys.argv[2])
make = importlib.util.module_from_spec(spec); spec.loader.exec_module(make)
from pathlib import Path
from cache import ShardFolder
folder = ShardFolder(Path(sys.argv[3]), header=make.header())
print("ready", flush=True); sys.stdin.readline()
made, step = make.entries(), int(sys.argv[4])
for start in range(0, len(made), step):
    folder.commit(made[start:start + step], batch_shape=(step,))
"""


@pytest.mark.parametrize("steps", [(2, 2), (2, 3)])
def test_two_jobs_finish_with_one_complete_cache(make, tmp_path, root, steps):
    jobs = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WRITER,
                str(root),
                make.__file__,
                str(tmp_path / "k.parts"),
                str(step),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for step in steps
    ]
    for job in jobs:
        assert job.stdout.readline() == b"ready\n"
    for job in jobs:
        job.stdin.write(b"go\n")
        job.stdin.flush()
    for job in jobs:
        job.communicate()
        assert job.returncode == 0
    folder = ShardFolder(tmp_path / "k.parts", header=make.header())
    expected = {make.key(one) for one in make.entries()}
    assert folder.present() == expected
    assert folder.damaged == []
    assert seal(folder, tmp_path / "k.h5", expected=expected) == make.cache_at(tmp_path / "one.h5")
    assert (tmp_path / "k.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()


@pytest.mark.parametrize("when", ["before", "while"])
def test_the_slower_of_two_jobs_finds_the_work_sealed(make, tmp_path, monkeypatch, when):
    where, target = tmp_path / "k.parts", tmp_path / "k.h5"
    expected = {make.key(one) for one in make.entries()}
    slow = ShardFolder(where, header=make.header())
    for start in range(0, 24, 6):
        slow.commit(make.entries()[start : start + 6], batch_shape=(6,))
    fast = ShardFolder(where, header=make.header())
    if when == "before":
        content_id = seal(fast, target, expected=expected)
    else:
        real, done = sys.modules["cache.sealing"].entry_sources, []

        def late(*arguments):
            if not done:
                done.append(True)
                done.append(seal(fast, target, expected=expected))
            return real(*arguments)

        monkeypatch.setattr("cache.sealing.entry_sources", late)
        content_id = make.cache_at(tmp_path / "one.h5")
        done.clear()
    assert seal(slow, target, expected=expected) == content_id
    assert not where.exists()
    again = ShardFolder(where, header=make.header())
    again.commit(make.entries()[:6], batch_shape=(6,))
    shutil.rmtree(where)
    with pytest.raises(StorageError, match="no such folder"):
        seal(again, target, expected=sorted(expected)[:6])  # the file holds other entries
    with pytest.raises(StorageError, match="no such folder"):
        seal(again, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"dataset": "other"}, "dataset differs; found 'toy', wanted 'other'"),
        (
            lambda m: {
                "blocks": {
                    **m.BLOCKS,
                    "answers": BlockSpec("texts", {"model": "org/name", "max_new_tokens": 9}),
                }
            },
            "blocks.answers.spec.max_new_tokens differs; found 8, wanted 9",
        ),
        (
            lambda m: {"blocks": {"answers": m.BLOCKS["answers"]}},
            "blocks.attributes differs; found .*, wanted 'nothing'",
        ),
        (
            lambda m: {"recipe": {**m.RECIPE, "temperature": 0.5}},
            "recipe.temperature differs; found '0.25', wanted '0.5'",
        ),
        (
            lambda m: {
                "recipe": {**m.RECIPE, "classes": [{"id": "basophil", "descriptions": ["Other."]}]}
            },
            r"recipe.classes\[0\].descriptions\[0\] differs; found 'A long text",
        ),
        (
            lambda m: {"classes": (*m.CLASSES[:2], ClassRecord("a-b.c", "x"))},
            "classes.a-b.c.name differs",
        ),
        (
            lambda m: {"provenance": {"licence": "MIT"}},
            "provenance.licence differs; found 'Apache-2.0', wanted 'MIT'",
        ),
    ],
)
def test_a_folder_of_another_recipe_is_refused(make, folder, tmp_path, change, message):
    folder.commit(make.entries()[:1], batch_shape=(1,))
    before = names(folder.folder)
    with pytest.raises(
        CacheMismatchError, match=f"k.parts: this folder belongs to another recipe: {message}"
    ):
        ShardFolder(tmp_path / "k.parts", header=make.header(**change(make)))
    assert names(folder.folder) == before
    ShardFolder(tmp_path / "k.parts", header=make.header())


def test_a_shard_of_another_extraction_is_refused(make, folder, tmp_path):
    other = ShardFolder(tmp_path / "o.parts", header=make.header(dataset="other"))
    other.commit(make.entries()[:1], batch_shape=(1,))
    (name,) = other.batch_shapes()
    (folder.folder / name).write_bytes((other.folder / name).read_bytes())
    with pytest.raises(
        CacheMismatchError, match=f"{name}: a file of another extraction lies in this folder"
    ):
        folder.present()


def test_a_damaged_shard_is_moved_aside_and_its_work_done_again(make, folder, tmp_path):
    made = make.entries()
    for start in range(0, len(made), 8):
        folder.commit(made[start : start + 8], batch_shape=(8,))
    name = sorted(folder.batch_shapes())[1]
    for round_ in range(2):
        raw = bytearray((folder.folder / name).read_bytes())
        raw[-10] ^= 1
        (folder.folder / name).write_bytes(raw)
        again = ShardFolder(folder.folder, header=make.header())
        assert len(again.present()) == len(made) - 8
        (line,) = again.damaged
        suffix = f".{round_}.damaged" if round_ else ".damaged"
        assert "its digest differs" in line
        assert f"moved to {name}{suffix}, its work is done again" in line
        for start in range(0, len(made), 8):
            again.commit(made[start : start + 8], batch_shape=(8,))
    content_id = seal(again, tmp_path / "k.h5")
    assert content_id == make.cache_at(tmp_path / "whole.h5")
    assert names(folder.folder) == [f"{name}.1.damaged", f"{name}.damaged"]


def test_a_damaged_header_of_a_folder_is_written_again(make, folder):
    folder.commit(make.entries()[:2], batch_shape=(2,))
    path = folder.folder / "extraction.h5"
    path.write_bytes(path.read_bytes()[:-1])
    again = ShardFolder(folder.folder, header=make.header())
    assert len(again.present()) == 2
    assert "extraction.h5.damaged" in again.damaged[0]


def test_a_shard_that_holds_other_blocks_is_set_aside(make, folder, tmp_path):
    folder.commit(make.entries()[:1], batch_shape=(1,))
    (name,) = folder.batch_shapes()
    path = folder.folder / name

    def edit(body):
        body["content"]["blocks"]["layers"]["spec"]["bits"] = 8

    make.reforge(path, edit, ids=False)
    again = ShardFolder(folder.folder, header=make.header())
    assert again.present() == frozenset()
    assert "block layers is not the one of its extraction" in again.damaged[0]


def test_looking_changes_nothing(make, tmp_path):
    look = ShardFolder(tmp_path / "k.parts", header=make.header(), create=False)
    assert look.present() == frozenset()
    assert names(tmp_path) == []
    folder = ShardFolder(tmp_path / "k.parts", header=make.header())
    folder.commit(make.entries()[:2], batch_shape=(2,))
    (name,) = folder.batch_shapes()
    (folder.folder / name).write_bytes(b"broken")
    before = names(folder.folder)
    look = ShardFolder(tmp_path / "k.parts", header=make.header(), create=False)
    assert look.present() == frozenset()
    assert names(folder.folder) == before
    (folder.folder / "extraction.h5").write_bytes(b"broken")
    assert (
        ShardFolder(tmp_path / "k.parts", header=make.header(), create=False).present()
        == frozenset()
    )


def test_an_incomplete_extraction_is_not_sealed_unless_told(make, folder, tmp_path):
    made = make.entries()
    expected = {make.key(one) for one in made}
    folder.commit(made[:20], batch_shape=(20,))
    with pytest.raises(
        MissingKnowledgeError,
        match=r"not complete: 4 of 24 entries are missing.* what is there is kept",
    ):
        seal(folder, tmp_path / "k.h5", expected=expected)
    assert names(tmp_path) == ["k.parts"]
    assert len(folder.present()) == 20
    seal(folder, tmp_path / "k.h5", expected=expected, partial=True)
    assert verify(tmp_path / "k.h5").entries == 20


def test_a_gap_in_a_partial_cache_is_named(make, folder, tmp_path):
    folder.commit([make.entry("layers", "ig", 1)], batch_shape=(1,))
    seal(folder, tmp_path / "k.h5")
    with KnowledgeCache.open(tmp_path / "k.h5", verify="full") as found:
        assert found.blocks["layers"].items("ig") == 2
        assert found.blocks["answers"].items("ig") == 0
        with pytest.raises(MissingKnowledgeError, match="class ig: no item 0"):
            found.blocks["layers"].array("ig")
        with pytest.raises(MissingKnowledgeError, match="class basophil: no item 0; found 0 items"):
            found.blocks["answers"].text("basophil")


def test_two_texts_for_one_place_need_a_choice(make, folder, tmp_path):
    one = make.entry("layers", "ig")
    two = Entry("layers", "ig", 0, make.entry("layers", "ig", seed=3).values, "f" * 64)
    folder.commit([one], batch_shape=(1,))
    folder.commit([two], batch_shape=(1,))
    with pytest.raises(
        CacheMismatchError, match="block layers, class ig, item 0: two entries from different texts"
    ):
        seal(folder, tmp_path / "k.h5")
    seal(folder, tmp_path / "k.h5", expected=[make.key(two)])
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        wanted = two.values["values"].astype("f2")
        assert (found.blocks["layers"].array("ig") == wanted).all()


def test_seal_never_replaces_what_it_should_not(make, folder, tmp_path):
    folder.commit(make.entries(), batch_shape=(24,))
    note = tmp_path / "note.txt"
    note.write_text("precious")
    with pytest.raises(
        CacheMismatchError, match=r"note.txt: this file exists and is not a knowledge cache"
    ):
        seal(folder, note, replace=True)
    with pytest.raises(StorageError, match=r"is a folder. Name a file."):
        seal(folder, tmp_path)
    with pytest.raises(StorageError, match="this is the source code of the program"):
        seal(folder, Path(sys.modules["cache"].__file__).parent / "k.h5")
    other = tmp_path / "other.h5"
    make.cache_at(other, provenance={})
    before = other.read_bytes()
    with pytest.raises(
        CacheMismatchError,
        match=r"other.h5: another knowledge cache has this name; found [0-9a-f]{64}",
    ):
        seal(folder, other)
    assert note.read_text() == "precious"
    assert other.read_bytes() == before
    assert len(folder.present()) == 24
    content_id = seal(folder, other, replace=True)
    assert verify(other).content_id == content_id
    again = ShardFolder(tmp_path / "k.parts", header=make.header())
    again.commit(make.entries(), batch_shape=(24,))
    assert seal(again, other) == content_id  # the same content is no conflict
    assert names(tmp_path) == ["note.txt", "other.h5"]


def test_too_little_room_is_found_before_anything_is_written(make, folder, tmp_path, monkeypatch):
    folder.commit(make.entries(), batch_shape=(24,))
    real = os.statvfs

    def small(path):
        found = real(path)
        return os.statvfs_result((*found[:4], 1, *found[5:]))

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(StorageError, match=r"no space left; found .* MB, wanted"):
        seal(folder, tmp_path / "k.h5")
    assert names(tmp_path) == ["k.parts"]
    assert len(folder.present()) == 24


def test_a_shard_that_rots_between_resume_and_seal_is_found(make, folder, tmp_path):
    folder.commit([make.entry("layers", "ig")], batch_shape=(1,))
    folder.commit([make.entry("answers", "ig")], batch_shape=(1,))
    shards = {n: (folder.folder / n) for n in folder.batch_shapes()}
    for name, path in shards.items():
        whole = path.read_bytes()
        with SealedFile(path) as sealed:
            column = next(
                n for n in ("layers__values", "answers__text") if n in sealed.header.extents
            )
            at = sealed.header.extents[column].offset
        raw = bytearray(whole)
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(
            CacheFormatError,
            match=f"{name}: (an entry of block layers changed|dataset answers__text is damaged)",
        ):
            seal(folder, tmp_path / "k.h5")
        assert names(tmp_path) == ["k.parts"]
        path.write_bytes(whole)
    seal(folder, tmp_path / "k.h5")


def test_shards_are_deleted_only_after_the_file_is_durable(make, folder, tmp_path, monkeypatch):
    folder.commit(make.entries(), batch_shape=(24,))
    shard_names, steps, names_of = set(folder.batch_shapes()), [], {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "link", "unlink")}

    def opened(path, flags, *rest):
        fd = real["open"](path, flags, *rest)
        names_of[fd] = os.fspath(path)
        return fd

    def synced(fd):
        steps.append(("fsync", Path(names_of[fd]).name))
        return real["fsync"](fd)

    def linked(source, target):
        steps.append(("link", Path(target).name))
        return real["link"](source, target)

    def unlinked(path, *rest, **more):
        if Path(path).name in shard_names:
            assert verify(tmp_path / "k.h5").entries == 24
            steps.append(("unlink", "shard"))
        return real["unlink"](path, *rest, **more)

    for name, call in {"open": opened, "fsync": synced, "link": linked, "unlink": unlinked}.items():
        monkeypatch.setattr(os, name, call)
    seal(folder, tmp_path / "k.h5")
    kept = [s for s in steps if s[0] != "fsync" or not s[1].startswith(TEMP)]
    assert steps[0][0] == "fsync"
    assert steps[0][1].startswith(TEMP)
    assert kept[:4] == [
        ("link", "k.h5"),
        ("fsync", tmp_path.name),
        ("unlink", "shard"),
        ("fsync", "k.parts"),
    ]


KILLED = WRITER.replace("made, step", "import time; made, step").replace(
    "    folder.commit(made[start:start + step], batch_shape=(step,))",
    "    folder.commit(made[start:start + step], batch_shape=(step,)); print(start, flush=True)",
)


def test_control_c_leaves_no_temp_and_loses_nothing(make, tmp_path, root):
    for delay in (0.0, 0.004, 0.011, 0.02):
        where = tmp_path / f"{delay}.parts"
        job = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(root), make.__file__, str(where), "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert job.stdout.readline() == b"ready\n"
        job.stdin.write(b"go\n")
        job.stdin.flush()
        time.sleep(delay)
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=20)
        assert job.returncode in {-signal.SIGINT, 130, 0, 1}
        assert job.returncode == 0 or b"KeyboardInterrupt" in err
        assert not [n for n in names(where) if n.startswith(TEMP)]
        present = ShardFolder(where, header=make.header()).present()
        made = make.entries()
        assert {make.key(made[int(n)]) for n in out.split()} <= present


def test_a_header_that_would_be_too_large_is_refused(make, tmp_path):
    blocks = {"answers": BlockSpec("texts", {"numbers": list(range(300_000))})}
    with pytest.raises(ValueRefusedError, match=r"the header of the cache is too large; found \d+"):
        ShardFolder(tmp_path / "k.parts", header=make.header(blocks=blocks))
    assert names(tmp_path / "k.parts") == []


def test_a_disk_that_writes_something_else_is_noticed(make, folder, tmp_path, monkeypatch):
    def spoil(real):
        def call(draft, *rest):
            content_id = real(draft, *rest)
            os.pwrite(draft.fd, b"\xff", os.fstat(draft.fd).st_size - 9)
            return content_id

        return call

    with monkeypatch.context() as patch:
        patch.setattr("cache.folder.pack", spoil(sys.modules["cache.folder"].pack))
        with pytest.raises(
            StorageError, match=r"what was written does not read back. Check the disk"
        ):
            folder.commit(make.entries()[:1], batch_shape=(1,))
    assert len(folder.damaged) == 3
    folder.commit(make.entries()[:1], batch_shape=(1,))
    with monkeypatch.context() as patch:
        patch.setattr("cache.publishing.pack", spoil(sys.modules["cache.publishing"].pack))
        with pytest.raises(CacheFormatError, match=r"the HDF5 structure is damaged|is damaged"):
            seal(folder, tmp_path / "k.h5")
    assert names(tmp_path) == ["k.parts"]
    seal(folder, tmp_path / "k.h5")


def test_a_shard_is_no_header_of_a_folder(make, folder):
    folder.commit(make.entries()[:1], batch_shape=(1,))
    (name,) = folder.batch_shapes()
    header = folder.folder / "extraction.h5"
    header.write_bytes((folder.folder / name).read_bytes())
    again = ShardFolder(folder.folder, header=make.header())
    assert "not the header of an extraction" in again.damaged[0]
    assert len(again.present()) == 1
