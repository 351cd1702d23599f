"""One file at an address: a path, `s3://`, `hf://`, `https://`. Through fsspec but for plain paths.

A remote file is read as a stream from some offset and written whole or not at all. What libraries
raise becomes one clear line without the address's password or signature.
"""

import importlib
import importlib.util
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from cache.durable import drafting, make_folder, refuse_source_folder, write_atomic
from cache.errors import CacheFormatError, MissingExtraError, RecipeError, StorageError
from cache.extras import install
from cache.sharing.remote_errors import network_errors, quiet_hub, remote_errors

CHUNK = 8 << 20
PACKAGES = {
    "s3": ("fsspec", "s3fs"),
    "hf": ("fsspec", "huggingface_hub"),
    "http": ("fsspec", "aiohttp"),
    "https": ("fsspec", "aiohttp"),
}


class Reader(Protocol):
    """What is read from an open remote file."""

    def read(self, length: int, /) -> bytes:
        """At most `length` bytes; none at the end."""
        ...

    def close(self) -> None:
        """Lets go of the connection."""
        ...


class Remote:
    """One file at an address. Made by `remote_at`.

    Args:
        address: of the file.

    Attributes:
        name: its base name.
        shown: the address without password, query and fragment.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        parts = urlsplit(address)
        self.shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        if parts.scheme in {"s3", "hf"}:  # `@revision` and `#` are parts of a name there
            bucket = parts.netloc.rpartition("@")[2] if parts.scheme == "s3" else parts.netloc
            query = f"?{parts.query}" if parts.query and parts.scheme == "hf" else ""
            self.shown = f"{parts.scheme}://{bucket}{parts.path}{query}"
            self.shown += f"#{parts.fragment}" if parts.fragment else ""
        self.name = unquote(parts.path.rpartition("/")[2])

    def beside(self, suffix: str) -> "Remote":
        """The file whose name has `suffix` after it."""
        parts = urlsplit(self.address)
        if parts.query:
            return type(self)(urlunsplit(parts._replace(path=parts.path + suffix)))
        return type(self)(self.address + suffix)

    def _open(self, start: int) -> Reader:
        raise NotImplementedError

    def _put(self, file: Path) -> None:
        raise NotImplementedError

    def check_writable(self) -> None:
        """Nothing, if this kind of address can be written to.

        Raises:
            RecipeError: it cannot.
        """

    @contextmanager
    def reading(self, start: int = 0) -> Iterator[Reader]:
        """The file, open from byte `start` on.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be reached, or its owner refuses.
        """
        with remote_errors(self.shown):
            stream = self._open(start)
            try:
                yield stream
            finally:
                with suppress(*network_errors()):
                    stream.close()

    def put(self, file: Path) -> None:
        """Writes a local file there, whole or not at all.

        Whether something was there is looked at before, and what is there is read back after.

        Raises:
            StorageError: it cannot be reached, or its owner refuses.
        """
        try:
            with remote_errors(self.shown):
                self._put(file)
        except FileNotFoundError as error:
            what, do = "no such bucket, repository or branch", "Create it first."
            raise StorageError(what, where=self.shown, do=do) from error

    def put_small(self, data: bytes) -> None:
        """Writes, or replaces, a small file there.

        Raises:
            StorageError: it cannot be reached, or its owner refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            path.write_bytes(data)
            self.put(path)


