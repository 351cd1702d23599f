"""From a picture to the tensor an image tower reads, with augmentation that has no hidden state.

An augmented picture is a function of (seed, picture, draw): whoever asks in whatever order, after
whatever interruption, gets the same one. That is what makes resumed training and cached features
of augmented views exact.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from cache.errors import ModelError
from cache.recipe import digest_of

SCALE = (0.08, 1.0)  # share of the area a random crop keeps
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


def augmentation_generator(seed: int, picture: int | str, draw: int) -> torch.Generator:
    """The random numbers of one augmentation.

    Args:
        seed: of the run, or of the set of views.
        picture: what identifies the picture; its pixel digest where views are cached.
        draw: which augmentation of it.
    """
    text = f"{seed}/{draw}/{picture}".encode()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)
    return generator


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return float(torch.empty(1).uniform_(low, high, generator=generator))


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, below, (1,), generator=generator))


def random_crop_box(
    width: int, height: int, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop.

    The area is uniform in `SCALE`, the aspect ratio log-uniform in `RATIO`; draws are made in the
    order of torchvision's RandomResizedCrop, so that equal seeds give equal boxes.
    """
    area, log_ratio = width * height, (math.log(RATIO[0]), math.log(RATIO[1]))
    for _ in range(ATTEMPTS):
        target = area * _uniform(*SCALE, generator)
        ratio = math.exp(_uniform(*log_ratio, generator))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _integer(height - h + 1, generator), _integer(width - w + 1, generator), h, w
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def random_view(
    width: int, height: int, generator: torch.Generator
) -> tuple[tuple[int, int, int, int], bool]:
    """The box of a random crop and whether to mirror it, which is half of the time."""
    box = random_crop_box(width, height, generator)
    return box, float(torch.rand(1, generator=generator)) < 0.5


@dataclass(frozen=True)
class Preprocess:
    """The test transform and the augmentation of one backbone.

    Attributes:
        image_size: side of the square the tower reads.
        mean: per channel, of pixels in 0..1.
        std: per channel.
        interpolation: how pictures are resized.
        resize_mode: `shortest` side then centre crop, `longest` side then padding, or `squash`.
        fill_color: of the padding.
        flip: whether random views are mirrored half of the time; no part of the test transform.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0
    flip: bool = True

    @classmethod
    def from_open_clip(cls, settings: dict[str, Any]) -> Self:
        """The preprocessing an open_clip model carries as `visual.preprocess_cfg`.

        Raises:
            ModelError: the tower does not read squares.
        """
        size = settings["size"]
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) != 1:
            what = "the image tower does not read square images"
            raise ModelError(what, found=tuple(size), wanted="one side")
        known = {k: settings[k] for k in ("resize_mode", "fill_color") if settings.get(k)}
        bilinear = settings.get("interpolation") == "bilinear"
        return cls(
            image_size=int(sides.pop()),
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
            interpolation="bilinear" if bilinear else "bicubic",
            **known,
        )

    @property
    def digest(self) -> str:
        """What identifies the test transform."""
        return digest_of({k: v for k, v in asdict(self).items() if k != "flip"})

    def settings(self) -> dict[str, Any]:
        """The test transform as plain data; `from_open_clip` reads it back."""
        settings = {k: v for k, v in asdict(self).items() if k != "flip"}
        return {"size": settings.pop("image_size"), "mode": "RGB", **settings}

    def _normalised(self, image: Image) -> Float[Tensor, "3 size size"]:
        import torchvision.transforms.functional as pictures

        pixels = pictures.to_tensor(image)
        normalised: Tensor = pictures.normalize(pixels, list(self.mean), list(self.std))
        return normalised

    def __call__(self, image: Image) -> Float[Tensor, "3 size size"]:
        """The test transform: open_clip's own."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        transform = image_transform_v2(PreprocessCfg(**self.settings()), is_train=False)
        tensor: Tensor = transform(image)
        return tensor

    def augment(self, image: Image, generator: torch.Generator) -> Float[Tensor, "3 size size"]:
        """A random resized crop, mirrored half of the time unless `flip` is off, normalised."""
        import torchvision.transforms.functional as pictures
        from torchvision.transforms import InterpolationMode

        image = image.convert("RGB")
        box, mirrored = random_view(image.width, image.height, generator)
        size = [self.image_size, self.image_size]
        image = pictures.resized_crop(image, *box, size, InterpolationMode(self.interpolation))
        if mirrored and self.flip:
            image = pictures.hflip(image)
        return self._normalised(image)

    def view(
        self, image: Image, k: int, seed: int, picture: int | str
    ) -> Float[Tensor, "3 size size"]:
        """View 0 is the test transform; view k is the k-th augmentation of that picture."""
        if k == 0:
            return self(image)
        return self.augment(image, augmentation_generator(seed, picture, k))
