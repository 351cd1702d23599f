"""What is tortured: small scenes of commit, resume, seal and merge.

Run as a program it plays one scene; what it acknowledges it writes to standard output, so that a
trace of its system calls knows at every point what had been acknowledged.
"""

import argparse
import importlib.util
import os
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from cache import ShardFolder, durable, seal, sealing  # noqa: E402
from cache import folder as folder_module  # noqa: E402


def load(path: Path):
    """A module by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load(ROOT / "tests" / "cache" / "make.py")
DAMAGED = 1  # the batch that is damaged when an extraction goes on
STALE = f"{durable.TEMP}{durable._owner()}-999999999-aaaaaaaaaaaa"


def header(**changes):
    """The recipe of every scene: two blocks, two classes."""
    blocks = {name: make.BLOCKS[name] for name in ("embedded", "answers")}
    same = {"blocks": blocks, "classes": make.CLASSES[:2], "recipe": {"temperature": 0.25}}
    return make.header(**{**same, **changes})


BATCHES = [
    [make.entry("embedded", "basophil", 0), make.entry("embedded", "ig", 0)],
    [make.entry("embedded", "basophil", 1), make.entry("answers", "ig", 0)],
    [make.entry("answers", "basophil", 0)],
    [make.entry("embedded", "ig", 1, rows=3)],
]
EXPECTED = {make.key(one): one for batch in BATCHES for one in batch}


def keys(*numbers: int) -> set[str]:
    """Keys of the entries of some batches."""
    return {make.key(one) for number in numbers for one in BATCHES[number]}


def say(text: str) -> None:
    """Acknowledges; the trace sees it."""
    os.write(1, text.encode("ascii") + b"\n")


def _commit(where: Path, numbers) -> ShardFolder:
    opened = ShardFolder(where, header=header())
    for number in numbers:
        opened.commit(BATCHES[number], batch_shape=(len(BATCHES[number]),))
        say(f"batch {number}")
    return opened


def _filled(where: Path, numbers=range(4)) -> ShardFolder:
    opened = ShardFolder(where, header=header())
    for number in numbers:
        opened.commit(BATCHES[number], batch_shape=(len(BATCHES[number]),))
    return opened


def _prepare_resume(root: Path) -> None:
    where = root / "k.parts"
    _filled(where, [DAMAGED])
    (shard,) = [p for p in where.iterdir() if p.name != folder_module.EXTRACTION]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    (where / STALE).write_bytes(b"half a dr")
    # Not through ShardFolder: it would move the damaged shard aside already.
    other = root / "other.parts"
    _filled(other, [0])
    for path in other.iterdir():
        path.replace(where / path.name)
    other.rmdir()


def _in_another_job(doing: Callable[[], object]) -> None:
    """A second job that is killed after it gave its file a name, before the folder is synced."""
    child = os.fork()
    if not child:
        durable.sync_folder = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        doing()
        os._exit(1)
    os.waitpid(child, 0)


def _shared(root: Path) -> None:
    mine = ShardFolder(root / "k.parts", header=header())
    _in_another_job(lambda: mine.commit(BATCHES[1], batch_shape=(2,)))
    mine.commit(BATCHES[1], batch_shape=(2,))
    say("batch 1")


def _new_beside_killed(root: Path) -> None:
    _in_another_job(lambda: ShardFolder(root / "k.parts", header=header()))
    _commit(root / "k.parts", [1])


def _raced(root: Path) -> None:
    """The other job is faster only after this one has looked."""
    mine, real = ShardFolder(root / "k.parts", header=header()), os.link

    def late(*names):
        os.link = real
        _in_another_job(lambda: mine.commit(BATCHES[1], batch_shape=(2,)))
        return real(*names)

    os.link = late
    mine.commit(BATCHES[1], batch_shape=(2,))
    say("batch 1")


def _seal(root: Path, **how) -> None:
    seal(ShardFolder(root / "k.parts", header=header()), root / "k.h5", **how)
    say("sealed")


def _shared_seal(root: Path) -> None:
    theirs = ShardFolder(root / "k.parts", header=header())
    _in_another_job(lambda: seal(theirs, root / "k.h5"))
    _seal(root)


def _prepare_reseal(root: Path) -> None:
    make.tiny_cache_at(root / "k.h5")
    _filled(root / "k.parts")


def _prepare_merge(root: Path) -> None:
    for name, numbers in (("a", (0, 1, 2)), ("b", (1, 3))):
        seal(_filled(root / f"{name}.parts", numbers), root / f"{name}.h5")


def _prepare_remerge(root: Path) -> None:
    _prepare_merge(root)
    (root / "k.h5").write_bytes((root / "a.h5").read_bytes())


def _merge(root: Path, **how) -> None:
    from cache.combining.merging import merge

    merge([root / "a.h5", root / "b.h5"], root / "k.h5", **how)
    say("sealed")


@dataclass(frozen=True)
class Scene:
    """Something the program does, and what it starts from.

    Args:
        prepare: makes the state before, which is taken to be on the disk.
        play: what is tortured.
        parts: the working folder.
        before: keys that were acknowledged before.
        inputs: files that must never change.
        old: the target exists before.
    """

    prepare: Callable[[Path], object]
    play: Callable[[Path], object]
    parts: str = "k.parts"
    before: frozenset[str] = frozenset()
    inputs: tuple[str, ...] = ()
    old: bool = False


ALL = frozenset(EXPECTED)
SCENES = {
    "commit": Scene(
        lambda root: None,
        lambda root: _commit(root / "new" / "runs" / "k.parts", range(3)),
        parts="new/runs/k.parts",
    ),
    "resume": Scene(
        _prepare_resume,
        lambda root: _commit(root / "k.parts", range(4)),
        before=frozenset(keys(0)),
    ),
    "commit in a killed job's folder": Scene(lambda root: None, _new_beside_killed),
    "commit beside a killed job": Scene(lambda root: None, _shared),
    "commit in a race": Scene(lambda root: None, _raced),
    "seal": Scene(lambda root: _filled(root / "k.parts"), _seal, before=ALL),
    "seal over an old one": Scene(
        _prepare_reseal, lambda root: _seal(root, replace=True), before=ALL, old=True
    ),
    "seal beside a killed job": Scene(
        lambda root: _filled(root / "k.parts"), _shared_seal, before=ALL
    ),
}
SCENES |= {
    "merge": Scene(_prepare_merge, _merge, inputs=("a.h5", "b.h5")),
    "merge over an old one": Scene(
        _prepare_remerge,
        lambda root: _merge(root, replace=True),
        inputs=("a.h5", "b.h5"),
        old=True,
    ),
}


def sabotage(control: str) -> None:
    """Breaks the protocol on purpose: a test that does not notice is worth nothing."""
    real = os.fsync

    def fsync(fd: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        if is_folder != (control == "no folder fsync"):
            real(fd)

    if control in ("no fsync", "no folder fsync"):
        os.fsync = fsync
    elif control == "shards deleted early":
        # As soon as the new file has its name, before that name is on the disk.
        publish, clear = durable.Draft.publish, folder_module.ShardFolder.clear
        opened = []

        def remember(folder, *rest, **named):
            opened[:] = [folder]
            return chosen(folder, *rest, **named)

        def early(draft, target, *, replace):
            if target.suffix == ".h5" and opened:
                sync, durable.sync_folder = durable.sync_folder, lambda _: clear(opened[0])
                try:
                    return publish(draft, target, replace=replace)
                finally:
                    durable.sync_folder = sync
            return publish(draft, target, replace=replace)

        chosen, sealing._chosen = sealing._chosen, remember
        durable.Draft.publish = early
        folder_module.ShardFolder.clear = lambda folder, *_: None
    else:
        raise ValueError(control)


CONTROLS = ("no fsync", "no folder fsync", "shards deleted early")


def main() -> None:
    """Plays one scene."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scene", choices=SCENES)
    parser.add_argument("root", type=Path)
    parser.add_argument("--control", choices=CONTROLS)
    given = parser.parse_args()
    if given.control:
        sabotage(given.control)
    SCENES[given.scene].play(given.root)


if __name__ == "__main__":
    main()
