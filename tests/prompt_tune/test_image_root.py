"""`images` of a declaration: the folder that the paths in a listing are relative to."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.errors import DataError
from prompt_tune.data import load_data


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A table and a split file in one folder, the images in another."""
    random, rows, listing = np.random.default_rng(0), ["path,label,split"], {}
    for split in ("train", "val", "test"):
        listing[split] = []
        for k, name in enumerate(("mole", "wart")):
            file = Path("deep") / split / f"{name}.png"
            (tmp_path / "pictures" / file).parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / file)
            rows.append(f"{file},{name},{split}")
            listing[split].append([str(file), k, name])
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "skin.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "lists" / "skin.json").write_text(json.dumps(listing))
    return tmp_path


def declared(place: Path, text: str) -> Path:
    (place / "skin.yaml").write_text("dataset: skin\n" + text)
    return place / "skin.yaml"


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_paths_are_relative_to_the_declared_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    file = declared(place, f"path: lists/skin.{suffix}\nimages: pictures\n")
    data = load_data(file)
    assert {s.name: len(s) for s in data} == {"train": 2, "val": 2, "test": 2}
    pixels = np.array(Image.open(place / "pictures" / "deep" / "val" / "wart.png"))
    assert (np.array(data["val"].image(1)) == pixels).all()
    absolute = declared(place, f"path: lists/skin.{suffix}\nimages: {place / 'pictures'}\n")
    assert load_data(absolute)["train"].digest == data["train"].digest
    monkeypatch.chdir(place / "lists")
    assert load_data("../skin.yaml")["test"].digest == data["test"].digest


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_without_it_paths_are_relative_to_the_listing(place: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=r"Paths are relative to .*/lists; declare `images`"):
        load_data(declared(place, f"path: lists/skin.{suffix}\n"))


def test_a_folder_that_is_absent_or_not_listed_is_refused(place: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder of images\. `images` is"):
        load_data(declared(place, "path: lists/skin.csv\nimages: nowhere\n"))
    text = r"`images` belongs to layouts that list paths; found layout folder, wanted csv-table, "
    with pytest.raises(DataError, match=text):
        load_data(declared(place, "path: pictures\nlayout: folder\nimages: pictures\n"))
