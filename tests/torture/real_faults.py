"""Faults that nothing imitates: a full disk, a file size limit, a folder that may not be written.

Run as a program it meets one fault and prints what happened as JSON.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from checking import in_file, in_folder
from workload import ALL, BATCHES, STALE, header, keys

from cache import KnowledgeCache, ShardFolder, seal
from cache.durable import TEMP
from cache.errors import StorageError

HERE = Path(__file__).resolve().parent


def why_not() -> str | None:
    """The reason why nothing can be mounted here, or None."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    done = subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True)
    return None if done.returncode == 0 else "user namespaces are not permitted"


def meet(fault: str, root: Path) -> dict:
    """What happened when a child process met a fault in `root`."""
    script = [sys.executable, "-B", str(HERE / "real_faults.py"), fault, str(root)]
    mounting = {
        "full disk": 'mount -t tmpfs -o size=400k none "$0" && exec "$@"',
        "read-only": 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"',
    }
    if fault in mounting:
        script = ["unshare", "-rm", "sh", "-c", mounting[fault], str(root), *script]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, check=False, capture_output=True, env=alone)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


def _temps(root: Path) -> list[str]:
    return [path.name for path in root.rglob(TEMP + "*") if path.name != STALE]


def _refused(doing: Callable[[], object]) -> str:
    try:
        doing()
    except StorageError as error:
        return str(error)
    return "not refused"


def _commit_all(folder: ShardFolder) -> set[int]:
    done = set()
    for number, batch in enumerate(BATCHES):
        folder.commit(batch, batch_shape=(len(batch),))
        done.add(number)
    return done


def _fill(root: Path, left: int) -> None:
    """Leaves about `left` bytes on the disk."""
    disk = os.statvfs(root)
    size = disk.f_bavail * disk.f_frsize - left
    (root / "ballast").write_bytes(b"x" * max(0, size))


def _report(root: Path, acked: set[int], *lines: str) -> dict:
    folder = ShardFolder(root / "k.parts", header=header())
    found = in_folder(folder)
    return {
        "lost": len(keys(*acked) - set(found)),
        "wrong": list(found.values()).count(False) + len(folder.damaged) + len(_temps(root)),
        "lines": lines,
    }


def full_disk(root: Path) -> dict:
    """Commits until the disk is full, seals into a full disk, then makes room and goes on."""
    folder, acked, lines = ShardFolder(root / "k.parts", header=header()), set(), []
    folder.commit(BATCHES[0], batch_shape=(2,))
    acked.add(0)
    for left in range(0, 16 * 4096, 4096):  # full at every point of a commit
        _fill(root, left)
        try:
            folder.commit(BATCHES[1], batch_shape=(2,))
            acked.add(1)
            break
        except StorageError as error:
            lines.append(str(error))
            lines += [f"left {name}" for name in _temps(root)]
    (root / "ballast").unlink()
    _commit_all(folder)
    acked |= {0, 1, 2, 3}
    for left in range(0, 48 * 4096, 4096):  # and at every point of sealing
        _fill(root, left)
        import cache.publishing

        cache.publishing.free_space = lambda *_: None  # somebody else may fill it meanwhile
        try:
            seal(folder, root / "k.h5", expected=ALL)
            break
        except StorageError as error:
            lines.append(str(error))
            lines += [f"left {name}" for name in _temps(root)]
            if set(in_folder(folder)) != ALL:
                lines.append("an entry is lost")
    wrong = [line for line in lines if "no space left. Free some space" not in line]
    there = in_file(root / "k.h5")
    return {"lost": len(ALL - set(there)), "wrong": len(wrong), "lines": [*wrong, *lines[:1]]}


