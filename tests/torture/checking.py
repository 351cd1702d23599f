"""What must hold after a crash: nothing acknowledged is lost, nothing wrong is there."""

import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from workload import ALL, BATCHES, EXPECTED, SCENES, Scene, header, keys, make

import cache.durable
import cache.skeleton
from cache import KnowledgeCache, ShardFolder, seal
from cache.durable import TEMP, sweep
from cache.errors import VademecumError


@contextmanager
def quick():
    """Inside, equal HDF5 skeletons are built once; they depend on shapes and names only."""
    real, known = cache.skeleton.build, _SKELETONS

    def build(datasets, userblock):
        key = (tuple(sorted(datasets.items())), userblock)
        if key not in known:
            known[key] = real(datasets, userblock)
        return known[key]

    cache.skeleton.build = build
    try:
        yield
    finally:
        cache.skeleton.build = real


_SKELETONS: dict = {}


@contextmanager
def everybody_gone():
    """In a crash state every other process is gone, whoever has its number now."""
    real, cache.durable._is_alive = cache.durable._is_alive, lambda pid: False
    try:
        yield
    finally:
        cache.durable._is_alive = real


@dataclass
class Verdict:
    """What a check found; `why` holds the first few reasons."""

    cases: int = 0
    distinct: int = 0
    lost: int = 0
    wrong: int = 0
    why: list[str] = field(default_factory=list)

    def add(self, lost: int, wrong: int, why: str) -> None:
        self.lost, self.wrong = self.lost + lost, self.wrong + wrong
        if (lost or wrong) and len(self.why) < 5:
            self.why.append(why)

    def __iadd__(self, other: "Verdict") -> "Verdict":
        self.cases, self.distinct = self.cases + other.cases, self.distinct + other.distinct
        self.add(other.lost, other.wrong, "")
        self.why = [why for why in self.why + other.why if why][:5]
        return self


def same(one, other) -> bool:
    """True if two entries hold the same values, bit for bit."""
    for name, value in one.items():
        there = other[name]
        if isinstance(there, np.ndarray):
            there = there.astype(value.dtype)
            if value.shape != there.shape or value.tobytes() != there.tobytes():
                return False
        elif value != there:
            return False
    return True


def in_file(path: Path) -> dict[str, bool]:
    """The entries of a sealed cache, each with whether it is right; raises if it is refused."""
    found = {}
    with KnowledgeCache.open(path, verify="full") as opened:
        for block in opened.blocks.values():
            for key, entry in zip(block.keys(), block.entries(), strict=True):
                found[key] = key in EXPECTED and same(entry.values, EXPECTED[key].values)
    return found


def in_folder(folder: ShardFolder) -> dict[str, bool]:
    """The entries of a working folder, each with whether it is right."""
    return {
        key: key in EXPECTED and same(folder.entry(key).values, EXPECTED[key].values)
        for key in folder.present()
    }


def final_ids(scratch: Path) -> dict[str, str]:
    """The content ids that must come out in the end."""
    folder = ShardFolder(scratch / "final.parts", header=header())
    for batch in BATCHES:
        folder.commit(batch, batch_shape=(1,))
    found = {"seal": seal(folder, scratch / "final.h5")}
    from cache.combining.merging import merge

    (scratch / "m").mkdir()
    SCENES["merge"].prepare(scratch / "m")
    merged = merge([scratch / "m" / n for n in ("a.h5", "b.h5")], scratch / "m" / "c.h5")
    found["merge"] = merged.content_id
    shutil.rmtree(scratch)
    return found


