"""Packaged declarations of data sets, and each loaded from the layouts people have."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.errors import DataError, RecipeError
from prompt_tune.data import load_data
from prompt_tune.data.declaration import DataFacts
from prompt_tune.data.source import preset, presets

ALL = {name: preset(name) for name in presets()}
SIZES = {"cilmp": 15, "biomedcoop": 11, "biomed-dpt": 11, "vip": 2, "medmnist": 12}
SPLITS = ("train", "val", "test")


@pytest.mark.parametrize("name", ALL)
def test_every_preset_says_what_it_must(name: str) -> None:
    one = ALL[name]
    assert one.dataset == name
    assert len(one.classes) >= 2 and one.modality and one.organ and one.source and one.licence
    assert all(t.count("{}") == 1 for t in (one.template, *one.templates))
    assert not one.templates or one.template == one.templates[0]
    assert set(one.used_by) <= set(SIZES) and one.used_by
    unconfirmed = one.licence == "unconfirmed"
    assert unconfirmed == ("medmnist" not in one.used_by)
    assert "cilmp" not in one.used_by or any("unconfirmed" in note for note in one.notes)


def test_families_are_whole() -> None:
    found = {f: sum(f in one.used_by for one in ALL.values()) for f in SIZES}
    assert found == SIZES
    assert len({one.dataset for one in ALL.values()}) == len(ALL) == 38


@pytest.mark.parametrize(
    ("name", "totals"),
    [
        ("btmri", (2854, 1141, 1717)),
        ("busi", (389, 155, 236)),
        ("chmnist", (2496, 1000, 1504)),
        ("covid-19", (10582, 4232, 6351)),
        ("ctkidney", (6221, 2487, 3738)),
        ("dermamnist-biomedcoop", (7006, 1003, 2005)),
        ("kneexray", (5778, 826, 1656)),
        ("kvasir", (2000, 800, 1200)),
        ("lungcolon", (12500, 5000, 7500)),
        ("octmnist-biomedcoop", (97477, 10832, 1000)),
        ("retina", (2108, 841, 1268)),
        ("pneumonia-vip", (4710, 522, 624)),
        ("derm7pt-vip", (346, 161, 320)),
        ("bloodmnist", (11959, 1712, 3421)),
        ("dermamnist", (7007, 1003, 2005)),
        ("organamnist", (34561, 6491, 17778)),
    ],
)
def test_counts_per_class_sum_to_the_published_totals(name: str, totals: tuple[int, ...]) -> None:
    images = ALL[name].expected.images
    found = (images[s] for s in SPLITS)
    assert tuple(n if isinstance(n, int) else sum(n) for n in found) == totals


def test_official_order_of_labels() -> None:
    names = [c.name for c in ALL["kvasir"].classes]
    assert names[4:6] == ["normal pylorus", "normal z line"]
    assert [c.name for c in ALL["busi"].classes] == [
        "benign tumor", "malignant tumor", "normal scan",
    ]  # fmt: skip
    assert [c.name for c in ALL["busi-cilmp"].classes] == ["normal", "malignant", "benign"]
    assert any("order unconfirmed" in n for n in ALL["octmnist-biomedcoop"].notes)


# Layouts.


def _image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


def _files(root: Path, one: DataFacts, *, folder: bool) -> dict[str, list[tuple[str, int]]]:
    """One image per class and split; returns (path, label)."""
    listed: dict[str, list[tuple[str, int]]] = {}
    for s, split in enumerate(SPLITS):
        for k, c in enumerate(one.classes):
            inside = c.name.replace(" ", "_") if folder else "images"
            path = f"{split}/{inside}/{k}.png"
            _image(root / path, 20 * k + s)
            listed.setdefault(split, []).append((path, k))
    return listed


@pytest.mark.parametrize("layout", ["split-json", "folder", "npz", "csv-names", "csv-numbers"])
@pytest.mark.parametrize("name", ["kvasir", "bloodmnist", "retinamnist"])
def test_a_preset_loads_from_every_layout(tmp_path: Path, name: str, layout: str) -> None:
    one, root = ALL[name], tmp_path / "files"
    listed = _files(root, one, folder=layout == "folder")
    path = root
    if layout == "split-json":
        path = root / "split.json"
        rows = {s: [[p, k, one.classes[k].name] for p, k in r] for s, r in listed.items()}
        path.write_text(json.dumps(rows))
    elif layout.startswith("csv"):
        path = root / "table.csv"
        label = (lambda k: one.classes[k].id) if layout == "csv-names" else str
        lines = [f"{p},{label(k)},{s}" for s, r in reversed(listed.items()) for p, k in r[::-1]]
        path.write_text("path,label,split\n" + "\n".join(lines))
    elif layout == "npz":
        path = root / "any.npz"
        arrays = {}
        for s, split in enumerate(SPLITS):
            labels = np.arange(len(one.classes))
            values = (20 * labels + s).astype(np.uint8)
            arrays[f"{split}_images"] = np.broadcast_to(
                values[:, None, None], (*values.shape, 4, 4)
            )
            arrays[f"{split}_labels"] = labels[:, None]
        np.savez(path, **arrays)
    declaration = tmp_path / "mine.yaml"
    declaration.write_text(f"preset: {name}\npath: {path.relative_to(tmp_path)}\n")
    data = load_data(declaration)
    assert data.dataset == name and data.template == one.template
    assert [(c.id, c.name, c.modality) for c in data.classes] == [
        (c.id, c.name, one.modality) for c in one.classes
    ]
    for s, split in enumerate(SPLITS):
        part = data[split]
        reds = [part.image(i).getpixel((0, 0))[0] for i in range(len(part))]  # type: ignore[index]
        assert sorted(reds) == [20 * k + s for k in range(len(one.classes))]
        assert part.labels.tolist() == [red // 20 for red in reds]


def test_what_a_file_says_replaces_what_the_preset_says(tmp_path: Path) -> None:
    _files(tmp_path / "a", ALL["busi"], folder=True)
    mine = tmp_path / "mine.yaml"
    mine.write_text("preset: busi\npath: a\ndataset: busi-ours\ntemplate: 'ultrasound of {}'\n")
    data = load_data(mine)
    assert (data.dataset, data.template) == ("busi-ours", "ultrasound of {}")
    assert data.templates == ALL["busi"].templates
    mine.write_text(
        "preset: busi\npath: a\nclasses:\n"
        "  - {id: b, name: b, label: benign_tumor}\n  - {id: m, name: m, label: malignant_tumor}\n"
        "  - {id: n, name: n, label: normal_scan}\nexpected: {strict: true}\n"
    )
    assert [c.id for c in load_data(mine).classes] == ["b", "m", "n"], "nothing is expected of them"


def test_expected_counts_and_files_are_refused_only_when_strict(tmp_path: Path) -> None:
    _files(tmp_path / "a", ALL["busi"], folder=True)
    mine = tmp_path / "mine.yaml"
    mine.write_text("preset: busi\npath: a\n")
    assert len(load_data(mine)["train"]) == 3
    counts = "images: {train: [1, 1, 1], val: 3, test: [1, 2, 1]}"
    mine.write_text(f"preset: busi\npath: a\nexpected: {{{counts}, strict: true}}\n")
    with pytest.raises(DataError, match=r"counts than expected: malignant-tumor 1 not 2\. Fetch"):
        load_data(mine)
    mine.write_text(mine.read_text().replace("[1, 2, 1]", "4"))
    with pytest.raises(DataError, match=r"test has 3 images, expected 4"):
        load_data(mine)
    arrays = {f"{s}_{what}": np.arange(2) for s in SPLITS for what in ("labels",)}
    arrays |= {f"{s}_images": np.zeros((2, 4, 4), np.uint8) for s in SPLITS}
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    mine.write_text(
        "preset: pneumoniamnist\npath: pneumoniamnist.npz\nexpected:\n  strict: true\n"
        "  files: {pneumoniamnist.npz: 'md5:28209eda62fecd6e6a2d98b1501bb15f'}\n"
    )
    with pytest.raises(DataError, match=r"is md5:[0-9a-f]{32}, expected md5:28209eda"):
        load_data(mine)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"kvasir: this preset .* not where they lie.*`path: \.\.\.`"
    ):
        load_data("kvasir")
    for spec in ("chestmnist", tmp_path / "chestmnist.npz"):
        np.savez(tmp_path / "chestmnist.npz", x=np.zeros(1))
        with pytest.raises(
            DataError, match=r"chestmnist: this data set cannot be used here: its lab"
        ):
            load_data(spec)
    mine = tmp_path / "mine.yaml"
    mine.write_text("preset: kvazir\npath: a\n")
    with pytest.raises(DataError, match=r"mine\.yaml: kvazir: no such preset.*mean 'kvasir'"):
        load_data(mine)
    mine.write_text("preset: kvasir\npath: a\nasset: bloodmnist\n")
    with pytest.raises(RecipeError, match="exactly one of path, asset and hub"):
        load_data(mine)
    mine.write_text("preset: kvasir\npath: a\nexpected: {images: {train: [1, 2]}}\n")
    with pytest.raises(RecipeError, match=r"train has 2 counts, and there are 8 classes"):
        load_data(mine)
    mine.write_text("preset: kvasir\npath: a\nexpected: {files: {a.npz: abc}}\n")
    with pytest.raises(RecipeError, match=r"expected\.files\.a\.npz"):
        load_data(mine)
