"""Detached signatures over content ids, with the user's ssh key.

A signature says who vouches for a content id. It stands in `FILE.sig`, in the format of
`ssh-keygen -Y sign`, over the 64 hexadecimal digits and a line feed, in a namespace of its own so
that it can be mistaken for no other signature of the same key.
"""

import shutil
import subprocess
from pathlib import Path

from cache.durable import storage_errors, write_atomic
from cache.errors import CacheFormatError, CacheMismatchError, RecipeError, SystemRefusedError
from cache.inspect import verify

NAMESPACE = "vademecum-cache"
SUFFIX = ".sig"
LARGEST = 1 << 16  # of a signature
PATIENCE = 120.0  # seconds; the user may have to type a passphrase or touch a token


def signature_of(file: Path) -> Path:
    """Where the signature of a cache lies."""
    return file.with_name(file.name + SUFFIX)


def message(content_id: str) -> bytes:
    """What is signed."""
    return content_id.encode("ascii") + b"\n"


def _ssh_keygen(*arguments: str, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    """One run of ssh-keygen.

    Raises:
        SystemRefusedError: it is not installed, or does not end.
    """
    program = shutil.which("ssh-keygen")
    if program is None:
        what = "ssh-keygen is not installed"
        raise SystemRefusedError(what, do="Install OpenSSH 8.2 or later, or do without signatures.")
    command = [program, "-Y", *arguments]
    try:
        return subprocess.run(  # noqa: S603
            command, input=given, capture_output=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        what = "ssh-keygen did not end"
        raise SystemRefusedError(what, do="Add the key to ssh-agent first.") from error


def _last_line(done: "subprocess.CompletedProcess[bytes]") -> str:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def sign(file: Path, key: Path) -> Path:
    """Verifies a cache in full, signs its content id and returns the signature's path.

    Args:
        file: the cache.
        key: a private ssh key, or a public one whose private half is in ssh-agent.

    Raises:
        CacheFormatError: the cache is damaged.
        SystemRefusedError: no ssh-keygen, or it refused the key.
    """
    content_id = verify(file).content_id
    if not key.is_file():
        what = "there is no such key"
        raise RecipeError(what, where=key, do="Name an ssh key, such as ~/.ssh/id_ed25519.")
    done = _ssh_keygen("sign", "-q", "-f", str(key), "-n", NAMESPACE, given=message(content_id))
    if done.returncode != 0 or not done.stdout:
        what = "ssh-keygen did not sign"
        do = "Check the key, its passphrase, or ssh-agent."
        raise SystemRefusedError(what, where=key, found=_last_line(done), do=do)
    target = signature_of(file)
    write_atomic(target, done.stdout)
    return target


def check_signature(content_id: str, signature: Path, signers: Path) -> str:
    """The principal whose key signed `content_id`.

    Args:
        content_id: of a cache that was verified.
        signature: the detached signature.
        signers: an allowed-signers file: lines of principal and public key.

    Raises:
        CacheFormatError: no signature there, or not one.
        CacheMismatchError: of something else, for another purpose, or by none of the signers.
        SystemRefusedError: no ssh-keygen.
    """
    for path, label in ((signature, "signature"), (signers, "file of allowed signers")):
        if not path.is_file():
            what = f"there is no such {label}"
            raise CacheFormatError(what, where=path)
    with storage_errors(signature):
        if signature.stat().st_size > LARGEST:
            what = "too long for a signature"
            raise CacheFormatError(what, where=signature)
    found = _ssh_keygen("find-principals", "-s", str(signature), "-f", str(signers))
    principals = found.stdout.decode("utf-8", "replace").splitlines()
    if found.returncode != 0 or not principals:
        what, do = "signed by none of the allowed signers", f"Check {signers.name}."
        raise CacheMismatchError(what, where=signature, found=_last_line(found), do=do)
    place = ("-s", str(signature), "-f", str(signers), "-n", NAMESPACE)
    for principal in principals:
        done = _ssh_keygen("verify", "-I", principal, *place, given=message(content_id))
        if done.returncode == 0:
            return principal
    what, do = "the signature is not one over this content id", "Trust neither of the two."
    raise CacheMismatchError(
        what, where=signature, found=_last_line(done), wanted=content_id, do=do
    )
