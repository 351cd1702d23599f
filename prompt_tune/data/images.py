"""Classes and splits: a lazily decoded image per case, its label, id and digest.

Whatever the layout on disk, a split stands on a Hugging Face `datasets.Dataset` whose rows give an
`image`. Nothing is decoded until it is asked for.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL.Image import DecompressionBombError, Image

from cache.errors import DataError
from prompt_tune.data.remembered import Remembered

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, DecompressionBombError)
BATCH = 256  # images decoded at a time when a whole split is digested


@dataclass(frozen=True)
class DataClass:
    """One class: the id that joins it to a knowledge cache, its name in prompts, its modality."""

    id: str
    name: str
    modality: str | None = None


def image_digest(image: Image) -> str:
    """SHA-256 of the size and the RGB pixels of a decoded image, hexadecimal.

    Two files with the same pixels have the same digest, whatever their format.
    """
    rgb = image.convert("RGB")
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


def numbered(patients: Sequence[str | None]) -> Int64[np.ndarray, "cases"] | None:
    """A number per patient in order of appearance, or None where no case names one.

    A case without a patient gets a number of its own.
    """
    if not any(patients):
        return None
    seen: dict[tuple[str, int], int] = {}
    keys = ((p, -1) if p else ("", k) for k, p in enumerate(patients))
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """The cases of one split, in a fixed order.

    Attributes:
        name: train, val or test.
        classes: every class of the data, in label order, also those without an image here.
        labels: position of each case's class in `classes`.
        ids: `split/index`, unique and free of paths.
        patients: the patient of each case, or None where the data names none.
        files: what a message calls each image; never stored.
    """

    name: str
    classes: tuple[DataClass, ...]
    labels: Int64[np.ndarray, "cases"]
    ids: tuple[str, ...]
    patients: tuple[str | None, ...]
    files: tuple[str, ...] = field(repr=False)
    rows: Any = field(repr=False)
    at: Int64[np.ndarray, "cases"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image:
        """Case `index` as an RGB image, rotated as its EXIF orientation says.

        Raises:
            DataError: missing, damaged, or of more than 8 bits per channel.
        """
        return self.image_and_mode(index)[0]

    def image_and_mode(self, index: int) -> tuple[Image, str]:
        """Case `index` as an RGB image, and the mode its file has.

        Raises:
            DataError: missing, damaged, or of more than 8 bits per channel.
        """
        try:
            image = self.rows[int(self.at[index])]["image"]
            return _rgb(image, self.files[index]), str(image.mode)
        except FileNotFoundError as error:
            what = "the image is missing"
            raise DataError(what, where=self.files[index]) from error
        except UNREADABLE as error:
            what = f"the image cannot be read ({error.__class__.__name__}: {error})"
            do = "Replace the file or take it out of the data."
            raise DataError(what, where=self.files[index], do=do) from error

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`image_digest` of every case; decodes what is not known by its file's bytes.

        Raises:
            DataError: an image cannot be read.
        """
        remembered, found = Remembered.of(self.rows), list[str]()
        for start in range(0, len(self), BATCH):
            cases = range(start, min(start + BATCH, len(self)))
            rows = self.at[cases.start : cases.stop].tolist()
            try:
                if remembered is not None:
                    part = remembered.digests(cases, rows, self._digest)
                else:
                    part = [*map(self._digest, cases, self.rows[rows]["image"])]
            except UNREADABLE:
                part = [*map(self._digest, cases)]  # names the one at fault
            found += part
        return tuple(found)

    def _digest(self, index: int, image: Image | None = None) -> str:
        rgb = self.image(index) if image is None else _rgb(image, self.files[index])
        return image_digest(rgb)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the class ids and every case's digest and label, in order."""
        total = hashlib.sha256("\n".join(c.id for c in self.classes).encode())
        for digest, label in zip(self.digests, self.labels.tolist(), strict=True):
            total.update(f"\n{digest} {label}".encode())
        return total.hexdigest()

    @property
    def groups(self) -> Int64[np.ndarray, "cases"] | None:
        """The patients as numbers; see `numbered`."""
        return numbered(self.patients)

    def counts(self) -> tuple[int, ...]:
        """Cases per class, in label order."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return tuple(int(n) for n in counts)

    def subset(self, indices: Sequence[int] | Int64[np.ndarray, "chosen"]) -> "ImageSplit":
        """The cases at `indices`, in that order; they keep their ids."""
        chosen = np.asarray(indices, dtype=np.int64)
        part = replace(
            self,
            labels=self.labels[chosen],
            ids=_take(self.ids, chosen),
            patients=_take(self.patients, chosen),
            files=_take(self.files, chosen),
            at=self.at[chosen],
        )
        if "digests" in self.__dict__:
            part.__dict__["digests"] = _take(self.digests, chosen)
        return part

    def select(self, labels: Sequence[int]) -> "ImageSplit":
        """The cases of some classes only; `labels[k]` becomes label k."""
        new = np.full(len(self.classes), -1, dtype=np.int64)
        new[list(labels)] = np.arange(len(labels))
        kept = self.subset(np.flatnonzero(new[self.labels] >= 0))
        classes = tuple(self.classes[k] for k in labels)
        return replace(kept, classes=classes, labels=new[kept.labels])


def _take(values: tuple[Any, ...], indices: Int64[np.ndarray, "chosen"]) -> tuple[Any, ...]:
    return tuple(values[i] for i in indices.tolist())


def _rgb(image: Image, where: str) -> Image:
    if image.mode.startswith(("I", "F")):
        what = "more than 8 bits per channel, and how to map them to 0..255 is not known"
        do = "Convert it with the intensity window you want."
        raise DataError(what, where=where, found=f"mode {image.mode}", do=do)
    return image.convert("RGB")
