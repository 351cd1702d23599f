"""Pulling: a cache from elsewhere, under its name only when every byte of it was checked.

The header comes first. It names the content and digests all other bytes, so what is not wanted is
refused before it is downloaded, and a partial download is named after it: whatever address the
rest comes from, it is the same file. Nothing that was downloaded before is trusted.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.durable import Draft, free_space, refuse_source_folder, storage_errors, write_atomic
from cache.errors import CacheFormatError, CacheMismatchError, StorageError
from cache.header import PREFIX, Header, check_expected
from cache.header_reader import parse_header, prefix_length
from cache.inspect import verify
from cache.progress import Track, track
from cache.sealed import SealedFile
from cache.sharing.partial import Partial, partial_of
from cache.sharing.remote_errors import BrokenConnectionError
from cache.sharing.remote_file import CHUNK, Remote, remote_at

ATTEMPTS = 3  # in a row without one new byte
PAUSE = 0.5  # seconds before the second, doubled after each
SIGNATURE = b"-----BEGIN SSH SIGNATURE-----"
LARGEST_SIGNATURE = 1 << 16


@dataclass(frozen=True)
class PullReport:
    """What was pulled.

    Args:
        url: where from, without password or query.
        path: the file.
        content_id: what to pin.
        size: in bytes.
        resumed: bytes that an earlier, interrupted pull had left.
        already: the file was here before.
        pinned: the content id was given from outside.
        signature: the detached signature that lay beside it, not checked.
    """

    url: str
    path: Path
    content_id: str
    size: int
    resumed: int
    already: bool
    pinned: bool
    signature: Path | None

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        signature = None if self.signature is None else str(self.signature)
        return {**asdict(self), "path": str(self.path), "signature": signature}

    def describe(self) -> str:
        """The report as lines for a terminal."""
        how = "already here and sound" if self.already else "pulled and verified"
        lines = [
            f"{self.path}: {how}",
            f"content id  {self.content_id}",
            f"{self.size} bytes from {self.url}",
        ]
        if self.resumed:
            lines.append(f"{self.resumed} bytes of them from an interrupted pull")
        if not self.pinned:
            lines.append("not pinned: compare the content id with the one that was published")
        if self.signature is not None:
            lines.append(f"signature {self.signature}: check it with `cache verify --signers`")
        return "\n".join(lines)


def mebibytes(length: int) -> int:
    """The unit of progress: `length` bytes in begun MiB."""
    return -(-length >> 20)


def _declared_size(raw: bytes) -> int:
    """The size a header states; 0 if it cannot be read, which no header may state."""
    try:
        size = json.loads(raw[PREFIX:])["size"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
    return size if type(size) is int else 0


def _read_exactly(stream: Any, length: int) -> bytes:
    found = b""
    while len(found) < length and (more := stream.read(length - len(found))):
        found += more
    return found


def remote_header(remote: Remote) -> tuple[str, Header]:
    """The digest of a remote file's header, and the header.

    Raises:
        FileNotFoundError: there is no such file.
        CacheFormatError: it is not a sealed knowledge cache.
        StorageError: it cannot be reached.
    """
    with remote.reading() as stream:
        raw = _read_exactly(stream, PREFIX)
        try:
            raw += _read_exactly(stream, prefix_length(raw))
            header = parse_header(raw, _declared_size(raw))
        except CacheFormatError as error:
            raise CacheFormatError(str(error), where=remote.shown) from error
    if header.kind != "knowledge":
        what = "a part of an unfinished extraction, not a knowledge cache"
        raise CacheFormatError(what, where=remote.shown)
    return hashlib.sha256(raw).hexdigest(), header


def _wanted_header(remote: Remote) -> tuple[str, Header]:
    """`remote_header`, tried again where a connection broke."""
    for failures in range(1, ATTEMPTS):
        with suppress(BrokenConnectionError):
            return remote_header(remote)
        time.sleep(PAUSE * 2**failures)
    return remote_header(remote)


def _receive(remote: Remote, draft: Draft, header: Header, have: int, shown: Track) -> None:
    """Appends what a connection yields until the file has its size or the connection ends."""
    with remote.reading(have) as stream:
        while have < header.size:
            data = stream.read(min(CHUNK, header.size - have))
            if not data:
                what = f"it ended after {have} of {header.size} bytes"
                raise EOFError(what)
            with storage_errors(draft.path.parent):
                before, have = have, draft.write_at(data, have)
            shown.advance(mebibytes(have) - mebibytes(before))


def _fill(remote: Remote, partial: Partial, header: Header) -> None:
    """Downloads what is missing, over as many connections as make progress."""
    draft, failures = Draft(partial.path, partial.fd), 0
    free_space(partial.path.parent, header.size - partial.size())
    with track(f"pulling {remote.name} (MiB)", mebibytes(header.size)) as shown:
        shown.advance(mebibytes(partial.size()))
        while (have := partial.size()) < header.size:
            try:
                _receive(remote, draft, header, have, shown)
            except BrokenConnectionError:
                failures = 0 if partial.size() > have else failures + 1
                if failures == ATTEMPTS:
                    raise
                time.sleep(PAUSE * 2 ** max(failures - 1, 0))
    with storage_errors(partial.path.parent):
        draft.sync()


def _check(partial: Partial, header: Header, remote: Remote) -> None:
    """Every byte and value of what arrived; a fault makes the partial worthless."""
    try:
        verify(partial.path, expect=header.content_id)
    except (CacheFormatError, CacheMismatchError) as error:
        partial.keep = False
        reason = str(error).removeprefix(f"{partial.path}: ")
        what, do = "what arrived is not what its header says", "Nothing was kept."
        raise CacheFormatError(what, where=remote.shown, found=reason, do=do) from error


def _already(out: Path, header: Header) -> bool:
    """True if the wanted cache is here under its name, and sound.

    Raises:
        CacheMismatchError: something else has the name.
    """
    if not os.path.lexists(out):
        return False
    do = "Choose another name, or remove that file."
    try:
        with SealedFile(out) as found:
            identity = found.header.content_id
    except CacheFormatError as error:
        what = "this file exists and is not a knowledge cache"
        raise CacheMismatchError(what, where=out, do=do) from error
    if identity != header.content_id:
        what = "another knowledge cache has this name"
        raise CacheMismatchError(what, where=out, found=identity, wanted=header.content_id, do=do)
    verify(out, expect=header.content_id)
    return True


def _pull_signature(remote: Remote, out: Path) -> Path | None:
    """The signature beside a remote file, if there is one."""
    try:
        with remote.beside(".sig").reading() as stream:
            data = _read_exactly(stream, LARGEST_SIGNATURE + 1)
    except (FileNotFoundError, StorageError):
        return None
    if not data.startswith(SIGNATURE) or len(data) > LARGEST_SIGNATURE:
        return None
    path = out.with_name(out.name + ".sig")
    if not write_atomic(path, data, replace=False) and path.read_bytes() != data:
        return None  # another signature of yours stands there
    return path


def pull(url: str, out: Path, *, expect: str | None = None) -> PullReport:
    """Downloads a cache to `out`; goes on where an interrupted pull stopped.

    Args:
        url: a path, `file://`, `s3://`, `hf://` or `https://`.
        out: the file to make; an existing file is never replaced.
        expect: the content id it must have (or at least 12 digits of its start).

    Raises:
        CacheFormatError: missing, foreign or damaged there.
        CacheMismatchError: sound, but not the one expected; or `out` is something else.
        RecipeError: not an address that can be pulled from.
        MissingExtraError: the library for it is not installed.
        StorageError: the network, or no space, or no permission. What arrived is kept.
    """
    refuse_source_folder(out)
    if out.is_dir():
        what = "is a folder"
        raise StorageError(what, where=out, do="Name a file.")
    remote, resumed = remote_at(url), 0
    try:
        digest, header = _wanted_header(remote)
        check_expected(header.content_id, expect, remote.shown)
        if not (already := _already(out, header)):
            resumed = _download(remote, out, digest, header)
    except FileNotFoundError as error:
        what = "there is no such file"
        raise CacheFormatError(what, where=remote.shown, do="Check the address.") from error
    return PullReport(
        url=remote.shown,
        path=out,
        content_id=header.content_id,
        size=header.size,
        resumed=resumed,
        already=already,
        pinned=expect is not None,
        signature=_pull_signature(remote, out),
    )


def _download(remote: Remote, out: Path, digest: str, header: Header) -> int:
    """Puts the file under its name; returns how much of it was here from before."""
    with partial_of(out.parent, digest) as partial:
        try:
            _fill(remote, partial, header)
            _check(partial, header, remote)
        except CacheFormatError:
            if not partial.resumed:
                raise
            partial.keep = True  # the part from before was damaged: once more, from the start
            partial.restart()
            _fill(remote, partial, header)
            _check(partial, header, remote)
        with storage_errors(out):
            published = Draft(partial.path, partial.fd).publish(out, replace=False)
        partial.keep = False  # published, or another process was faster
    if not published:
        _already(out, header)
    return partial.resumed
