"""Pushing: a cache to another place, after a look at what must not leave and a read back."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cache.combining.joining import recipes_of
from cache.durable import storage_errors
from cache.errors import CacheFormatError, CacheMismatchError, ValueRefusedError
from cache.inspect import safe_text, verify
from cache.progress import track
from cache.sealed import is_sealed
from cache.sharing.licences import REFUSED, describe_licences, gate_of, licences_of, notice
from cache.sharing.privacy import Finding, describe_findings, few_classes, lint_cache
from cache.sharing.pulling import mebibytes, remote_header
from cache.sharing.remote_file import CHUNK, Remote, remote_at
from cache.sharing.signing import signature_of
from cache.store import KnowledgeCache
from cache.user_folder import user_cache

ReadBack = Literal["full", "header"]
MARKS = ("patient_derived", "contains_patient_derived")
HEAD = 1 << 16  # of a file that is no cache, looked at for such a mark


@dataclass(frozen=True)
class PushReport:
    """What was pushed.

    Args:
        url: where to, without password or query.
        content_id: what to publish, so that others can pin it.
        size: in bytes.
        already: the same content was there before.
        read_back: what was read and compared afterwards.
        gated: whether the source model's page asks for consent.
        licences: licences and duties, as lines.
        findings: what the lint for personal data found and the user accepted.
        warnings: what to think about.
        beside: names of the files put beside it.
    """

    url: str
    content_id: str
    size: int
    already: bool
    read_back: ReadBack
    gated: str
    licences: tuple[str, ...]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    beside: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def describe(self) -> str:
        """The report as lines for a terminal."""
        how = "was already there" if self.already else "pushed"
        compared = "every byte" if self.read_back == "full" else "the header"
        lines = [f"{self.url}: {how}, read back ({compared})", f"content id  {self.content_id}"]
        lines += [safe_text(line, 300) for line in self.licences]
        lines += [f"accepted: {safe_text(finding.describe(), 300)}" for finding in self.findings]
        lines += [f"note: {warning}" for warning in self.warnings]
        lines += [f"beside it: {name}" for name in self.beside]
        return "\n".join(lines)


def _refuse_image_derived(file: Path) -> None:
    """Nothing, unless a file is marked, or lies, as features of patients' images.

    Raises:
        ValueRefusedError: it is; nothing changes that.
    """
    with storage_errors(file):
        store = (user_cache() / "features").resolve()
        inside = store in file.resolve().parents
        head = b""
        if file.is_file() and not is_sealed(file):
            with file.open("rb") as stream:
                head = stream.read(HEAD)
    if inside or any(f'"{mark}"'.encode() in head for mark in MARKS):
        what = "made from patients' images: such features can identify a patient"
        do = "They stay on this machine; share the recipe instead."
        raise ValueRefusedError(what, where=file, do=do)


def _refuse_marked(opened: KnowledgeCache) -> None:
    tables: dict[str, Mapping[str, Any]] = {"provenance": opened.provenance}
    tables |= {f"recipe {n}": part for n, part in enumerate(recipes_of(opened.recipe))}
    tables |= {f"block {name}": dict(block.spec) for name, block in opened.blocks.items()}
    for where, table in tables.items():
        marked = any(table.get(m) not in (None, False, "no", "false") for m in MARKS)
        if marked or str(table.get("source", "")).lower() in {"image", "images"}:
            what = "made from patients' images: such features can identify a patient"
            do = "They stay on this machine; share the recipe instead."
            raise ValueRefusedError(what, where=f"{opened.path}, {where}", do=do)


def _check_licence(opened: KnowledgeCache, *, accept: bool) -> None:
    strictest = licences_of(opened.provenance)[0]
    if strictest.kind in REFUSED and not accept:
        what = f"the licence of a source of this cache is {strictest.kind}"
        found = f"{safe_text(strictest.names[0])}, gated: {safe_text(gate_of(opened.provenance))}"
        do = "If you may pass it on, push with --accept-licence."
        raise ValueRefusedError(what, where=opened.path, found=found, do=do)


def _check_privacy(opened: KnowledgeCache, *, accept: bool) -> tuple[Finding, ...]:
    findings = tuple(lint_cache(opened))
    if findings and not accept:
        what = "names or texts look like personal data"
        found = safe_text(describe_findings(findings), 600)
        do = "Remove it and extract again; if it is harmless, push with --accept-privacy."
        raise ValueRefusedError(what, where=opened.path, found=found, do=do)
    return findings


def _digest(remote: Remote, size: int, label: str) -> str:
    """SHA-256 of a remote file of `size` bytes; of a little more if it is longer."""
    digest, have = hashlib.sha256(), 0
    with (
        track(f"{label} {remote.name} (MiB)", mebibytes(size)) as shown,
        remote.reading() as stream,
    ):
        while have <= size and (data := stream.read(CHUNK)):
            digest.update(data)
            shown.advance(mebibytes(have + len(data)) - mebibytes(have))
            have += len(data)
    return digest.hexdigest()


def _is_there(remote: Remote, content_id: str) -> bool:
    """True if a cache of this content has the name.

    Raises:
        CacheMismatchError: something else has it.
    """
    do = "Choose another name; nothing that was published is replaced."
    try:
        _, header = remote_header(remote)
    except FileNotFoundError:
        return False
    except CacheFormatError as error:
        what = "something that is not a knowledge cache is there"
        raise CacheMismatchError(what, where=remote.shown, do=do) from error
    if header.content_id != content_id:
        what = "another knowledge cache is there"
        raise CacheMismatchError(
            what, where=remote.shown, found=header.content_id, wanted=content_id, do=do
        )
    return True


def _read_back(remote: Remote, local: Remote, size: int, content_id: str, how: ReadBack) -> None:
    """Nothing, if the remote file is the local one.

    Raises:
        CacheFormatError: it is not.
    """
    try:
        _, header = remote_header(remote)
        same = header.content_id == content_id and header.size == size
        if same and how == "full":
            same = _digest(remote, size, "reading back") == _digest(local, size, "comparing")
    except (FileNotFoundError, CacheFormatError):
        same = False
    if not same:
        what, do = "what is there now is not what was pushed", "Delete it there and push again."
        raise CacheFormatError(what, where=remote.shown, wanted=content_id, do=do)


def _put_beside(remote: Remote, suffix: str, data: bytes) -> str:
    """Puts a small file beside the cache, unless it is there; returns its name."""
    beside = remote.beside(suffix)
    try:
        with beside.reading() as stream:
            if stream.read(len(data) + 1) == data or suffix == ".sig":
                return beside.name  # a signature that was published is not replaced
    except FileNotFoundError:
        pass
    beside.put_small(data)
    return beside.name


def push(
    file: Path,
    url: str,
    *,
    accept_licence: bool = False,
    accept_privacy: bool = False,
    read_back: ReadBack = "full",
) -> PushReport:
    """Verifies a cache, puts it at `url` under its name, and reads it back.

    A NOTICE with licences and duties goes beside it, and the signature if there is one. The same
    content twice changes nothing; another content never replaces what is there.

    Args:
        file: the cache.
        url: a path, `file://`, `s3://` or `hf://`; with `/` at the end, the file's name is added.
        accept_licence: push although the licence is unknown, non-commercial or no-derivatives.
        accept_privacy: push although names or texts look like personal data.
        read_back: `full` compares every byte, `header` size and digests of the header.

    Raises:
        ValueRefusedError: image-derived, or the licence or the lint says no.
        CacheFormatError: damaged, here or after the upload.
        CacheMismatchError: something else is there.
        RecipeError: not an address that can be pushed to.
        MissingExtraError: the library for it is not installed.
        StorageError: the network, or no space, or no permission.
    """
    _refuse_image_derived(file)
    remote = remote_at(url, file.name)
    remote.check_writable()
    report = verify(file)
    with KnowledgeCache.open(file, expect=report.content_id) as opened:
        _refuse_marked(opened)
        _check_licence(opened, accept=accept_licence)
        findings = _check_privacy(opened, accept=accept_privacy)
        provenance, warning = opened.provenance, few_classes(opened)
    already = _is_there(remote, report.content_id)
    if not already:
        remote.put(file)
    _read_back(remote, remote_at(str(file)), report.size, report.content_id, read_back)
    beside = [_put_beside(remote, ".NOTICE", notice(report.content_id, provenance).encode())]
    if (signature := signature_of(file)).is_file():
        beside.append(_put_beside(remote, signature.suffix, signature.read_bytes()))
    return PushReport(
        url=remote.shown,
        content_id=report.content_id,
        size=report.size,
        already=already,
        read_back=read_back,
        gated=gate_of(provenance),
        licences=tuple(describe_licences(provenance)),
        findings=findings,
        warnings=(warning,) if warning else (),
        beside=tuple(beside),
    )
