"""Cached image features: right, shared between splits, private, and never trusted when damaged."""

import hashlib
import os
import stat
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from cache.errors import ModelError, StorageError
from prompt_tune import features
from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.cases import Cases
from prompt_tune.data.images import DataClass, ImageSplit
from prompt_tune.data.layouts.npz import pixel_rows
from prompt_tune.features import image_features, store_of
from prompt_tune.method import Batch, Method, Problem
from prompt_tune.methods.promptsrc import PromptSRC, PromptSrcConfig


@pytest.fixture(scope="module")
def backbone(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tiny_models.tiny_clip(tmp_path_factory.mktemp("tower"), layers=2)
    return load_backbone(BackboneSpec(folder=str(folder)))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(features, "CHUNK", 4)
    return tmp_path / "home" / "features"


def split_of(n: int, seed: int = 0) -> ImageSplit:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 40, 36, 3)).astype(np.uint8)
    return ImageSplit(
        name="train",
        classes=(DataClass("a", "a"), DataClass("b", "b")),
        labels=np.arange(n) % 2,
        ids=tuple(f"train/{k}" for k in range(n)),
        patients=(None,) * n,
        files=tuple(f"image {k}" for k in range(n)),
        rows=pixel_rows(pixels),
        at=np.arange(n),
    )


