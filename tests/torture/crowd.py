"""Readers, writers and a sealer at once, without a lock; and two jobs with one recipe."""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

from checking import in_file, same
from kills import said
from workload import ALL, BATCHES, header, make

from cache import KnowledgeCache, ShardFolder, seal
from cache.combining.merging import merge
from cache.durable import TEMP
from cache.errors import StorageError, VademecumError

ENTRIES = 240


def entry(number: int):
    """The n-th entry everybody may commit; its value follows from its number."""
    return make.entry("embedded", ("ig", "basophil")[number % 2], number // 2)


def children(doings) -> list[dict]:
    """Runs functions at once, each in a child; what they return, or what went wrong."""
    begun = []
    for doing in doings:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                found = doing()
            except Exception as error:  # noqa: BLE001 - handed on
                found = {"bad": 1, "why": f"{type(error).__name__}: {error}"}
            os.write(writing, json.dumps(found).encode())
            os._exit(0)
        os.close(writing)
        begun.append((pid, reading))
    found = [json.loads(said(reading)) for _, reading in begun]
    for pid, _ in begun:
        os.waitpid(pid, 0)
    return found


def _write(parts: Path, seed: int, until: float) -> dict:
    """Commits overlapping batches in an order of its own; the folder may be sealed under it."""
    random_, acked, again = random.Random(seed), set(), 0
    folder = ShardFolder(parts, header=header())
    while time.monotonic() < until:
        first = random_.randrange(ENTRIES)
        batch = [entry(n % ENTRIES) for n in range(first, first + random_.randrange(1, 4))]
        try:
            folder.commit(batch, batch_shape=(len(batch),))
        except StorageError as error:
            if "no such folder" not in str(error):
                raise
            again += 1
            folder = _open(parts)
            continue
        acked |= {make.key(one) for one in batch}
        if random_.random() < 0.05:
            folder = _open(parts)  # another job
    return {"acked": sorted(acked), "again": again, "bad": 0}


def _open(parts: Path) -> ShardFolder:
    for _ in range(100):
        try:
            return ShardFolder(parts, header=header())
        except StorageError as error:  # it went away between two looks
            if "no such folder" not in str(error):
                raise
    raise AssertionError(parts)


def _seal(root: Path, until: float) -> dict:
    """Seals what is there and merges it into the one file, again and again."""
    rounds = 0
    while time.monotonic() < until:
        time.sleep(0.02)
        rounds += _seal_once(root, rounds)
    return {"rounds": rounds, "bad": 0}


def _seal_once(root: Path, number: int) -> bool:
    folder = _open(root / "k.parts")
    if not folder.present():
        return False
    part = root / f"part-{number}.h5"
    seal(folder, part)
    merge([root / "k.h5", part], root / "k.h5", replace=True)
    part.unlink()
    return True


def _read(target: Path, seed: int, until: float) -> dict:
    """Opens the file and reads at random; an old file stays readable after it was replaced."""
    random_, reads, seen, generations = random.Random(seed), 0, 0, set()
    known = {make.key(entry(n)): entry(n) for n in range(ENTRIES)}
    while time.monotonic() < until:
        verify = "full" if random_.random() < 0.2 else "lazy"
        with KnowledgeCache.open(target, verify=verify) as opened:
            generations.add(opened.content_id)
            found = opened.blocks["embedded"]
            keys, entries = found.keys(), list(found.entries())
            if len(keys) < seen:
                raise AssertionError(f"{len(keys)} entries after {seen}")
            seen = len(keys)
            for _ in range(10):
                row = random_.randrange(len(keys))
                if not same(entries[row].values, known[keys[row]].values):
                    raise AssertionError(f"entry {row} is wrong")
                reads += 1
    return {"reads": reads, "generations": len(generations), "bad": 0}


def crowd(seconds: float, root: Path, *, readers: int = 8, writers: int = 4) -> dict:
    """What happened; `lost` and `wrong` must be 0."""
    first = ShardFolder(root / "k.parts", header=header())
    first.commit([entry(0)], batch_shape=(1,))
    seal(first, root / "k.h5")
    until = time.monotonic() + seconds
    doings = [lambda n=n: _write(root / "k.parts", n, until) for n in range(writers)]
    doings += [lambda n=n: _read(root / "k.h5", 100 + n, until) for n in range(readers)]
    found = children([*doings, lambda: _seal(root, until)])
    _seal_once(root, 999_999)
    there = _entries(root / "k.h5")
    acked = {key for one in found[:writers] for key in one.get("acked", ())}
    left = [path.name for path in root.rglob(TEMP + "*")]
    why = [one["why"] for one in found if one["bad"]] + left
    return {
        "lost": len(acked - set(there)),
        "wrong": sum(one["bad"] for one in found) + len(left) + list(there.values()).count(False),
        "acked": len(acked),
        "reads": sum(one.get("reads", 0) for one in found),
        "generations": min([one.get("generations", 0) for one in found[writers:-1]]),
        "seals": found[-1].get("rounds", 0),
        "folders made again": sum(one.get("again", 0) for one in found[:writers]),
        "why": why,
    }


def _entries(path: Path) -> dict[str, bool]:
    known = {make.key(entry(n)): entry(n) for n in range(ENTRIES)}
    with KnowledgeCache.open(path, verify="full") as opened:
        found = opened.blocks["embedded"]
        pairs = list(zip(found.keys(), found.entries(), strict=True))
        return {k: k in known and same(e.values, known[k].values) for k, e in pairs}


def _job(root: Path, seed: int) -> dict:
    """What `vademecum extract` does, without a model."""
    random_, target = random.Random(seed), root / "k.h5"
    try:
        if not target.exists():
            folder = ShardFolder(root / "k.parts", header=header())
            for batch in BATCHES:
                time.sleep(random_.uniform(0, 0.004))
                folder.commit(batch, batch_shape=(len(batch),))
            return {"id": seal(folder, target, expected=ALL), "bad": 0, "how": "sealed"}
    except VademecumError:
        if not target.exists():
            raise
    with KnowledgeCache.open(target, verify="full") as opened:
        return {"id": opened.content_id, "bad": 0, "how": "found"}


def two_jobs(rounds: int, seed: int, scratch: Path) -> dict:
    """Two jobs that extract the same recipe into the same folder, many times."""
    how, wrong, lost, ids, why = Counter(), 0, 0, set(), []
    for number in range(rounds):
        root = scratch / str(number)
        root.mkdir()
        seeds = (seed + 2 * number, seed + 2 * number + 1)
        found = children([lambda root=root, one=one: _job(root, one) for one in seeds])
        why += [one["why"] for one in found if one["bad"]]
        wrong += sum(one["bad"] for one in found)
        how[tuple(sorted(one.get("how", "failed") for one in found))] += 1
        ids |= {one["id"] for one in found if "id" in one}
        there = in_file(root / "k.h5")
        lost += len(ALL - set(there))
        wrong += list(there.values()).count(False) + len(list(root.rglob(TEMP + "*")))
    shown = {" + ".join(pair): count for pair, count in how.items()}
    return {"lost": lost, "wrong": wrong + len(ids) - 1, "how": shown, "why": why[:5]}
