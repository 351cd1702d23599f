"""Decoded pictures: right, decoded once, private, never trusted when damaged; who reads them."""

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cache.errors import DataError, StorageError, ValueRefusedError
from prompt_tune import cases as cases_module
from prompt_tune import pixels
from prompt_tune.augment import Pictures
from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.cases import Cases, Feed
from prompt_tune.data.images import DataClass, ImageSplit
from prompt_tune.features import image_features
from prompt_tune.loop import train
from prompt_tune.method import Batch
from prompt_tune.pixels import stored_pictures
from prompt_tune.private_files import is_sound, keep_private
from prompt_tune.recipe import TrainSpec
from prompt_tune.seeds import derive_seed

SIZES = ((40, 36), (8, 30), (33, 33), (1, 2), (64, 20))


class Rows:
    """Rows of images, as a data set gives them."""

    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images

    def __getitem__(self, which):
        if isinstance(which, int):
            return {"image": self.images[which]}
        return {"image": [self.images[i] for i in which]}


def split_of(n: int, seed: int = 0) -> ImageSplit:
    random = np.random.default_rng(seed)
    images = [
        Image.fromarray(random.integers(0, 256, (*SIZES[k % len(SIZES)], 3)).astype(np.uint8))
        for k in range(n)
    ]
    return ImageSplit(
        name="train",
        classes=(DataClass("a", "a"), DataClass("b", "b")),
        labels=np.arange(n) % 2,
        ids=tuple(f"train/{k}" for k in range(n)),
        patients=(None,) * n,
        files=tuple(f"image {k}" for k in range(n)),
        rows=Rows(images),
        at=np.arange(n),
    )


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pixels, "CHUNK_BYTES", 9000)
    return tmp_path / "home" / "features"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cases whose image was asked for."""
    seen: list[int] = []
    original = ImageSplit.image

    def image(self: ImageSplit, index: int) -> Image.Image:
        seen.append(index)
        return original(self, index)

    monkeypatch.setattr(ImageSplit, "image", image)
    return seen


@pytest.fixture(scope="module")
def backbone(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tiny_models.tiny_clip(tmp_path_factory.mktemp("tower"), layers=2)
    return load_backbone(BackboneSpec(folder=str(folder)))


def files(home: Path) -> list[Path]:
    return sorted(home.rglob("*.safetensors"))


def equal(found: list[torch.Tensor], split: ImageSplit) -> bool:
    pairs = zip(found, split.rows.images, strict=True)
    return all(np.array_equal(tensor.numpy(), np.asarray(image)) for tensor, image in pairs)


def test_pictures_of_any_size_come_back(home: Path, decoded: list[int]) -> None:
    split = split_of(9)
    assert equal(stored_pictures(split), split)
    assert len(files(home)) > 1
    assert sorted(decoded) == list(range(9))
    found = stored_pictures(split_of(9))
    assert equal(found, split)
    assert len(decoded) == 9, "what is stored is not decoded again"
    part = split_of(12).subset([10, 3, 3])
    again = stored_pictures(part)
    assert len(decoded) == 10
    assert torch.equal(again[1], found[3])
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text()
        assert all(path.name in maps for path in files(home)), "mapped, not read"


def test_equal_pictures_are_kept_once(home: Path, decoded: list[int]) -> None:
    split = split_of(3).subset([0, 1, 0, 0])
    assert torch.equal(stored_pictures(split)[3], stored_pictures(split)[0])
    assert len(decoded) == 2


def test_a_killed_run_loses_at_most_a_chunk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    split, original = split_of(9), ImageSplit.image
    split.digests  # noqa: B018 - decoded before the fault
    asked: list[int] = []

    def image(self: ImageSplit, index: int) -> Image.Image:
        asked.append(index)
        if index == 8 and len(asked) <= 9:
            raise Killed
        return original(self, index)

    monkeypatch.setattr(ImageSplit, "image", image)
    with pytest.raises(Killed):
        stored_pictures(split)
    assert len(files(home)) == 1
    assert not [p for p in home.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    assert equal(stored_pictures(split), split)
    assert len(asked) - 9 == 4
    assert len(files(home)) == 2


@pytest.mark.parametrize("damage", ["pixel", "digest", "size", "cut", "empty"])
def test_a_damaged_file_is_replaced(home: Path, decoded: list[int], damage: str) -> None:
    split = split_of(9)
    stored_pictures(split)
    victim, *others = files(home)
    data = bytearray(victim.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start].decode()
    name = {"digest": "digests", "size": "sizes"}.get(damage, "pixels")
    at = start + int(header.split(f'"{name}"')[1].split('"data_offsets":[')[1].split(",")[0])
    data[at] ^= 1
    victim.write_bytes({"cut": bytes(data[:-9]), "empty": b""}.get(damage, bytes(data)))
    before = len(decoded)
    assert equal(stored_pictures(split), split)
    assert 0 < len(decoded) - before < 9
    assert all(path.is_file() for path in others)
    before = len(decoded)
    assert equal(stored_pictures(split), split)
    assert len(decoded) == before


def test_files_are_private_marked_and_never_shared(home: Path) -> None:
    from safetensors import safe_open

    from cache.sharing.pushing import push

    old = os.umask(0)
    try:
        stored_pictures(split_of(3))
    finally:
        os.umask(old)
    for path in [home, *home.rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    (path,) = files(home)
    with safe_open(path, "np") as stored:
        assert stored.metadata()["patient_derived"] == "true"
    copy = home.parent.parent / "copy.h5"
    copy.write_bytes(path.read_bytes())
    for file in (path, copy):
        with pytest.raises(ValueRefusedError, match="made from patients' images"):
            push(file, str(home.parent.parent / "there"), accept_licence=True, accept_privacy=True)


def test_a_picture_that_changes_is_refused(home: Path) -> None:
    split = split_of(4)
    split.digests  # noqa: B018
    split.rows.images[2] = Image.new("RGB", (9, 9))
    with pytest.raises(DataError, match="image 2: the image changed while it was being read"):
        stored_pictures(split)


def test_a_store_that_cannot_be_made_or_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels.PixelStore, "add", lambda *_: None)
    with pytest.raises(StorageError, match="a decoded picture cannot be read back"):
        stored_pictures(split_of(2))
    (home / "pixels").rename(home / "elsewhere")
    (home / "pixels").write_text("a file in the way")
    with pytest.raises(StorageError, match="pixels"):
        stored_pictures(split_of(2))


@pytest.mark.parametrize("views", [1, 3, "live"])
def test_training_sees_the_same_pixels_as_from_the_files(
    backbone: Backbone, decoded: list[int], home: Path, views: int | str
) -> None:
    split = split_of(6)
    cases = Cases(split, backbone, pixels=True, views=views, seed=4)
    indices = torch.tensor([5, 0, 3])
    evaluated = cases.batch(indices).images
    assert len(set(decoded)) == len(decoded) == 6, "evaluation keeps what it decodes"
    cases.prepare()
    before = len(decoded)
    for epoch in (1, 2):
        found = cases.batch(indices, epoch=epoch).images
        for i, pixels_ in zip(indices.tolist(), found, strict=True):
            image, k = split.rows.images[i], cases._view(i, epoch)
            expected = backbone.preprocess.view(image, k, 4, split.digests[i])
            assert torch.equal(pixels_, expected)
    assert len(decoded) == before
    assert torch.equal(evaluated[1], backbone.preprocess(split.rows.images[0]))


def test_a_batch_at_once_is_the_same(backbone: Backbone) -> None:
    pictures = Pictures(split_of(6), backbone.preprocess, "cpu")
    plain = pictures.show([4, 1, 0], [0, 1, 2], 9)
    pictures.at_once = True
    assert torch.equal(pictures.show([4, 1, 0], [0, 1, 2], 9), plain)


def test_views_of_features_decode_once(backbone: Backbone, decoded: list[int]) -> None:
    split = split_of(5)
    image_features(backbone, split, views=4, seed=2)
    assert sorted(decoded) == list(range(5))
    image_features(backbone, split, views=4, seed=2)
    assert len(decoded) == 5


def test_frozen_features_and_pixels_decode_once(backbone: Backbone, decoded: list[int]) -> None:
    cases = Cases(split_of(5), backbone, pixels=True, frozen=True)
    assert cases.batch(torch.arange(5), epoch=1).features is not None
    assert sorted(decoded) == list(range(5))


def test_validation_decodes_once(backbone: Backbone, decoded: list[int], home: Path) -> None:
    split = split_of(5)
    for _ in range(2):  # in two processes, as it were
        cases = Cases(split, backbone, pixels=True)
        for _ in range(3):
            found = torch.cat([batch.images for batch in cases.in_order(2)])
    assert sorted(decoded) == list(range(5))
    expected = torch.stack([backbone.preprocess(image) for image in split.rows.images])
    assert torch.equal(found, expected)


def test_a_damaged_file_of_the_same_name_is_replaced(home: Path) -> None:
    home.mkdir(parents=True)
    path = keep_private(home, b"derived")
    assert keep_private(home, b"derived") == path
    path.write_bytes(b"derive")
    assert not is_sound(path)
    assert keep_private(home, b"derived") == path
    assert path.read_bytes() == b"derived"


class Line(nn.Module):
    """A method that reads pixels and notes when; its dropout depends on the step's seed."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.events = events

    def trainable(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    def prompts(self) -> frozenset[str]:
        return frozenset()

    def backward(self, batch: Batch) -> torch.Tensor:
        self.events.append("step")
        dropped = nn.functional.dropout(batch.images.mean(dim=(2, 3)), 0.5)
        loss = nn.functional.cross_entropy(dropped @ self.weight.T, batch.labels)
        loss.backward()
        return loss.detach()


def test_a_batch_made_ahead_changes_no_bit(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = Cases(split_of(10), backbone, pixels=True, views=3, seed=1)
    spec = TrainSpec(epochs=2, batch_size=3, lr=0.1, warmup_epochs=0)
    plain = Line([])
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=0.1, momentum=spec.momentum, weight_decay=spec.weight_decay
    )
    from prompt_tune.schedule import learning_rate

    for epoch in (1, 2):
        optimizer.param_groups[0]["lr"] = learning_rate(spec, epoch)
        for step, indices in enumerate(cases.epoch(epoch, 3)):
            torch.manual_seed(derive_seed(1, "step", epoch, step))
            optimizer.zero_grad()
            plain.backward(cases.batch(indices, epoch=epoch))
            optimizer.step()

    events: list[str] = []
    batch = Cases.batch

    def noted(self: Cases, *rest, **named) -> Batch:
        events.append("batch")
        return batch(self, *rest, **named)

    monkeypatch.setattr(Cases, "batch", noted)
    ahead = Line(events)
    result = train(ahead, cases, None, spec, folder=tmp_path, digest="d")
    assert torch.equal(ahead.weight, plain.weight)
    assert events == ["batch", "step", "batch", "step", "batch", "step"] * 2
    assert 0 < result["stall_share"] < 1


def test_the_feed_counts_what_is_waited_for(
    backbone: Backbone, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))

    class Time:
        perf_counter: Callable[[], int] = staticmethod(lambda: next(clock))

    feed = Feed(Cases(split_of(4), backbone, pixels=True))
    assert files(home), "decoded before the first step, and not part of it"
    monkeypatch.setattr(cases_module, "time", Time)
    for epoch in (1, 2, 3):
        feed.batch(torch.tensor([1, 2]), epoch=epoch)
    assert feed.waited() == 3