class Checker:
    """Checks states of one scene.

    Args:
        name: of the scene.
        before: a folder in which the scene was prepared and not played.
        ids: see `final_ids`.
    """

    def __init__(self, name: str, before: Path, ids: dict[str, str]) -> None:
        self.scene: Scene = SCENES[name]
        self.ids = ids
        self.inputs = {n: (before / n).read_bytes() for n in self.scene.inputs}
        target = before / "k.h5"
        self.old = target.read_bytes() if self.scene.old else None

    def check(self, root: Path, acks: tuple[str, ...], label: str, *, go_on: bool) -> Verdict:
        """What is lost and wrong in `root`, after these acknowledgements."""
        verdict = Verdict(cases=1)
        try:
            look = self._merged if self.scene.inputs else self._extracted
            with everybody_gone(), quick():
                look(root, acks, label, verdict, go_on=go_on)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
            kind = isinstance(error, VademecumError)
            verdict.add(int(kind), int(not kind), f"{label}: {type(error).__name__}: {error}")
        return verdict

    def _target(self, root: Path, acks, label: str, verdict: Verdict) -> dict[str, bool]:
        """What the sealed file holds; a name without a whole file behind it is a loss."""
        target, sealed = root / "k.h5", "sealed" in acks
        if not target.exists():
            verdict.add(int(sealed or self.old is not None), 0, f"{label}: the file is gone")
            return {}
        if self.old is not None and target.read_bytes() == self.old:
            verdict.add(int(sealed), 0, f"{label}: the old file is back")
            return {}
        try:
            return in_file(target)
        except VademecumError as error:
            verdict.add(1, 0, f"{label}: {error}")
            return {}

    def _extracted(self, root: Path, acks, label: str, verdict: Verdict, *, go_on: bool) -> None:
        parts, target = root / self.scene.parts, root / "k.h5"
        there = self._target(root, acks, label, verdict)
        parts.parent.mkdir(parents=True, exist_ok=True)
        folder = ShardFolder(parts, header=header())
        found = in_folder(folder) | there
        batches = [int(ack.split()[1]) for ack in acks if ack.startswith("batch")]
        wanted = self.scene.before | keys(*batches)
        lost = len(wanted - set(found))
        wrong = [key for key, right in found.items() if not right]
        verdict.add(lost, len(wrong), f"{label}: {lost} lost, {len(wrong)} wrong")
        if go_on and not verdict.lost:
            if not set(there) >= ALL:
                for batch in BATCHES:
                    folder.commit(batch, batch_shape=(1,))
                made = seal(folder, target, expected=ALL, replace=True)
            else:
                sweep(root)  # an extraction that finds its file complete
                with KnowledgeCache.open(target) as opened:
                    made = opened.content_id
            right = made == self.ids["seal"] and all(in_file(target).values())
            verdict.add(0, int(not right), f"{label}: going on made {made}")
            self._clean(root, label, verdict)

    def _merged(self, root: Path, acks, label: str, verdict: Verdict, *, go_on: bool) -> None:
        from cache.combining.merging import merge

        for name, raw in self.inputs.items():
            changed = (root / name).read_bytes() != raw
            verdict.add(int(changed), 0, f"{label}: the input {name} changed")
        there = self._target(root, acks, label, verdict)
        incomplete = there and (set(there) != ALL or not all(there.values()))
        verdict.add(0, int(bool(incomplete)), f"{label}: a merged file with other entries")
        if go_on and not verdict.lost:
            merge([root / name for name in self.inputs], root / "k.h5", replace=True)
            with KnowledgeCache.open(root / "k.h5", verify="full") as opened:
                right = opened.content_id == self.ids["merge"]
            verdict.add(0, int(not right), f"{label}: merging again made something else")
            self._clean(root, label, verdict)

    def _clean(self, root: Path, label: str, verdict: Verdict) -> None:
        left = [path.name for path in root.rglob(TEMP + "*")]
        verdict.add(0, len(left), f"{label}: left behind {left}")


def lookup(root: Path, name: str) -> Path:
    """An empty place below `root`, whatever was there before."""
    with suppress(FileNotFoundError):
        shutil.rmtree(root / name)
    return root / name


__all__ = ["Checker", "Verdict", "final_ids", "in_file", "in_folder", "lookup", "make"]
