"""`ImageSplit` and `DataSource`: ids, digests, parts, selection of classes."""

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cache.errors import DataError
from prompt_tune.data import DataSource, image_digest, load_data
from prompt_tune.data.declaration import SLUG, slug
from prompt_tune.data.images import numbered

CLASSES = "classes: [{id: a, name: one}, {id: b, name: two}, {id: c, name: three}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 9), ("val", 6), ("test", 5)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(root / "x.npz", **arrays)
    (root / "x.yaml").write_text(f"dataset: x\npath: x.npz\n{CLASSES}\n", encoding="utf-8")
    return load_data(root / "x.yaml")


def test_digest_is_of_size_and_pixels_whatever_the_format(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    wanted = hashlib.sha256(b"5x3:" + pixels.tobytes()).hexdigest()
    image = Image.fromarray(pixels)
    assert image_digest(image) == wanted
    image.save(tmp_path / "a.bmp")
    image.convert("RGBA").save(tmp_path / "a.png")
    for name in ("a.bmp", "a.png"):
        with Image.open(tmp_path / name) as opened:
            assert image_digest(opened) == wanted
    assert image_digest(Image.fromarray(pixels.reshape(5, 3, 3))) != wanted


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            image = Image.new("RGB", (8, 4))
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(tmp_path / split / name / "0.jpg", exif=exif)
    assert load_data(tmp_path)["train"].image(0).size == (4, 8)


def test_a_part_keeps_ids_and_digests(data: DataSource) -> None:
    train = data["train"]
    part = train.subset([4, 0, 7])
    assert part.ids == ("train/4", "train/0", "train/7")
    assert part.labels.tolist() == [1, 0, 1]
    assert part.counts() == (1, 2, 0)
    wanted = tuple(image_digest(train.image(i)) for i in (4, 0, 7))
    assert len(set(wanted)) == 3
    assert part.digests == tuple(image_digest(part.image(k)) for k in range(3)) == wanted
    assert part.subset([2]).ids == ("train/7",)
    assert part.digests == train.subset([4, 0, 7]).digests, "whether cached or computed"


def test_split_digest_depends_on_pixels_labels_order_and_classes(data: DataSource) -> None:
    train = data["train"]
    digests = {
        train.digest,
        data["val"].digest,
        train.subset([1, 0, *range(2, 9)]).digest,
        train.subset(range(8)).digest,
        train.select([1, 0, 2]).digest,
        replace(train, labels=train.labels[::-1]).digest,
    }
    assert len(digests) == 6
    assert train.subset(range(9)).digest == train.digest


def test_digest_survives_a_fresh_process_worth_of_pickling(data: DataSource) -> None:
    again = pickle.loads(pickle.dumps(data["val"]))
    assert again.digest == data["val"].digest


def test_selected_classes_are_relabelled(data: DataSource) -> None:
    two = data.select(["c", "a"])
    assert [c.id for c in two.classes] == ["c", "a"]
    assert two["train"].labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert two["train"].ids == ("train/0", "train/2", "train/3", "train/5", "train/6", "train/8")
    for one in two:
        assert one.classes == two.classes
        for k in range(len(one)):
            origin = data[one.name]
            source = origin.ids.index(one.ids[k])
            assert one.classes[one.labels[k]] == origin.classes[origin.labels[source]]
            assert one.digests[k] == origin.digests[source]


def test_selection_and_split_faults(data: DataSource) -> None:
    with pytest.raises(DataError, match=r"x: no class 'd'\. Known: a, b, c\."):
        data.select(["a", "d"])
    with pytest.raises(DataError, match="the class 'a' is selected twice"):
        data.select(["a", "b", "a"])
    with pytest.raises(DataError, match=r"no split 'vel'\. Did you mean 'val'\?"):
        data["vel"]
    few = DataSource("x", data.classes, {"train": data["train"].subset([0, 3])})
    with pytest.raises(DataError, match="the split 'train' has no image of the selected classes"):
        few.select(["b", "c"])


def test_patients_become_numbers() -> None:
    assert numbered([None, None]) is None
    found = numbered(["p", None, "q", None, "p"])
    assert found is not None
    assert found.tolist() == [0, 1, 2, 3, 0]


@given(st.text())
def test_a_slug_is_an_id_or_nothing(name: str) -> None:
    made = slug(name)
    assert made == "" or SLUG.fullmatch(made)
    assert slug(made) == made


def test_slugs() -> None:
    assert slug("Immature_Granulocytes (IG)") == "immature-granulocytes-ig"
    assert slug("Café") == "cafe"
    assert slug("细胞") == ""


def test_names_without_an_ascii_letter_need_a_declaration(tmp_path: Path) -> None:
    for name in ("细胞", "other"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "train" / name / "0.png")
    with pytest.raises(DataError, match="of '细胞'; found no letter or digit of ASCII"):
        load_data(tmp_path)
    (tmp_path / "细胞").mkdir()
    with pytest.raises(DataError, match="no data set id can be made of this name"):
        load_data(tmp_path / "细胞")
