"""MedMNIST archives: `train_images`, `train_labels` and so on, grey or RGB, of any size."""

import functools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cache.errors import DataError
from prompt_tune.data.declaration import DataDeclaration
from prompt_tune.data.layout import Found, Layout, Part


def _decode(batch: dict[str, list[bytes]], *, mode: str, size: tuple[int, int]) -> dict[str, Any]:
    from PIL import Image

    return {"image": [Image.frombytes(mode, size, pixels) for pixels in batch["pixels"]]}


def pixel_rows(images: UInt8[np.ndarray, "cases height width *channels"]) -> Any:
    """A `datasets.Dataset` over an array of pixels, without copying or re-encoding them."""
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    images = np.ascontiguousarray(images)
    count, (height, width) = len(images), images.shape[1:3]
    ends = np.arange(count + 1, dtype=np.int64) * (images.size // max(count, 1))
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(images)]
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), count, buffers)
    mode = "RGB" if images.ndim == 4 else "L"
    decode = functools.partial(_decode, mode=mode, size=(width, height))
    return datasets.Dataset(pa.table({"pixels": column})).with_transform(decode)


def _array(archive: Any, key: str, path: Path) -> Any:
    try:
        return archive[key]
    except KeyError as error:
        found = ", ".join(archive.files)
        what = f"no array {key!r} in the archive"
        raise DataError(what, where=path, found=found) from error
    except ValueError as error:
        what = f"the array {key!r} holds pickled objects, which are never loaded"
        raise DataError(what, where=path, wanted="plain numbers") from error
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        what = f"the array {key!r} is damaged"
        raise DataError(what, where=path) from error


def _part(archive: Any, name: str, path: Path) -> Part:
    images = _array(archive, f"{name}_images", path)
    labels = _array(archive, f"{name}_labels", path)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        what = f"{name}_images are not 8-bit grey or RGB images"
        found = f"{images.dtype} {list(images.shape)}"
        raise DataError(what, where=path, found=found, wanted="uint8 [n, h, w] or [n, h, w, 3]")
    count = len(images)
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        what = f"{name}_labels are not one whole number per image"
        found = f"{labels.dtype} {list(labels.shape)}"
        raise DataError(what, where=path, found=found, wanted=f"[{count}] or [{count}, 1]")
    places = tuple(f"{name}/{k}" for k in range(count))
    return Part(
        rows=pixel_rows(images),
        labels=tuple(map(str, labels.reshape(count).tolist())),
        files=tuple(f"{path}: {name}_images[{k}]" for k in range(count)),
        keys=places,
        patients=(None,) * count,
    )


def read(place: str, declaration: DataDeclaration) -> Found:
    """The images of an archive; labels are positions in the declared class list.

    Raises:
        DataError: missing file, not an archive, a missing or unusable array.
    """
    path = Path(place)
    wanted = {name: declaration.splits.get(name, name) for name in ("train", "val", "test")}
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                what = "a single array, not an npz archive"
                raise DataError(what, where=path)
            parts = {name: _part(archive, name, path) for name in wanted.values()}
    except FileNotFoundError as error:
        what = "no such file"
        raise DataError(what, where=path, do="Check the path.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        what = f"not an npz archive ({error.__class__.__name__})"
        raise DataError(what, where=path, do="Fetch the file again.") from error
    return Found(parts, numbered=True)


LAYOUT = Layout(matches=lambda path: path.suffix.lower() == ".npz", read=read)