def file_size(root: Path) -> dict:
    """A limit on the size of files, as quotas and shells set it."""
    folder = ShardFolder(root / "k.parts", header=header())
    folder.commit(BATCHES[0], batch_shape=(2,))
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
    lines = [_refused(lambda: folder.commit(BATCHES[1], batch_shape=(2,)))]
    lines.append(_refused(lambda: seal(folder, root / "k.h5")))
    from cache.combining.merging import merge

    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    other = ShardFolder(root / "o.parts", header=header())
    other.commit(BATCHES[1], batch_shape=(2,))
    seal(other, root / "o.h5")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
    lines.append(_refused(lambda: merge([root / "o.h5"], root / "m.h5")))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    wrong = [line for line in lines if "larger than allowed here" not in line]
    found = _report(root, {0}, *wrong, *lines[:1])
    return {**found, "wrong": found["wrong"] + len(wrong)}


def read_only(root: Path) -> dict:
    """Nothing can be written; what is there can be read."""
    look = ShardFolder(root / "k.parts", header=header(), create=False)
    found = in_folder(look)
    opened = ShardFolder(root / "k.parts", header=header())
    lines = [_refused(lambda: opened.commit(BATCHES[1], batch_shape=(2,)))]
    lines.append(_refused(lambda: seal(opened, root / "new.h5")))
    lines.append(_refused(lambda: ShardFolder(root / "n.parts", header=header())))
    with KnowledgeCache.open(root / "k.h5", verify="full") as sealed:
        sealed.content_id  # noqa: B018 - it opens
    wrong = [line for line in lines if "the file system is read-only" not in line]
    return {"lost": len(keys(0) - set(found)), "wrong": len(wrong), "lines": wrong + lines[:1]}


def no_permission(root: Path) -> dict:
    """A folder of somebody else."""
    (root / "k.parts").chmod(0o555)
    root.chmod(0o555)
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    opened = ShardFolder(root / "k.parts", header=header())
    found = in_folder(opened)
    lines = [_refused(lambda: opened.commit(BATCHES[1], batch_shape=(2,)))]
    lines.append(_refused(lambda: seal(opened, root / "new.h5")))
    lines.append(_refused(lambda: ShardFolder(root / "n.parts", header=header())))
    wrong = [line for line in lines if "no permission" not in line]
    return {"lost": len(keys(0) - set(found)), "wrong": len(wrong), "lines": wrong + lines[:1]}


def long_name(root: Path) -> dict:
    """A name that the file system does not take."""
    folder = ShardFolder(root / "k.parts", header=header())
    folder.commit(BATCHES[0], batch_shape=(2,))
    lines = [_refused(lambda: seal(folder, root / ("k" * 300 + ".h5")))]
    lines.append(_refused(lambda: ShardFolder(root / ("k" * 300), header=header())))
    from cache.combining.merging import merge

    folder.commit(BATCHES[1], batch_shape=(2,))
    other = ShardFolder(root / "o.parts", header=header())
    _commit_all(other)
    seal(other, root / "o.h5")
    lines.append(_refused(lambda: merge([root / "o.h5"], root / ("m" * 300 + ".h5"))))
    wrong = [line for line in lines if "the name is too long" not in line]
    found = _report(root, {0}, *wrong, *lines[:1])
    return {**found, "wrong": found["wrong"] + len(wrong)}


def prepare(root: Path) -> None:
    """A sealed file and a working folder with one batch."""
    folder = ShardFolder(root / "k.parts", header=header())
    folder.commit(BATCHES[0], batch_shape=(2,))
    seal(folder, root / "k.h5")
    folder = ShardFolder(root / "k.parts", header=header())
    folder.commit(BATCHES[0], batch_shape=(2,))


FAULTS: dict[str, Callable[[Path], dict]] = {
    "full disk": full_disk,
    "file size": file_size,
    "read-only": read_only,
    "no permission": no_permission,
    "long name": long_name,
}
MOUNTS = ("full disk", "read-only")
PREPARED = ("read-only", "no permission")


if __name__ == "__main__":
    print(json.dumps(FAULTS[sys.argv[1]](Path(sys.argv[2]))))