@pytest.fixture
def encoded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward pass of the tower took."""
    sizes: list[int] = []
    encode = backbone.image.encode

    def counting(images, prompts=None):
        sizes.append(len(images))
        return encode(images, prompts)

    monkeypatch.setattr(backbone.image, "encode", counting)
    return sizes


def chunks(home: Path) -> list[Path]:
    return sorted(home.rglob("*.safetensors"))


def test_equals_the_tower(backbone: Backbone) -> None:
    split = split_of(6)
    found = image_features(backbone, split, views=3, seed=7)
    assert found.shape == (6, 3, 24)
    assert found.dtype == torch.float32
    for i in range(6):
        for k in range(3):
            pixels = backbone.preprocess.view(split.image(i), k, 7, split.digests[i])
            with torch.no_grad():
                expected = backbone.image.encode(pixels[None])[0]
            assert torch.allclose(found[i, k], expected, atol=1e-5)
    assert not torch.allclose(found[:, 0], found[:, 1], atol=1e-2)
    assert not torch.allclose(found[:, 1], found[:, 2], atol=1e-2)


def test_pixels_and_features_show_the_same_views(backbone: Backbone) -> None:
    split = split_of(8)
    from_features = Cases(split, backbone, pixels=False, views=3, seed=4)
    from_pixels = Cases(split, backbone, pixels=True, views=3, seed=4)
    indices = torch.tensor([5, 0, 3, 7])
    for epoch in (None, 0, 1):
        cached = from_features.batch(indices, epoch=epoch)
        live = from_pixels.batch(indices, epoch=epoch)
        assert cached.features is not None
        assert live.images is not None
        with torch.no_grad():
            assert torch.allclose(cached.features, backbone.image.encode(live.images), atol=1e-5)


def test_a_view_does_not_depend_on_the_rest_of_the_split(
    backbone: Backbone, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = image_features(backbone, split_of(9), views=2, seed=1)
    monkeypatch.setenv("VADEMECUM_HOME", str(home / "other"))
    part = image_features(backbone, split_of(9).subset([6, 2]), views=2, seed=1)
    assert torch.allclose(part, whole[[6, 2]], atol=1e-5)


def test_work_is_shared_between_splits(backbone: Backbone, encoded: list[int]) -> None:
    split = split_of(10)
    first = image_features(backbone, split.subset([1, 4, 7]))
    assert sum(encoded) == 3
    whole = image_features(backbone, split)
    assert sum(encoded) == 10
    assert torch.equal(whole[[1, 4, 7]], first)
    assert torch.equal(image_features(backbone, split, seed=99), whole)
    assert sum(encoded) == 10  # view 0 has no seed
    image_features(backbone, split, views=2, seed=1)
    image_features(backbone, split, views=2, seed=2)
    assert sum(encoded) == 30


def test_equal_pictures_are_encoded_once(backbone: Backbone, encoded: list[int]) -> None:
    found = image_features(backbone, split_of(3).subset([0, 1, 0, 0, 2]))
    assert sum(encoded) == 3
    assert torch.equal(found[0], found[2])


def test_another_tower_or_preprocessing_reads_nothing_of_it(
    backbone: Backbone, encoded: list[int], tiny_models: ModuleType, tmp_path: Path
) -> None:
    import dataclasses

    split = split_of(3)
    first = image_features(backbone, split)
    folder = tiny_models.tiny_clip(tmp_path / "other", layers=2, seed=1)
    other = image_features(load_backbone(BackboneSpec(folder=str(folder))), split)
    assert not torch.allclose(other, first, atol=1e-3)
    squash = dataclasses.replace(backbone.preprocess, resize_mode="squash")
    image_features(dataclasses.replace(backbone, preprocess=squash), split)
    assert sum(encoded) == 6


def test_a_killed_run_loses_at_most_a_chunk(
    backbone: Backbone, encoded: list[int], home: Path
) -> None:
    split = split_of(10)
    split.digests  # noqa: B018 - decoded before the fault
    original = type(split).image

    class Killed(BaseException):
        pass

    def image(self: ImageSplit, index: int):
        if index == 9:
            raise Killed
        return original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSplit, "image", image)
        with pytest.raises(Killed):
            image_features(backbone, split)
    assert len(chunks(home)) == 2
    assert not [p for p in home.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    before = sum(encoded)
    image_features(backbone, split)
    assert sum(encoded) - before == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_chunk_is_recomputed(
    backbone: Backbone, encoded: list[int], home: Path, damage: str
) -> None:
    split = split_of(8)
    first = image_features(backbone, split)
    victim = chunks(home)[0]
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes({"flip": bytes(data), "cut": data[:-9], "empty": b""}[damage])
    assert torch.equal(image_features(backbone, split), first)
    assert sum(encoded) == 12
    assert len(chunks(home)) == 2


def test_files_are_mapped_and_only_those_asked_for_are_read(
    backbone: Backbone, encoded: list[int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(12)
    first = image_features(backbone, split)
    checked: list[Path] = []
    original = features.is_sound

    def is_sound(path: Path) -> bool:
        checked.append(path)
        return original(path)

    monkeypatch.setattr(features, "is_sound", is_sound)
    store = store_of(backbone, 0, 0)
    assert not checked
    found = image_features(backbone, split.subset([1, 2]), open_store=lambda *_: store)
    assert torch.equal(found, first[[1, 2]])
    assert len(checked) == 1
    assert sum(encoded) == 12
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text()
        assert all(path.name in maps for path in chunks(home))
        lines = [x.split() for x in maps.splitlines() if "/view-0/" in x]
        places = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
        row = store[split.digests[1]].__array_interface__["data"][0]
        assert any(start <= row < end for start, end in places), "a view of the mapping"


def test_files_of_an_earlier_version_are_read(
    backbone: Backbone, encoded: list[int], home: Path
) -> None:
    split = split_of(3)
    values = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    keys = np.array([list(bytes.fromhex(d)) for d in split.digests], dtype=np.uint8)
    data = save({"digests": keys, "features": values}, metadata={"patient_derived": "true"})
    folder = store_of(backbone, 0, 0).folder
    (folder / f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    assert np.array_equal(image_features(backbone, split)[:, 0].numpy(), values)
    assert not encoded


@pytest.mark.parametrize("wrong", ["width", "kind", "keys", "names"])
def test_sound_files_of_something_else_are_left_alone(
    backbone: Backbone, encoded: list[int], wrong: str
) -> None:
    split = split_of(3)
    keys = np.array([list(bytes.fromhex(d)) for d in split.digests], dtype=np.uint8)
    values = np.zeros((3, 24), dtype=np.float32)
    stored = {"digests": keys, "features": values}
    stored |= {
        "width": {"features": values[:, 1:].copy()},
        "kind": {"features": values.astype(np.float64)},
        "keys": {"digests": keys[:, 1:].copy()},
        "names": {"features": values, "digests": keys.astype(np.int64)},
    }[wrong]
    data = save(stored)
    folder = store_of(backbone, 0, 0).folder
    path = folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    path.write_bytes(data)
    assert image_features(backbone, split).abs().sum() > 1
    assert sum(encoded) == 3
    assert path.is_file()


@pytest.mark.parametrize("views", [1, 3, "live"])
def test_the_frozen_tower_does_not_run_in_a_step_that_has_its_features(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, views: int | str
) -> None:
    problem = Problem(backbone, ("cell", "red cell"))
    method = PromptSRC(PromptSrcConfig(), problem)
    assert PromptSRC.reads_features
    assert not Method.reads_features
    cases = Cases(split_of(6), backbone, pixels=True, frozen=True, views=views, seed=4)
    cases.prepare()
    frozen: list[bool] = []
    encode = backbone.image.encode

    def counting(images, prompts=None):
        frozen.append(prompts is None)
        return encode(images, prompts)

    monkeypatch.setattr(backbone.image, "encode", counting)
    batch = cases.batch(torch.tensor([5, 0, 3]), epoch=2)
    loss = method.loss(batch)
    assert frozen == [False] if views != "live" else frozen == [False, True]
    plain = method.loss(Batch(batch.labels, images=batch.images))
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)


def test_files_are_private_and_marked(backbone: Backbone, home: Path) -> None:
    from safetensors import safe_open

    old = os.umask(0)
    try:
        image_features(backbone, split_of(5), views=2)
    finally:
        os.umask(old)
    for path in [home, *home.rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    for path in chunks(home):
        with safe_open(path, "np") as stored:
            assert stored.metadata()["patient_derived"] == "true"


def test_a_value_that_is_not_finite_is_refused(
    backbone: Backbone, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = backbone.image.encode

    def broken(images, prompts=None):
        features_ = encode(images, prompts).clone()
        features_[1] = float("nan")
        return features_

    monkeypatch.setattr(backbone.image, "encode", broken)
    with pytest.raises(
        ModelError, match="train/1: the image tower gave a value that is not finite"
    ):
        image_features(backbone, split_of(3))
    assert not chunks(home)


def test_a_store_that_cannot_be_made(backbone: Backbone, home: Path) -> None:
    home.parent.parent.mkdir(exist_ok=True)
    home.parent.write_text("a file in the way")
    with pytest.raises(StorageError, match=str(home.parent.name)):
        image_features(backbone, split_of(2))
