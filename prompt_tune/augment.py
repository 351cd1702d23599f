"""Crop, resize, mirror and normalise a whole batch on a GPU, to the bit as picture by picture.

Resampling is separable: what a tower sees of a picture X is W_y X W_x^T per channel, row i of a W
holding the filter k around the place of output i in the input. From n to m pixels (Pillow,
`Resample.c`; bicubic is Keys' kernel with a = -1/2):

    s = n / m,  f = max(s, 1),  c_i = (i + 1/2) s,  W[i, x] = k((x + 1/2 - c_i) / f) / sum of row i

Pillow computes in whole numbers: weights in units of 2^-22, and a byte between the two passes. So
does this. Each weight is a multiple of 2^11 plus a rest; sums of either part times bytes stay below
2^24 up to 64 weights in a row (a shrink of 16), where float32 is exact in any order. So a picture
does not depend on its batch or the device, and equals torchvision's on Pillow, which is what runs
where there is no GPU: there it is faster.
`BLOCK` neighbouring outputs share a window of the input, which spares most of the zeros in W.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import PIL
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from prompt_tune.data.images import ImageSplit
from prompt_tune.pixels import Picture, stored_pictures
from prompt_tune.preprocess import Preprocess, augmentation_generator, random_view

UNITS, PART = 2**22, 2**11
BLOCK = 16
RESIDENT = 2**31  # bytes of pictures that stay on a GPU
LARGEST = 2**25  # values of one group, padding included
PILLOW = int(PIL.__version__.partition(".")[0])
SUPPORT = {"bicubic": 2, "bilinear": 1}

Kind = Literal["bicubic", "bilinear"]


class Axis(NamedTuple):
    """One direction of a view: `length` pixels from `start` on, resized to `resized`.

    Attributes:
        first: of the resized pixels, where the tower's square begins; negative where it begins
            with padding.
        mirrored: the square is read from its end.
    """

    start: int
    length: int
    resized: int
    first: int = 0
    mirrored: bool = False


class View(NamedTuple):
    """What a tower sees of one picture."""

    down: Axis
    across: Axis

    @property
    def down_first(self) -> bool:
        """Whether Pillow resizes the height before the width, since version 13.

        Measured: it does where the height shrinks by more than twice what the width does.
        """
        shrinks = [axis.length - axis.resized for axis in self]
        return PILLOW >= 13 and shrinks[0] > max(2 * shrinks[1], 0)


def whole_view(preprocess: Preprocess, height: int, width: int) -> View:
    """What open_clip's test transform shows of a picture of that size."""
    size = preprocess.image_size
    if preprocess.resize_mode == "squash":
        resized = [size, size]
    elif preprocess.resize_mode == "shortest":
        resized = [int(size * n / min(height, width)) for n in (height, width)]
    else:
        resized = [round(n / (max(height, width) / size)) for n in (height, width)]
    down, across = (
        Axis(0, n, m, round((m - size) / 2) if m >= size else -((size - m) // 2))
        for n, m in zip((height, width), resized, strict=True)
    )
    return View(down, across)


def view_of(preprocess: Preprocess, picture: Picture, k: int, seed: int, name: int | str) -> View:
    """What `Preprocess.view` shows of a picture."""
    height, width, _ = picture.shape
    if k == 0:
        return whole_view(preprocess, height, width)
    generator = augmentation_generator(seed, name, k)
    (top, left, rows, columns), mirrored = random_view(width, height, generator)
    size = preprocess.image_size
    mirrored = mirrored and preprocess.flip
    return View(Axis(top, rows, size), Axis(left, columns, size, mirrored=mirrored))


def on_device(tensor: Tensor, device: str) -> Tensor:
    """The tensor on a device; the host does not wait for the copy to a GPU."""
    if device.startswith("cuda") and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _kernel(x: Float[Tensor, "*shape"], kind: Kind) -> Float[Tensor, "*shape"]:
    x = x.abs()
    if kind == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


@dataclass(frozen=True)
class Taps:
    """The rows of W of every picture, `BLOCK` neighbouring ones over one window.

    Attributes:
        pixels: the window of each block.
        weights: in units of 2^-22; multiples of 2^11 divided by that, below them the rests.
        inside: outputs that are not padding; the weights of the others are zero.
    """

    pixels: Int[Tensor, "batch blocks reach"]
    weights: Float[Tensor, "batch blocks two*block reach"]
    inside: Bool[Tensor, "batch blocks block 1"]


def _taps(numbers: Int[Tensor, "batch 4"], size: int, reach: int, kind: Kind) -> Taps:
    length, resized, first, mirrored = (column[:, None] for column in numbers.T)
    at = torch.arange(-(-size // BLOCK) * BLOCK, device=numbers.device).clamp(max=size - 1)
    at = first + torch.where(mirrored > 0, size - 1 - at, at)
    scale = length.double() / resized
    spread = scale.clamp(min=1)
    centre = (at.clamp(min=0).minimum(resized - 1) + 0.5) * scale
    low = (centre - SUPPORT[kind] * spread + 0.5).trunc().clamp(min=0)
    high = (centre + SUPPORT[kind] * spread + 0.5).trunc().minimum(length)
    inside, centre, low, high = (
        v.unflatten(1, (-1, BLOCK)).unsqueeze(3)
        for v in ((at >= 0) & (at < resized), centre, low, high)
    )
    x = low.amin(dim=2, keepdim=True) + torch.arange(reach, device=numbers.device)
    weights = _kernel((x - centre + 0.5) * (1 / spread[..., None, None]), kind)
    weights = torch.where((low <= x) & (x < high), weights, 0.0)
    weights = weights / weights.sum(dim=-1, keepdim=True) * UNITS
    weights = (weights + torch.where(weights < 0, -0.5, 0.5)).trunc() * inside
    large = (weights / PART).round()
    parts = torch.cat([large, weights - large * PART], dim=2).float()
    return Taps(x.squeeze(2).long().minimum(length[..., None] - 1), parts, inside)


def _pass(
    pixels: UInt8[Tensor, "batch length others"], taps: Taps, size: int, fill: int
) -> UInt8[Tensor, "batch size others"]:
    """Resamples along the second dimension."""
    batch = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    sums = taps.weights @ pixels[batch, taps.pixels].float()
    large, rest = sums.int().unflatten(2, (2, BLOCK)).unbind(2)
    values = (large.mul_(PART).add_(rest).add_(UNITS // 2) >> 22).clamp_(0, 255)
    if fill:
        values = torch.where(taps.inside, values, fill)
    return values.to(torch.uint8).flatten(1, 2)[:, :size]


def _reach(axes: Sequence[Axis], kind: Kind) -> int:
    """Pixels of the widest window, known without asking the device."""
    scale = max(axis.length / axis.resized for axis in axes)
    widest = math.ceil((BLOCK - 1) * scale + 2 * SUPPORT[kind] * max(scale, 1)) + 2
    return min(widest, max(axis.length for axis in axes))


def _cut(
    pictures: Sequence[Picture], views: Sequence[View], device: str
) -> UInt8[Tensor, "batch height width 3"]:
    """What the views read, on the device, padded with what no weight touches."""
    sides = (max(down.length for down, _ in views), max(across.length for _, across in views))
    there = pictures[0].device
    pin = device.startswith("cuda") and there.type == "cpu"
    cut = torch.empty((len(views), *sides, 3), dtype=torch.uint8, device=there, pin_memory=pin)
    for place, picture, (down, across) in zip(cut, pictures, views, strict=True):
        rows = picture[down.start : down.start + down.length]
        place[: down.length, : across.length] = rows[:, across.start : across.start + across.length]
    return cut.to(device, non_blocking=True)


def _resized(
    pictures: Sequence[Picture], views: Sequence[View], preprocess: Preprocess, device: str
) -> UInt8[Tensor, "batch size size 3"]:
    size, kind = preprocess.image_size, preprocess.interpolation
    numbers = on_device(torch.tensor([[axis[1:] for axis in view] for view in views]), device)
    pixels = _cut(pictures, views, device)
    for n in (0, 1) if views[0].down_first else (1, 0):
        taps = _taps(numbers[:, n], size, _reach([view[n] for view in views], kind), kind)
        pixels = pixels.transpose(1, 2) if n else pixels
        others = pixels.shape[2]
        pixels = _pass(pixels.flatten(2), taps, size, preprocess.fill_color)
        pixels = pixels.unflatten(2, (others, 3))
        pixels = pixels.transpose(1, 2) if n else pixels
    return pixels


def _groups(views: Sequence[View], size: int) -> Iterator[list[int]]:
    """Positions of views that go together: of similar sizes, their passes in the same order."""
    sides = [(max(v.down.length, size), max(v.across.length, size), v.down_first) for v in views]
    group: list[int] = []
    widest = 0
    for i in sorted(range(len(views)), key=lambda i: (sides[i][2], sides[i])):
        height, width, first = sides[i]  # heights ascend
        widest = max(widest, width)
        full = (len(group) + 1) * height * widest * 3 > LARGEST
        if group and (full or first != sides[group[0]][2]):
            yield group
            group, widest = [], width
        group.append(i)
    yield group


def shown(
    pictures: Sequence[Picture], views: Sequence[View], preprocess: Preprocess, device: str
) -> Float[Tensor, "batch 3 size size"]:
    """The views of some pictures at once, normalised; the host does not wait for a GPU."""
    parts, order = [], []
    for group in _groups(views, preprocess.image_size):
        chosen, seen = [pictures[i] for i in group], [views[i] for i in group]
        parts.append(_resized(chosen, seen, preprocess, device))
        order += group
    back = on_device(torch.tensor(order).argsort(), device)
    pixels = torch.cat(parts)[back].permute(0, 3, 1, 2).contiguous().float().div_(255)
    mean, std = (
        on_device(torch.tensor(values), device).view(-1, 1, 1)
        for values in (preprocess.mean, preprocess.std)
    )
    return pixels.sub_(mean).div_(std)


class Pictures:
    """The pictures of a split as a tower sees them, decoded at most once on this machine.

    Args:
        split: the images.
        preprocess: of the tower.
        device: where the tower is.

    Raises:
        DataError: an image cannot be read.
        StorageError: the user's cache folder cannot be used.
    """

    def __init__(self, split: ImageSplit, preprocess: Preprocess, device: str) -> None:
        self.names, self.preprocess, self.device = split.digests, preprocess, device
        self.pictures = stored_pictures(split)
        self.at_once = device.startswith("cuda")
        if self.at_once and sum(p.numel() for p in self.pictures) <= RESIDENT:
            self.pictures = [p.to(device) for p in self.pictures]

    def show(
        self, indices: Sequence[int], views: Sequence[int], seed: int
    ) -> Float[Tensor, "batch 3 size size"]:
        """`Preprocess.view` of some cases, each under the view of that number."""
        which = [(self.pictures[i], k, self.names[i]) for i, k in zip(indices, views, strict=True)]
        if self.at_once:
            chosen = [view_of(self.preprocess, p, k, seed, name) for p, k, name in which]
            return shown([p for p, _, _ in which], chosen, self.preprocess, self.device)
        images = [
            self.preprocess.view(Image.fromarray(p.numpy()), k, seed, name) for p, k, name in which
        ]
        return torch.stack(images).to(self.device)
