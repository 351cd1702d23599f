"""A whole batch at once gives torchvision's pixels on Pillow to the bit, and its law of boxes."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, ks_2samp

from prompt_tune import augment
from prompt_tune.augment import Axis, View, shown, view_of
from prompt_tune.preprocess import Preprocess, augmentation_generator, random_crop_box, random_view

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = ((28, 28), (40, 36), (300, 20), (20, 300), (48, 48), (160, 200), (97, 64), (3, 2), (1, 1))
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def pictures() -> list[np.ndarray]:
    """Noise, and noise of 0 and 255 alone, which leaves 0..255 between and after the passes."""
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in SIZES]
    return noise + [pixels // 128 * 255 for pixels in noise]


def at_once(preprocess: Preprocess, k: int, device: str = "cpu") -> torch.Tensor:
    found = [torch.from_numpy(p) for p in pictures()]
    views = [view_of(preprocess, p, k, 5, str(i)) for i, p in enumerate(found)]
    return shown(found, views, preprocess, device).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [48, 30])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_augmented_pixels_are_those_of_pillow(device, interpolation, size, k) -> None:
    preprocess = Preprocess(size, MEAN, STD, interpolation)
    found = at_once(preprocess, k, device)
    for i, pixels in enumerate(pictures()):
        assert torch.equal(found[i], preprocess.view(Image.fromarray(pixels), k, 5, str(i))), i


@pytest.mark.parametrize("mode", ["longest", "squash"])
def test_view_0_is_open_clips_in_every_mode(mode: str) -> None:
    preprocess = Preprocess(48, MEAN, STD, "bicubic", mode, fill_color=9)
    found = at_once(preprocess, 0)
    for i, pixels in enumerate(pictures()):
        assert torch.equal(found[i], preprocess(Image.fromarray(pixels))), i


def test_large_shrinks() -> None:
    """29-fold: 117 weights in a row, more than what is exact for certain."""
    preprocess = Preprocess(32, MEAN, STD)
    pixels = np.random.default_rng(1).integers(0, 256, (950, 930, 3)).astype(np.uint8)
    view = view_of(preprocess, torch.from_numpy(pixels), 0, 5, "a")
    found = shown([torch.from_numpy(pixels)], [view], preprocess, "cpu")[0]
    worst = (found - preprocess(Image.fromarray(pixels))).abs().amax(dim=(1, 2))
    assert (worst * torch.tensor(STD) <= 1.01 / 255).all()


def test_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess(48, MEAN, STD)
    whole = at_once(preprocess, 1)
    monkeypatch.setattr(augment, "LARGEST", 3 * 60 * 60 * 3)
    views = [view_of(preprocess, torch.from_numpy(p), 1, 5, "a") for p in pictures()]
    groups = list(augment._groups(views, 48))
    assert sorted(i for group in groups for i in group) == list(range(len(views)))
    assert len({len(group) for group in groups}) > 1
    assert torch.equal(at_once(preprocess, 1), whole)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_one_generator_gives_torchvisions_crop_and_mirror(interpolation: str) -> None:
    from torchvision import transforms as tv

    chain = tv.Compose(
        [
            tv.RandomResizedCrop(32, interpolation=tv.InterpolationMode(interpolation)),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )
    preprocess = Preprocess(32, MEAN, STD, interpolation)
    pixels = pictures()[5]
    mirrored = set()
    for k in range(1, 13):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(augmentation_generator(3, "abc", k).initial_seed())
            expected = chain(Image.fromarray(pixels))
        view = view_of(preprocess, torch.from_numpy(pixels), k, 3, "abc")
        mirrored.add(view.across.mirrored)
        assert torch.equal(
            shown([torch.from_numpy(pixels)], [view], preprocess, "cpu")[0], expected
        )
    assert mirrored == {False, True}


@pytest.mark.parametrize("size", [(512, 512), (640, 300)])
def test_boxes_have_torchvisions_law(size: tuple[int, int]) -> None:
    """Area, log-ratio and place of 3,000 boxes each; the flip is fair."""
    from torchvision.transforms import RandomResizedCrop

    def facts(boxes: list[tuple[int, ...]]) -> np.ndarray:
        values = [
            (h * w, math.log(w / h), top / max(size[1] - h, 1), left / max(size[0] - w, 1))
            for top, left, h, w in boxes
        ]
        return np.array(values).T

    image = Image.new("RGB", size)
    ours, flips = [], 0
    for k in range(3000):
        box, mirrored = random_view(*size, augmentation_generator(1, f"picture {k % 50}", k))
        ours.append(box)
        flips += mirrored
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in ours]
    for a, b in zip(facts(ours), facts(theirs), strict=True):
        assert ks_2samp(a, b).pvalue > 0.001
    assert binomtest(flips, len(ours)).pvalue > 0.001


def test_the_order_of_the_passes_is_that_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    tall, square = View(Axis(0, 300, 32), Axis(0, 20, 32)), View(Axis(0, 64, 32), Axis(0, 48, 32))
    monkeypatch.setattr(augment, "PILLOW", 13)
    assert (tall.down_first, square.down_first) == (True, False)
    monkeypatch.setattr(augment, "PILLOW", 12)
    assert not tall.down_first


def test_a_view_names_the_box_of_its_generator() -> None:
    preprocess = Preprocess(32, MEAN, STD)
    box = random_crop_box(50, 40, augmentation_generator(7, "p", 2))
    view = view_of(preprocess, torch.zeros(40, 50, 3, dtype=torch.uint8), 2, 7, "p")
    assert (view.down.start, view.across.start, view.down.length, view.across.length) == box
