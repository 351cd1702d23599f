"""A download that is not complete yet: whose it is, and how the next process takes it over.

    .pull-<digest of the header>                    a partial nobody works on
    .pull-<digest of the header>-<owner>-<pid>-...  one that a process works on

A process takes a partial by renaming it to a name of its own, so two never write into one file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.durable import is_abandoned, make_folder, storage_errors, unique_name

PARTIAL = ".pull-"


class Partial:
    """A partial download that this process alone writes to.

    Args:
        folder: of the file it becomes.
        digest: of the header.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.free = folder / f"{PARTIAL}{digest[:32]}"
        self.path = folder / unique_name(f"{self.free.name}-")
        self.keep = True
        self._take()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self.fd = os.open(self.path, flags, 0o666)
        self.resumed = os.fstat(self.fd).st_size

    def _take(self) -> None:
        """Renames the longest partial without a process to this one's name, if there is any."""
        left = [(p.lstat().st_size, p) for p in (self.free,) if p.is_file() and not p.is_symlink()]
        for path in self.free.parent.glob(f"{self.free.name}-*"):
            with suppress(OSError):
                if is_abandoned(path, f"{self.free.name}-"):
                    left.append((path.lstat().st_size, path))
        for _, path in sorted(left, reverse=True):
            with suppress(FileNotFoundError):  # another process was faster
                path.rename(self.path)
                return

    def size(self) -> int:
        """Bytes that are here."""
        return os.fstat(self.fd).st_size

    def restart(self) -> None:
        """Forgets what is here."""
        self.resumed = 0
        os.ftruncate(self.fd, 0)

    def let_go(self) -> None:
        """Leaves the partial to the next pull, or removes it."""
        os.close(self.fd)
        with suppress(FileNotFoundError):
            if self.keep:
                self.path.rename(self.free)
            else:
                self.path.unlink()


@contextmanager
def partial_of(folder: Path, digest: str) -> Iterator[Partial]:
    """A partial for the file with this header, left to the next pull or removed at the end.

    Raises:
        StorageError: the operating system refused something.
    """
    with storage_errors(folder):
        make_folder(folder)
        partial = Partial(folder, digest)
    try:
        yield partial
    finally:
        with storage_errors(folder):
            partial.let_go()
