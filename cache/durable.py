"""Files that are there whole or not at all, also after a crash or a power cut.

temp file in the same folder -> write -> fsync -> link or rename -> fsync(folder).
Nothing here takes a lock: names are unique and the last step is atomic.
"""

import errno
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache.errors import StorageError
from cache.recipe import canonical_json
from cache.signals import go_on

TEMP = ".tmp-"
ABANDONED_AFTER = 24 * 3600.0  # seconds; a temp of another machine may be swept after that
_SOURCE_FOLDER = Path(__file__).resolve().parent

_CAUSES = {
    errno.ENOSPC: ("no space left", "Free some space; what was committed is safe."),
    errno.EDQUOT: ("the quota is used up", "Free some space; what was committed is safe."),
    errno.EFBIG: ("the file would be larger than allowed here", "Raise the file size limit."),
    errno.EACCES: ("no permission", "Choose another folder or change its permissions."),
    errno.EPERM: ("not permitted", "Choose another folder or change its permissions."),
    errno.EROFS: ("the file system is read-only", "Choose another folder."),
    errno.ENOENT: ("no such folder", "Create it first."),
    errno.EEXIST: ("a file stands where a folder should be", "Choose another name."),
    errno.ENOTDIR: ("a part of the path is not a folder", "Check the path."),
    errno.EISDIR: ("is a folder", "Name a file."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one."),
    errno.EIO: ("the device failed", "Check the disk; what was committed before is safe."),
    errno.EMFILE: ("too many open files", "Raise the limit of open files (ulimit -n)."),
}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turns every OSError inside into one clear line about `path`.

    Raises:
        StorageError: whatever the operating system refused.
    """
    try:
        yield
    except OSError as error:
        what, do = _CAUSES.get(error.errno or 0, (error.strerror or str(error), None))
        raise StorageError(what, where=path, do=do) from error


def refuse_full_disk(error: BaseException, where: object) -> None:
    """Nothing, unless a full disk is why `error` came.

    Raises:
        StorageError: it is.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
            what, do = _CAUSES[cause.errno]
            raise StorageError(what, where=where, do=do) from error
        cause = cause.__cause__ or cause.__context__


def refuse_source_folder(path: Path) -> None:
    """Nothing, unless `path` lies in the source package called `cache`.

    Raises:
        StorageError: it does.
    """
    if _SOURCE_FOLDER in (resolved := path.absolute().resolve()).parents or (
        resolved == _SOURCE_FOLDER
    ):
        what = "this is the source code of the program, not a place for data"
        raise StorageError(what, where=path, do="Choose another folder.")


def _owner() -> str:
    """A name for this process that says nothing about the machine."""
    place = os.uname().nodename
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            found = Path(source)
            place += found.readlink().name if found.is_symlink() else found.read_text("ascii")
    return hashlib.sha256(place.encode("utf-8", "replace")).hexdigest()[:12]


def unique_name(prefix: str) -> str:
    """A name no other process uses; `is_abandoned` can tell later whether its process is gone."""
    return f"{prefix}{_owner()}-{os.getpid()}-{secrets.token_hex(6)}"


class Draft:
    """A file that nobody sees yet. Made by `drafting`."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    def write_at(self, data: bytes | bytearray | memoryview, offset: int) -> int:
        """Writes all of `data` at `offset`; returns where it ends."""
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(self.fd, view, offset)
            if done == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            view, offset = view[done:], offset + done
        return offset

    def sync(self) -> None:
        """Returns when the bytes are on the device. A failure is final for this file."""
        os.fsync(self.fd)

    def publish(self, target: Path, *, replace: bool) -> bool:
        """Gives the synced file its name, durably; False if the name was taken, durably as well.

        With `replace` an existing file is exchanged in one step: who has it open keeps the old one.
        """
        go_on()
        if replace:
            self.path.replace(target)
        elif not _link(self.path, target):
            sync_folder(target.parent)  # whoever was first may be between its link and its sync
            return False
        with suppress(FileNotFoundError):
            self.path.unlink()
        sync_folder(target.parent)
        return True


def _link(path: Path, target: Path) -> bool:
    try:
        os.link(path, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without links: the look and the rename are two steps, the file is whole.
        if target.exists():
            return False
        path.rename(target)
    return True


def sync_file(path: Path) -> None:
    """Returns when the bytes of a file that others may have written are on the device."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Returns when the names in `folder` are on the device."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Makes `folder` and what is missing above it, durably.

    A folder that is there already may have been made by a job that was killed before its name was
    durable, so that name is synced too.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):
            path.mkdir()
        sync_folder(path.parent)
    if not missing:
        with suppress(PermissionError):  # it may be written to by others only
            sync_folder(folder.parent)


@contextmanager
def drafting(folder: Path) -> Iterator[Draft]:
    """A draft in `folder`; nothing of it is left at the end unless it was published.

    Raises:
        StorageError: the operating system refused something.
    """
    go_on()
    path = folder / unique_name(TEMP)
    with storage_errors(folder):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            try:
                fd = os.open(path, flags, 0o666)  # the umask applies; mkstemp's 0600 hides a cache
                try:
                    yield Draft(path, fd)
                finally:
                    os.close(fd)
            finally:
                _discard(path)
        except BaseException:
            _discard(path)  # a signal may have come between the two lines above
            raise


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def write_atomic(path: Path, data: bytes, *, replace: bool = True) -> bool:
    """Writes a small file whole; False if it was there already and `replace` is off.

    Raises:
        StorageError: the operating system refused something.
    """
    refuse_source_folder(path)
    with drafting(path.parent) as draft:
        draft.write_at(data, 0)
        draft.sync()
        return draft.publish(path, replace=replace)


def write_json_atomic(path: Path, value: Any, *, replace: bool = True) -> bool:
    """Writes plain data as canonical JSON with a final newline; see `write_atomic`."""
    return write_atomic(path, canonical_json(value) + b"\n", replace=replace)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def is_abandoned(path: Path, prefix: str) -> bool:
    """True if `path`, a regular file named by `unique_name`, has no process or is a day old.

    Raises:
        OSError: it cannot be looked at.
    """
    owner, _, rest = path.name.removeprefix(prefix).partition("-")
    pid = rest.partition("-")[0]
    found = path.lstat()
    old = time.time() - found.st_mtime > ABANDONED_AFTER
    gone = owner == _owner() and pid.isdigit() and not _is_alive(int(pid))
    return stat.S_ISREG(found.st_mode) and (old or gone)


def sweep(folder: Path) -> int:
    """Removes drafts whose process is gone; returns how many."""
    swept = 0
    for path in folder.glob(TEMP + "*"):
        with suppress(OSError):
            if is_abandoned(path, TEMP):
                path.unlink()
                swept += 1
    return swept


def free_space(folder: Path, needed: int) -> None:
    """Nothing, if `folder` has room for `needed` bytes and five per cent more.

    Raises:
        StorageError: it has not.
    """
    with storage_errors(folder):
        disk = os.statvfs(folder)
    free, needed = disk.f_bavail * disk.f_frsize, needed + needed // 20
    if free < needed:
        do = "Free some space; what was committed is safe."
        found, wanted, what = f"{free / 1e6:.1f} MB", f"{needed / 1e6:.1f} MB", "no space left"
        raise StorageError(what, where=folder, found=found, wanted=wanted, do=do)
