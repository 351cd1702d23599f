"""The user's cache folder, and how things are put into it: all at once or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import StorageError


def user_cache() -> Path:
    """$VADEMECUM_HOME, else $XDG_CACHE_HOME/vademecum, else ~/.cache/vademecum."""
    if home := os.environ.get("VADEMECUM_HOME"):
        return Path(home).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "vademecum"
    return Path.home() / ".cache" / "vademecum"


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turns what the file system refuses into one line.

    Raises:
        StorageError: no space, no permission, or something in the way.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            what, do = "no space left", "Free some space, or set VADEMECUM_HOME to another disk."
        elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            what, do = "not writable", "Set VADEMECUM_HOME to a folder you may write to."
        else:
            what = f"the file system refused ({error.strerror or error})"
            do = "Set VADEMECUM_HOME to a local folder you may write to."
        raise StorageError(what, where=where, do=do) from error


@contextmanager
def private_temporary(root: Path, label: str) -> Iterator[Path]:
    """A new folder under `root`, on the same file system, gone afterwards unless it was renamed."""
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=root, prefix=f".{label}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(work: Path, target: Path) -> bool:
    """Renames a finished private folder into place; False if another process was first.

    Its permissions become those of an ordinary new folder: temporary ones are private.
    """
    mask = os.umask(0)
    os.umask(mask)
    work.chmod(0o777 & ~mask)
    sync_folder(work)
    try:
        work.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    sync_folder(target.parent)
    return True
