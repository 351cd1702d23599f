"""Detached signatures with a real ssh key."""

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from cache.errors import CacheFormatError, CacheMismatchError, RecipeError, SystemRefusedError
from cache.sharing.signing import check_signature, message, sign, signature_of

needs_ssh_keygen = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed"
)


def new_key(folder: Path, name: str) -> tuple[Path, str]:
    """A key without passphrase, and its public half."""
    key = folder / name
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key)]
    subprocess.run(command, check=True)
    return key, " ".join(key.with_suffix(".pub").read_text().split()[:2])


class Lab:
    """A signed cache and the file of allowed signers that knows its signer."""

    def __init__(self, folder: Path, file: Path, content_id: str) -> None:
        self.folder, self.file, self.content_id = folder, file, content_id
        self.key, public = new_key(folder, "ours")
        self.signers = folder / "signers"
        self.signers.write_text(f'lab-a@example.org namespaces="vademecum-cache" {public}\n')


@pytest.fixture(scope="module")
def made(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("signed")
    return Lab(folder, folder / "k.h5", make.tiny_cache_at(folder / "k.h5"))


@pytest.fixture
def lab(made: Lab) -> Lab:
    sign(made.file, made.key)
    return made


@needs_ssh_keygen
def test_a_signature_is_detached_and_names_its_principal(lab: Lab) -> None:
    before = lab.file.read_bytes()
    signature = sign(lab.file, lab.key)
    assert signature == signature_of(lab.file) == lab.folder / "k.h5.sig"
    assert lab.file.read_bytes() == before
    assert check_signature(lab.content_id, signature, lab.signers) == "lab-a@example.org"


@needs_ssh_keygen
def test_the_key_may_be_in_the_agent_only(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = shutil.which("ssh-agent")
    if agent is None or shutil.which("ssh-add") is None:
        pytest.skip("ssh-agent is not installed")
    socket = lab.folder / "agent"
    running = subprocess.Popen([agent, "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    hidden = lab.folder / "hidden"
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        for _ in range(100):
            added = subprocess.run(
                ["ssh-add", "-q", str(lab.key)], capture_output=True, check=False
            )
            if added.returncode == 0:
                break
        lab.key.rename(hidden)
        signature = sign(lab.file, lab.key.with_suffix(".pub"))
        assert check_signature(lab.content_id, signature, lab.signers) == "lab-a@example.org"
    finally:
        if hidden.exists():
            hidden.rename(lab.key)
        running.terminate()
        running.wait()


@needs_ssh_keygen
def test_another_content_id_is_refused(lab: Lab) -> None:
    with pytest.raises(CacheMismatchError, match="not one over this content id"):
        check_signature("0" * 64, signature_of(lab.file), lab.signers)


@needs_ssh_keygen
def test_a_key_that_is_not_allowed_is_refused(lab: Lab) -> None:
    other, _ = new_key(lab.folder, f"other{len(list(lab.folder.iterdir()))}")
    signature = sign(lab.file, other)
    with pytest.raises(CacheMismatchError, match=r"none of the allowed signers.*Check signers"):
        check_signature(lab.content_id, signature, lab.signers)


@needs_ssh_keygen
def test_a_signature_for_another_purpose_is_refused(lab: Lab, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(message(lab.content_id))
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(lab.key), "-n", "git", str(text)]
    subprocess.run(command, check=True, capture_output=True)
    signers = tmp_path / "signers"
    signers.write_text(lab.signers.read_text().replace('namespaces="vademecum-cache" ', ""))
    with pytest.raises(CacheMismatchError, match="not one over this content id"):
        check_signature(lab.content_id, tmp_path / "text.sig", signers)


@needs_ssh_keygen
def test_an_altered_signature_is_refused(lab: Lab, tmp_path: Path) -> None:
    lines = signature_of(lab.file).read_text().splitlines()
    for row in range(1, len(lines) - 1):
        altered, middle = list(lines), len(lines[row]) // 2
        old = altered[row][middle]
        altered[row] = (
            altered[row][:middle] + ("A" if old != "A" else "B") + lines[row][middle + 1 :]
        )
        path = tmp_path / f"{row}.sig"
        path.write_text("\n".join(altered) + "\n")
        with pytest.raises(CacheMismatchError):
            check_signature(lab.content_id, path, lab.signers)


@needs_ssh_keygen
def test_what_is_missing_or_too_long_is_said(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError, match="there is no such signature"):
        check_signature(lab.content_id, tmp_path / "none.sig", lab.signers)
    with pytest.raises(CacheFormatError, match="no such file of allowed signers"):
        check_signature(lab.content_id, signature_of(lab.file), tmp_path / "none")
    long = tmp_path / "long.sig"
    long.write_bytes(bytes(1 << 17))
    with pytest.raises(CacheFormatError, match="too long for a signature"):
        check_signature(lab.content_id, long, lab.signers)
    with pytest.raises(RecipeError, match=r"no such key.*Name an ssh key"):
        sign(lab.file, tmp_path / "none")
    with pytest.raises(SystemRefusedError, match="ssh-keygen did not sign"):
        sign(lab.file, lab.signers)


@needs_ssh_keygen
def test_a_damaged_cache_is_not_signed(lab: Lab, tmp_path: Path) -> None:
    raw = bytearray(lab.file.read_bytes())
    raw[-1] ^= 1
    path = tmp_path / "k.h5"
    path.write_bytes(raw)
    with pytest.raises(CacheFormatError, match="digest differs"):
        sign(path, lab.key)
    assert not signature_of(path).exists()


def test_a_machine_without_ssh_keygen_is_told_so(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = sealed.with_name("key")
    key.write_text("a key")
    monkeypatch.setenv("PATH", str(sealed.parent))
    with pytest.raises(SystemRefusedError, match=r"ssh-keygen is not installed. Install OpenSSH"):
        sign(sealed, key)
