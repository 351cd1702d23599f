"""Embedded assets: pinned wheels, checked twice, never imported, fetched once."""

import hashlib
import json
import os
import stat
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cache import assets, pip_download
from cache.assets import Asset, fetch, listing, location, table, verify
from cache.errors import (
    CacheFormatError,
    MissingExtraError,
    ModelError,
    RecipeError,
    StorageError,
    UnknownNameError,
)
from cache.recipe import validate

NAME, MODULE = "vademecum-test-carrier", "vademecum_test_carrier"
FILES = {
    f"{MODULE}/__init__.py": b"raise RuntimeError('the code of a carrier was imported')\n",
    f"{MODULE}/data/one.bin": b"one" * 1000,
    f"{MODULE}/data/two.bin": b"two" * 2000,
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel with nothing but an archive's own means."""
    info = f"{MODULE}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\nRequires-Dist: nowhere-to-be\n"
    files = files | {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{MODULE}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    return path


def row(wheel: Path, *names: str, **changes: Any) -> Asset:
    members = [
        {
            "path": f"{MODULE}/data/{name}",
            "name": name,
            "sha256": sha256(FILES[f"{MODULE}/data/{name}"]),
            "size": len(FILES[f"{MODULE}/data/{name}"]),
        }
        for name in names
    ]
    plain = {
        "what": "a test",
        "package": NAME,
        "version": "1.0",
        "wheel": {
            "file": wheel.name,
            "sha256": sha256(wheel.read_bytes()),
            "size": wheel.stat().st_size,
        },
        "members": members,
        "licence": {"package": "MIT", "content": "MIT"},
        "notes": "",
    }
    return validate(Asset, plain | changes, where="test")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip looks into, and no index at all."""
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    return tmp_path / "wheels"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home" / "assets"


def test_fetched_checked_and_never_imported(wheels: Path, home: Path) -> None:
    wheel = build_wheel(wheels, FILES)
    rows = {"one": row(wheel, "one.bin"), "both": row(wheel, "one.bin", "two.bin")}
    assert [s.state for s in listing(rows)] == ["absent", "absent"]
    path = fetch("one", rows)
    assert path == location("one", rows) == home / "one" / "one.bin"
    assert path.read_bytes() == FILES[f"{MODULE}/data/one.bin"]
    assert MODULE not in sys.modules
    # What else travels in the wheel came with it, and nothing of the wheel stayed.
    wheel.unlink()
    assert fetch("both", rows) == home / "both"
    assert sorted(p.name for p in (home / "both").iterdir()) == ["one.bin", "two.bin"]
    assert sorted(p.name for p in home.iterdir() if p.is_dir()) == ["both", "one"]
    assert [s.state for s in listing(rows)] == ["present", "present"]
    assert [s.state for s in verify(rows, rows)] == ["present", "present"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((home / "one").stat().st_mode) == 0o777 & ~mask


def test_the_second_call_takes_no_digest(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"one": row(build_wheel(wheels, FILES), "one.bin")}
    fetch("one", rows)
    fetch("one", rows)
    monkeypatch.setattr(assets, "_digest", None)
    monkeypatch.setattr(assets, "download_wheel", None)
    started = time.perf_counter()
    fetch("one", rows)
    assert time.perf_counter() - started < 10  # a bound against hanging, not a speed


def test_another_wheel_under_the_same_version_is_refused(wheels: Path, home: Path) -> None:
    rows = {"one": row(build_wheel(wheels, FILES), "one.bin")}
    build_wheel(wheels, FILES | {f"{MODULE}/new.py": b""})
    with pytest.raises(
        CacheFormatError, match=r"is not the pinned one; found [0-9a-f]{64}, wanted"
    ):
        fetch("one", rows)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "found"),
    [(b"ONE" * 1000, "3000 bytes"), (b"one" * 999, "2997 bytes"), (b"one" * 1001, "3001 bytes")],
)
def test_another_member_is_refused(wheels: Path, home: Path, data: bytes, found: str) -> None:
    wheel = build_wheel(wheels, FILES | {f"{MODULE}/data/one.bin": data})
    text = f"one.bin inside the wheel is not the pinned one; found {found}, .*wanted 3000 bytes"
    with pytest.raises(CacheFormatError, match=text):
        fetch("one", {"one": row(wheel, "one.bin")})
    assert list(home.iterdir()) == []


def test_a_wheel_without_the_member(wheels: Path, home: Path) -> None:
    files = {k: v for k, v in FILES.items() if not k.endswith("one.bin")}
    rows = {"one": row(build_wheel(wheels, files), "one.bin")}
    with pytest.raises(CacheFormatError, match=r"the wheel holds no .*one.bin"):
        fetch("one", rows)
    assert list(home.iterdir()) == []


def test_a_file_that_changed_later_is_refused(wheels: Path, home: Path) -> None:
    rows = {"both": row(build_wheel(wheels, FILES), "one.bin", "two.bin")}
    fetch("both", rows)
    file = home / "both" / "one.bin"
    file.write_bytes(b"ONE" * 1000)
    text = r"the asset 'both' changed after it was fetched; found one\.bin has sha256 .*Delete"
    with pytest.raises(CacheFormatError, match=text):
        fetch("both", rows)
    assert verify(["both"], rows)[0].state == "changed"
    file.unlink()
    with pytest.raises(CacheFormatError, match=r"found one\.bin is missing"):
        fetch("both", rows)


def test_verify_finds_what_a_stamp_hides(wheels: Path, home: Path) -> None:
    rows = {"one": row(build_wheel(wheels, FILES), "one.bin")}
    path = fetch("one", rows)
    before = path.stat()
    path.write_bytes(b"ONE" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert listing(rows)[0].state == "present"
    assert verify(["one"], rows)[0].state == "changed"
    (home / "one.stamp.json").write_text("[")
    assert listing(rows)[0].state == "changed"


def test_two_processes_at_once(wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes while this one downloads: the first stays."""
    rows = {"one": row(build_wheel(wheels, FILES), "one.bin")}
    publish = assets.publish

    def late(work: Path, target: Path) -> bool:
        target.mkdir()
        (target / "one.bin").write_bytes(FILES[f"{MODULE}/data/one.bin"])
        return publish(work, target)

    monkeypatch.setattr(assets, "publish", late)
    assert fetch("one", rows).read_bytes() == FILES[f"{MODULE}/data/one.bin"]
    assert [p.name for p in home.iterdir() if p.is_dir()] == ["one"]


def test_offline(wheels: Path, home: Path) -> None:
    wheel = build_wheel(wheels, FILES)
    rows = {"one": row(wheel, "one.bin")}
    wheel.unlink()
    text = f"the wheel of {NAME} 1.0 could not be downloaded; found No matching.* Go online once"
    with pytest.raises(ModelError, match=text) as caught:
        fetch("one", rows)
    assert "\n" not in str(caught.value)
    assert list(home.iterdir()) == []


def test_messages_of_pip_keep_no_address() -> None:
    stderr = "ERROR: Could not fetch https://name:secret@mirror.example/simple/ today\n"
    message = str(pip_download._refusal("x 1.0", stderr))
    assert "secret" not in message
    assert "an address" in message
    full = pip_download._refusal("x 1.0", "OSError: [Errno 28] No space left on device")
    assert isinstance(full, StorageError)
    assert "no space left while x 1.0 was downloaded" in str(full)


def test_without_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"one": row(build_wheel(wheels, FILES), "one.bin")}
    monkeypatch.setattr(pip_download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"has no pip.*python -m ensurepip"):
        fetch("one", rows)


def test_a_place_that_cannot_be_written(wheels: Path, tmp_path: Path) -> None:
    rows = {"one": row(build_wheel(wheels, FILES), "one.bin")}
    (tmp_path / "home").write_text("in the way")
    with pytest.raises(StorageError, match=r"assets: .*Set VADEMECUM_HOME"):
        fetch("one", rows)


def test_unknown_asset() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown asset 'blodmnist'. Did you mean 'bloodm"):
        fetch("blodmnist")
    with pytest.raises(UnknownNameError, match=r"unknown asset 'x'"):
        verify(["x"])


def test_the_table() -> None:
    """Every row is complete, and equal wheels are the same file."""
    rows = table()
    assert {"smollm2-135m-instruct", "minilm-l6-v2", "clip-vit-b16-image", "bloodmnist"} <= set(
        rows
    )
    for asset in rows.values():
        for digest in (asset.wheel.sha256, *(m.sha256 for m in asset.members)):
            assert len(bytes.fromhex(digest)) == 32
        assert len({m.name for m in asset.members}) == len(asset.members)
        assert all(Path(m.name).name == m.name for m in asset.members)
    wheels = {asset.wheel.file: asset.wheel for asset in rows.values()}
    assert all(asset.wheel == wheels[asset.wheel.file] for asset in rows.values())


def test_a_wrong_table(tmp_path: Path) -> None:
    (tmp_path / "assets.yaml").write_text(json.dumps({"x": {"what": "y", "pakage": "z"}}))
    with pytest.raises(RecipeError, match=r"assets.yaml: x: unknown key 'pakage'. Did you mean"):
        assets.read_table(tmp_path / "assets.yaml")


@pytest.mark.assets
def test_the_real_images_are_the_pinned_ones() -> None:
    path = fetch("bloodmnist")
    assert verify(["bloodmnist"])[0].state == "present"
    assert hashlib.md5(path.read_bytes()).hexdigest() == "7053d0359d879ad8a5505303e11de1dc"
