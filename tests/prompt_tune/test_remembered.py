"""Digests remembered by the bytes of image files: right, private, never of another file."""

import os
import stat
from pathlib import Path

import datasets
import numpy as np
import PIL
import pytest
from PIL import Image
from PIL.ImageFile import ImageFile

from cache.errors import DataError, ValueRefusedError
from prompt_tune.data import images as images_module
from prompt_tune.data.images import DataClass, ImageSplit, image_digest
from prompt_tune.data.layout import file_rows


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(images_module, "BATCH", 3)
    return tmp_path / "home" / "features"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every image that Pillow decodes."""
    seen: list[object] = []
    original = ImageFile.load

    def load(self: ImageFile) -> object:
        if self.tile:
            seen.append(self)
        return original(self)

    monkeypatch.setattr(ImageFile, "load", load)
    return seen


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Pictures of several formats and modes; one is to be turned, one comes twice."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in range(4)
    ]
    turned = Image.Exif()
    turned[0x0112] = 6
    found = [tmp_path / name for name in ("a.png", "b.jpg", "c.png", "d.jpg", "e.png")]
    pictures[0].save(found[0])
    pictures[1].save(found[1])
    pictures[2].convert("L").save(found[2])
    pictures[3].save(found[3], exif=turned)
    found[4].write_bytes(found[0].read_bytes())
    return found


def split_of(paths: list[Path], rows: object = None) -> ImageSplit:
    n = len(paths)
    return ImageSplit(
        name="train",
        classes=(DataClass("a", "a"),),
        labels=np.zeros(n, dtype=np.int64),
        ids=tuple(f"train/{k}" for k in range(n)),
        patients=(None,) * n,
        files=tuple(path.name for path in paths),
        rows=file_rows(paths) if rows is None else rows,
        at=np.arange(n),
    )


def kept(home: Path) -> list[Path]:
    return sorted(home.rglob("*.safetensors"))


def embedded(paths: list[Path]) -> datasets.Dataset:
    values = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": values}, features=features)


@pytest.mark.parametrize("inside", [False, True])
def test_a_known_file_is_not_decoded(
    paths: list[Path], decoded: list[object], inside: bool
) -> None:
    expected = [image_digest(split_of(paths).image(k)) for k in range(5)]
    decoded.clear()
    first = split_of(paths, embedded(paths) if inside else None)
    assert list(first.digests) == expected
    assert len(decoded) == 4
    again = split_of(paths, None if inside else embedded(paths))
    assert again.subset([3, 1]).digests == (expected[3], expected[1])
    assert list(again.digests) == expected
    assert len(decoded) == 4


def test_another_file_of_the_same_name_size_and_time_is_decoded(
    paths: list[Path], decoded: list[object]
) -> None:
    bitmap, times = paths[0].with_suffix(".bmp"), (10**18, 10**18)
    found = []
    for colour in ("red", "blue"):
        Image.new("RGB", (5, 4), colour).save(bitmap)
        os.utime(bitmap, ns=times)
        found.append((bitmap.stat().st_size, split_of([bitmap]).digests[0]))
    assert found[0][0] == found[1][0]
    assert found[1][1] == image_digest(Image.new("RGB", (5, 4), "blue")) != found[0][1]


def test_what_is_kept_is_the_digest_of_the_bytes_that_were_read(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def exchanged(self: Path) -> bytes:
        data = read(self)
        if self == paths[0]:
            Image.new("RGB", (5, 4), "blue").save(self)
        return data

    monkeypatch.setattr(Path, "read_bytes", exchanged)
    before = image_digest(Image.open(paths[0]))
    assert split_of(paths[:1]).digests == (before,)
    monkeypatch.setattr(Path, "read_bytes", read)
    assert split_of(paths[:1]).digests[0] == image_digest(Image.new("RGB", (5, 4), "blue"))
    assert split_of(paths[4:]).digests == (before,)


def test_another_decoder_decodes_again(
    paths: list[Path], decoded: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    split_of(paths).digests  # noqa: B018
    monkeypatch.setattr(PIL, "__version__", "0.1")
    split_of(paths).digests  # noqa: B018
    assert len(decoded) == 8


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_removed(
    paths: list[Path], decoded: list[object], home: Path, damage: str
) -> None:
    first = split_of(paths).digests
    victim = kept(home)[0]
    data = bytearray(victim.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start].decode()
    data[start + int(header.split('"digests"')[1].split('"data_offsets":[')[1].split(",")[0])] ^= 1
    victim.write_bytes({"flip": bytes(data), "cut": data[:-9], "empty": b""}[damage])
    assert split_of(paths).digests == first
    assert 4 < len(decoded) < 8
    known = len(decoded)
    assert split_of(paths).digests == first
    assert len(decoded) == known


def test_files_are_private_marked_and_never_shared(paths: list[Path], home: Path) -> None:
    from safetensors import safe_open

    from cache.sharing.pushing import push

    old = os.umask(0)
    try:
        split_of(paths).digests  # noqa: B018
    finally:
        os.umask(old)
    for path in [home, *home.rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    for path in kept(home):
        with safe_open(path, "np") as stored:
            assert stored.metadata()["patient_derived"] == "true"
        with pytest.raises(ValueRefusedError, match="made from patients' images"):
            push(path, str(home.parent.parent / "there"), accept_licence=True, accept_privacy=True)


def test_where_nothing_can_be_kept_everything_is_decoded(
    paths: list[Path], decoded: list[object], home: Path
) -> None:
    home.parent.write_text("a file in the way")
    assert split_of(paths).digests == split_of(paths).digests
    assert len(decoded) == 8


def test_an_image_at_fault_is_named(paths: list[Path], tmp_path: Path) -> None:
    split_of(paths).digests  # noqa: B018
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 999, dtype=np.uint16)).save(deep)
    with pytest.raises(DataError, match=r"deep\.png: more than 8 bits per channel"):
        split_of([*paths, deep]).digests  # noqa: B018
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    with pytest.raises(DataError, match=r"b\.jpg: the image cannot be read"):
        split_of(paths).digests  # noqa: B018
    paths[1].unlink()
    with pytest.raises(DataError, match=r"b\.jpg: the image is missing"):
        split_of(paths).digests  # noqa: B018