class LocalFile(Remote):
    """A path on this machine."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        path = unquote(urlsplit(address).path) if address.startswith("file:") else address
        self.path = Path(path).expanduser()
        self.shown, self.name = str(self.path), self.path.name

    def _open(self, start: int) -> Reader:
        fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stream = os.fdopen(fd, "rb")
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            stream.close()
            what = "not a regular file"
            raise CacheFormatError(what, where=self.path, do="Name a knowledge cache.")
        stream.seek(start)
        return stream

    def _put(self, file: Path) -> None:
        refuse_source_folder(self.path)
        make_folder(self.path.parent)
        with file.open("rb") as source, drafting(self.path.parent) as draft:
            end = 0
            while chunk := source.read(CHUNK):
                end = draft.write_at(chunk, end)
            draft.sync()
            draft.publish(self.path, replace=False)

    def put_small(self, data: bytes) -> None:
        """Writes, or replaces, a small file there.

        Raises:
            StorageError: its folder refuses.
        """
        write_atomic(self.path, data)


class HttpFile(Remote):
    """A file on a web server; read only."""

    def _open(self, start: int) -> Reader:
        timeout = importlib.import_module("aiohttp").ClientTimeout
        options = {"trust_env": True, "timeout": timeout(total=None, sock_connect=30, sock_read=60)}
        system = _filesystem("http", client_kwargs=options)
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        # A stream, not ranges of fixed size: those are read whole into memory, however long a
        # server makes them. The size is not asked for; the header of the cache says it.
        stream: Any = system.open(self.address, "rb", block_size=0, size=1, headers=headers)
        if start:
            self._seek(stream, start)
        found: Reader = stream
        return found

    def _seek(self, stream: Any, start: int) -> None:
        answered = re.match(r"bytes (\d+)-", stream.r.headers.get("Content-Range", ""))
        if stream.r.status == 206 and answered and int(answered[1]) == start:
            return
        if stream.r.status != 200:
            what = "the server sent another range than asked for"
            raise OSError(what)
        while start > 0:  # a server without ranges: what is here already comes again
            skipped = stream.read(min(start, CHUNK))
            if not skipped:
                what = "the server sent less than before"
                raise OSError(what)
            start -= len(skipped)

    def check_writable(self) -> None:
        """Nothing, never.

        Raises:
            RecipeError: always.
        """
        what = "a web server cannot be written to"
        do = "Push to a folder, s3:// or hf://, and put the file on the web server yourself."
        raise RecipeError(what, where=self.shown, do=do)


class ObjectFile(Remote):
    """An object in an S3 store: a put shows all of it or nothing."""

    scheme = "s3"

    def _open(self, start: int) -> Reader:
        system = _filesystem(self.scheme)
        stream: Any = system.open(self.address, "rb", block_size=CHUNK, cache_type="none")
        stream.seek(start)
        found: Reader = stream
        return found

    def _put(self, file: Path) -> None:
        _filesystem(self.scheme).put_file(str(file), self.address)


class HubFile(ObjectFile):
    """A file in a repository of the hub: `hf://[datasets/]OWNER/NAME[@REVISION]/PATH`."""

    scheme = "hf"

    @contextmanager
    def reading(self, start: int = 0) -> Iterator[Reader]:
        """See `Remote.reading`."""
        with quiet_hub(), super().reading(start) as stream:
            yield stream

    def put(self, file: Path) -> None:
        """See `Remote.put`."""
        with quiet_hub():
            super().put(file)

    def _put(self, file: Path) -> None:
        system = _filesystem(self.scheme)
        place = system.resolve_path(self.address)
        if not hasattr(place, "repo_id"):
            what, do = "not a repository of the hub", "Name it as hf://[datasets/]OWNER/NAME/FILE."
            raise RecipeError(what, where=self.shown, do=do)
        hub = importlib.import_module("huggingface_hub")
        hub.HfApi(endpoint=system.endpoint, token=system.token).upload_file(  # one commit
            path_or_fileobj=str(file),
            path_in_repo=place.path_in_repo,
            repo_id=place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
            commit_message=f"Add {place.path_in_repo}",
        )


_KINDS: dict[str, Callable[[str], Remote]] = {
    "": LocalFile,
    "file": LocalFile,
    "s3": ObjectFile,
    "hf": HubFile,
    "http": HttpFile,
    "https": HttpFile,
}


def remote_at(address: str, name: str | None = None) -> Remote:
    """The file at `address`; one that ends with `/`, or is a folder here, gets `name` after it.

    Raises:
        RecipeError: an address of another kind, or one that names no file.
        MissingExtraError: the library for this kind is not installed.
    """
    scheme, mark, _ = address.partition("://")
    scheme = scheme.lower() if mark else ""
    if scheme not in _KINDS or "::" in address:
        what, wanted = "an address of an unknown kind", "a path, file://, s3://, hf:// or https://"
        raise RecipeError(what, found=repr(scheme or address[:40]), wanted=wanted)
    for package in PACKAGES.get(scheme, ()):
        if importlib.util.find_spec(package) is None:
            what = f"{scheme}:// needs the package {package!r}, which is not installed"
            raise MissingExtraError(what, do=install("share"))
    found = _KINDS[scheme](address)
    folder = address.endswith("/") or (isinstance(found, LocalFile) and found.path.is_dir())
    if folder and name is not None:
        return _KINDS[scheme](address.rstrip("/") + "/" + name)
    if folder or not found.name:
        what, do = "this address names a folder", "Name a file."
        raise RecipeError(what, where=found.shown, do=do)
    return found


def _filesystem(scheme: str, **options: Any) -> Any:
    """A file system that remembers no listing."""
    found = importlib.import_module("fsspec").filesystem(scheme, **options)
    found.invalidate_cache()
    return found
