"""The test transform is open_clip's, the augmentation torchvision's; neither has hidden state."""

import numpy as np
import pytest
import torch
from PIL import Image

from cache.errors import ModelError
from prompt_tune.preprocess import Preprocess, augmentation_generator, random_crop_box

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(28, 28), (50, 31), (300, 224)])
def test_the_test_transform_is_open_clips(mode, interpolation, size) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = {
        "size": (32, 32),
        "mean": MEAN,
        "std": STD,
        "interpolation": interpolation,
        "resize_mode": mode,
        "fill_color": 7,
    }
    preprocess = Preprocess.from_open_clip(settings)
    expected = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    for channels in ("RGB", "L"):
        image = picture(*size, mode=channels)
        assert torch.equal(preprocess(image), expected(image))
    assert Preprocess.from_open_clip(preprocess.settings()) == preprocess


@pytest.mark.parametrize("size", [(28, 28), (300, 20), (20, 300), (97, 64)])
def test_crops_are_those_of_torchvision(size) -> None:
    from torchvision.transforms import RandomResizedCrop

    image = picture(*size)
    for seed in range(40):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        box = random_crop_box(*size, torch.Generator().manual_seed(seed))
        assert box == tuple(expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_augmentation_is_torchvisions(interpolation) -> None:
    from torchvision import transforms as tv

    preprocess = Preprocess(32, MEAN, STD, interpolation)
    chain = tv.Compose(
        [
            tv.RandomResizedCrop(32, interpolation=tv.InterpolationMode(interpolation)),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )
    image = picture(50, 40)
    mirrored = 0
    for seed in range(12):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = chain(image)
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(preprocess.augment(image, generator), expected)
        generator.manual_seed(seed)
        random_crop_box(50, 40, generator)
        mirrored += float(torch.rand(1, generator=generator)) < 0.5
    assert 0 < mirrored < 12  # the seeds show both


def test_a_view_is_a_function_of_seed_picture_and_number() -> None:
    preprocess = Preprocess(16, MEAN, STD)
    image = picture(40, 40)
    torch.manual_seed(1)
    first = preprocess.view(image, 3, seed=5, picture="abc")
    torch.manual_seed(2)
    torch.rand(9)
    assert torch.equal(preprocess.view(image, 3, seed=5, picture="abc"), first)
    for other in ((4, 5, "abc"), (3, 6, "abc"), (3, 5, "abd")):
        assert not torch.equal(preprocess.view(image, *other), first)
    assert torch.equal(preprocess.view(image, 0, seed=5, picture="abc"), preprocess(image))


def test_generators_differ_in_each_argument() -> None:
    seeds = {
        augmentation_generator(*arguments).initial_seed()
        for arguments in ((1, 2, 3), (1, 3, 2), (2, 1, 3), (12, 3, 3), (1, "23", 3))
    }
    assert len(seeds) == 5


def test_oblong_towers_are_refused() -> None:
    with pytest.raises(ModelError, match=r"does not read square images; found \(224, 112\)"):
        Preprocess.from_open_clip({"size": (224, 112), "mean": MEAN, "std": STD})


def test_the_digest_covers_every_setting() -> None:
    base = {"size": 32, "mean": MEAN, "std": STD}
    variants = [
        base,
        base | {"size": 48},
        base | {"mean": STD},
        base | {"std": MEAN},
        base | {"interpolation": "bilinear"},
        base | {"resize_mode": "squash"},
        base | {"fill_color": 1},
    ]
    assert len({Preprocess.from_open_clip(v).digest for v in variants}) == len(variants)
