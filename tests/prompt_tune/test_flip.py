"""`train.flip: false`: the same crops, never mirrored, wherever views are made, kept and read."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache.recipe import validate
from prompt_tune.augment import shown, view_of
from prompt_tune.backbone import BackboneSpec, load_backbone
from prompt_tune.bindings import binding_digest
from prompt_tune.cases import Cases, Views
from prompt_tune.data import load_data
from prompt_tune.features import view_name
from prompt_tune.preprocess import Preprocess, augmentation_generator, random_view
from prompt_tune.recipe import TuneRecipe
from prompt_tune.setup import prepare
from prompt_tune.shelf import Shelf

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture
def world(
    tiny_models: ModuleType, toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    folder = str(tiny_models.tiny_clip(tmp_path / "clip", layers=2))
    data = str(toy.images(tmp_path / "images"))
    return SimpleNamespace(
        root=tmp_path,
        folder=folder,
        data=data,
        backbone=load_backbone(BackboneSpec(folder=folder)),
        split=load_data(data)["train"],
    )


def test_both_ways_to_make_a_view_crop_and_do_not_mirror() -> None:
    from torchvision import transforms as tv
    from torchvision.transforms import functional as pictures

    usual = Preprocess(32, MEAN, STD)
    plain = replace(usual, flip=False)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    mirrored = 0
    for k in range(1, 13):
        box, flipped = random_view(50, 40, augmentation_generator(3, "abc", k))
        mirrored += flipped
        mode = tv.InterpolationMode.BICUBIC
        crop = pictures.resized_crop(Image.fromarray(pixels), *box, [32, 32], mode)
        expected = pictures.normalize(pictures.to_tensor(crop), list(MEAN), list(STD))
        assert torch.equal(plain.view(Image.fromarray(pixels), k, 3, "abc"), expected)
        view = view_of(plain, torch.from_numpy(pixels), k, 3, "abc")
        assert torch.equal(shown([torch.from_numpy(pixels)], [view], plain, "cpu")[0], expected)
        other = usual.view(Image.fromarray(pixels), k, 3, "abc")
        assert torch.equal(other, expected.flip(-1) if flipped else expected)
    assert 0 < mirrored < 12
    assert plain.digest == usual.digest  # of the test transform
    assert Preprocess.from_open_clip(plain.settings()) == usual


@pytest.mark.parametrize("views", [4, "live"])
def test_cases_show_it(world: SimpleNamespace, views: Views) -> None:
    indices = torch.arange(len(world.split))

    def pixels(*, flip: bool, epoch: int) -> torch.Tensor:
        cases = Cases(world.split, world.backbone, pixels=True, views=views, flip=flip, seed=4)
        found = cases.batch(indices, epoch=epoch).images
        assert found is not None
        return found

    turned = 0
    for epoch in (1, 2):
        usual, plain = pixels(flip=True, epoch=epoch), pixels(flip=False, epoch=epoch)
        for a, b in zip(usual, plain, strict=True):
            assert torch.equal(a, b) or torch.equal(a, b.flip(-1))
            turned += not torch.equal(a, b)
        cases = Cases(world.split, world.backbone, pixels=False, views=views, flip=False, seed=4)
        features = cases.batch(indices, epoch=epoch).features
        assert features is not None
        with torch.no_grad():
            expected = world.backbone.image.encode(plain)
        assert torch.allclose(features, expected, atol=1e-5)
    assert turned


@pytest.mark.parametrize("shelf", [None, Shelf()])
def test_features_of_the_two_kinds_are_kept_apart(
    world: SimpleNamespace, shelf: Shelf | None
) -> None:
    some: dict[str, Any] = {} if shelf is None else {"open_store": shelf.features}
    found = {
        flip: Cases(
            world.split, world.backbone, pixels=False, views=3, flip=flip, seed=4, **some
        )._features
        for flip in (True, False)
    }
    usual, plain = found[True], found[False]
    assert usual is not None
    assert plain is not None
    assert torch.equal(usual[:, 0], plain[:, 0])
    assert not torch.allclose(usual, plain, atol=1e-3)
    kept = {p.name for p in (world.root / "home" / "features").glob("*/view-*")}
    mine = {"view-1-seed-4", "view-2-seed-4"}  # as before there was a choice
    assert kept == {"view-0"} | mine | {f"{name}-no-flip" for name in mine}
    assert view_name(0, 4, flip=False) == "view-0"


def test_a_recipe_decides_and_its_digest_counts_it_where_views_are_taken(
    world: SimpleNamespace,
) -> None:
    def recipe(**train: Any) -> TuneRecipe:
        plain = {
            "backbone": {"folder": world.folder},
            "method": {"name": "coop"},
            "samples": {"shots": 2},
            "train": {"epochs": 1} | train,
        }
        return validate(TuneRecipe, plain, where="test")

    setup = prepare(recipe(views=2, flip=False), data=world.data, knowledge=None, samples=None)
    assert not setup.cases(setup.train, training=True).backbone.preprocess.flip
    for views in (1, 2, "live"):
        digests = {
            binding_digest(recipe(views=views, flip=flip), setup.bindings) for flip in (True, False)
        }
        assert len(digests) == (1 if views == 1 else 2)
