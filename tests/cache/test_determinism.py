"""The same content is the same bytes, wherever, whenever and with whatever it is packed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

# content id and SHA-256 of the file
GOLDEN = {
    "cache_at": (
        "d6b2e99d7b24714fc422a1ede94ffb2829604effbbc05a8abaf2e1f2e0ca411d",
        "24816acdc0396ae4ad964c4490a2b6306085e77a8e7f70c5f0272ca48961403c",
    ),
    "tiny_cache_at": (
        "ea0ffe6da1614329a6bd12fcabce024eb6dcd6b732ba14555e82e461df24a1db",
        "fa8f34820d839ad6e3d4569f012e07f33309ebabbb483663d3d2c3e89eae5844",
    ),
}
LOWEST = "3.12.1" if sys.version_info >= (3, 13) else "3.11.0"  # that has a wheel for this Python

_CHILD = """
import importlib.util, os, sys
from pathlib import Path
root, script, folder, umask, wanted = sys.argv[1:]
os.umask(int(umask))
sys.path.insert(0, root)
import h5py
assert wanted in {"", h5py.__version__}, h5py.__version__
spec = importlib.util.spec_from_file_location("make", script)
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
for name in ("cache_at", "tiny_cache_at"):
    print(name, getattr(make, name)(Path(folder) / f"{name}.h5"))
"""


def made_elsewhere(make, root, folder, *, umask=0o022, wanted="", **environment):
    """Content id and file digest of the golden caches, made by another process."""
    arguments = [str(root), make.__file__, str(folder), str(umask), wanted]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ids = dict(line.split() for line in done.stdout.splitlines())
    return {
        name: (identity, hashlib.sha256((folder / f"{name}.h5").read_bytes()).hexdigest())
        for name, identity in ids.items()
    }


@pytest.mark.parametrize(
    ("zone", "umask", "seed"),
    [("UTC", 0o022, "0"), ("Asia/Kathmandu", 0o077, "1"), ("America/St_Johns", 0o002, "random")],
)
def test_neither_zone_umask_nor_hash_seed_matters(make, tmp_path, root, zone, umask, seed):
    found = made_elsewhere(make, root, tmp_path, umask=umask, TZ=zone, PYTHONHASHSEED=seed)
    assert found == GOLDEN
    assert (tmp_path / "cache_at.h5").stat().st_mode & 0o777 == 0o666 & ~umask


def test_how_the_bytes_are_gathered_does_not_matter(make, tmp_path, monkeypatch):
    monkeypatch.setattr("cache.packing.WRITE_STEP", 50)
    for name, golden in GOLDEN.items():
        path = tmp_path / f"{name}.h5"
        identity = getattr(make, name)(path)
        assert (identity, hashlib.sha256(path.read_bytes()).hexdigest()) == golden


@pytest.fixture(scope="module")
def lowest(request) -> Path:
    """A folder with the lowest supported h5py; fetched once, then kept by pytest."""
    tag = f"h5py-{LOWEST}-{sys.implementation.cache_tag}"
    folder = request.config.cache.mkdir("packages") / tag
    if not folder.is_dir():
        draft = folder.with_name(f"{tag}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--disable-pip-version-check", "--retries", "1"]
        command += ["--timeout", "10", "--target", str(draft), f"h5py=={LOWEST}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"h5py {LOWEST} cannot be fetched: no package index")
        draft.rename(folder)
    return folder


def test_the_lowest_supported_h5py_writes_the_same_bytes(make, tmp_path, root, lowest):
    found = made_elsewhere(make, root, tmp_path, wanted=LOWEST, PYTHONPATH=str(lowest))
    assert found == GOLDEN
