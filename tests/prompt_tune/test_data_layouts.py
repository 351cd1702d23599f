"""Every layout gives the same small interface, and says in one line what is wrong."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cache.errors import DataError, RecipeError, UnknownNameError
from prompt_tune.data import load_data
from prompt_tune.data.check import check_data
from prompt_tune.data.source import preset

COLOURS = {"basal_cell": (200, 30, 30), "naevus": (30, 200, 30)}


def picture(
    colour: tuple[int, int, int], k: int = 0, size: tuple[int, int] = (12, 12)
) -> Image.Image:
    image = Image.new("RGB", size, colour)
    image.putpixel((k % size[0], k // size[0]), (0, 0, k))
    return image


def folder(root: Path, splits: dict[str, int]) -> Path:
    """`root/split/class/k.png`, `n` images per class in each split; "" is no split."""
    for split, count in splits.items():
        for name, colour in COLOURS.items():
            place = root / split / name
            place.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                picture(colour, k + 10 * len(split)).save(place / f"{k:02}.png")
    return root


def table(root: Path, rows: list[str], header: str = "path,label,split,patient") -> Path:
    path = root / "images.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def rows_of(root: Path, splits: dict[str, int]) -> list[str]:
    folder(root, splits)
    return [
        f"{split}/{name}/{k:02}.png,{name},{split},{split}-{k}"
        for split, count in splits.items()
        for name in COLOURS
        for k in range(count)
    ]


def archive(path: Path, **changed: np.ndarray | None) -> Path:
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray | None] = {}
    for split, count in (("train", 6), ("val", 4), ("test", 4)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 9, 7, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    arrays |= changed
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def declaration(root: Path, text: str) -> Path:
    path = root / "data.yaml"
    path.write_text("dataset: skin\n" + text, encoding="utf-8")
    return path


NPZ = "path: x.npz\nclasses: [{id: a, name: first}, {id: b, name: second}]\n"


def test_folder_with_splits(tmp_path: Path) -> None:
    root = folder(tmp_path / "Skin Set", {"train": 3, "validation": 2, "test": 2})
    data = load_data(root)
    assert data.dataset == "skin-set"
    assert [(c.id, c.name) for c in data.classes] == [
        ("basal-cell", "basal cell"),
        ("naevus", "naevus"),
    ]
    assert {s.name: s.counts() for s in data} == {"train": (3, 3), "val": (2, 2), "test": (2, 2)}
    assert data["val"].ids == ("val/0", "val/1", "val/2", "val/3")
    assert data["train"].image(4).getpixel((11, 11)) == COLOURS["naevus"]
    assert data["train"].image(4).mode == "RGB"


def test_folder_without_splits_is_divided_the_same_way_everywhere(tmp_path: Path) -> None:
    root = folder(tmp_path / "one", {"": 20})
    data = load_data(root)
    assert {s.name: s.counts() for s in data} == {"train": (14, 14), "val": (2, 2), "test": (4, 4)}
    assert data.notes == ("divided here with seed 1: val 0.1, test 0.2",)
    assert len({*data["train"].digests, *data["val"].digests, *data["test"].digests}) == 40
    again = load_data(folder(tmp_path / "two", {"": 20}))
    assert [s.digest for s in again] == [s.digest for s in data]
    seed = declaration(tmp_path, "path: one\ndivide: {val: 0.1, test: 0.2, seed: 2}")
    assert load_data(seed)["test"].digest != data["test"].digest


def test_division_is_the_recorded_one(tmp_path: Path) -> None:
    data = load_data(folder(tmp_path, {"": 20}))
    # sha256("1\nimage basal_cell/NN.png") in order: two for val, then these four
    assert [Path(f).stem for f in data["test"].files[:4]] == ["01", "12", "17", "18"]


def test_table_with_patients(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"train": 3, "val": 2, "test": 2})
    data = load_data(table(tmp_path, rows))
    assert data.dataset == "images"
    assert data["val"].patients == ("val-0", "val-1", "val-0", "val-1")
    groups = data["val"].groups
    assert groups is not None
    assert groups.tolist() == [0, 1, 0, 1]


def test_table_without_splits_keeps_patients_together(tmp_path: Path) -> None:
    folder(tmp_path, {"": 20})
    rows = [f"{c}/{k:02}.png,{c},{c}-{k // 2}" for c in COLOURS for k in range(20)]
    data = load_data(table(tmp_path, rows, "path,label,patient"))
    assert [len(s) for s in data] == [28, 4, 8]
    seen = [set(s.patients) for s in data]
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_table_columns_by_other_names_and_a_byte_order_mark(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"train": 2, "val": 1, "test": 1})
    path = table(tmp_path, rows, "file,diagnosis,fold,who")
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    columns = "columns: {image: file, label: diagnosis, split: fold, patient: who}"
    data = load_data(declaration(tmp_path, f"path: images.csv\n{columns}"))
    assert len(data["train"]) == 4
    assert data["test"].patients == ("test-0", "test-0")


def test_split_json(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 2, "val": 1, "test": 1})
    order = {"naevus": 0, "basal_cell": 1}
    listing = {
        split: [[f"{split}/{c}/{k:02}.png", order[c], c] for c in COLOURS for k in range(count)]
        for split, count in (("train", 2), ("val", 1), ("test", 1))
    }
    (tmp_path / "skin.json").write_text(json.dumps(listing), encoding="utf-8")
    data = load_data(tmp_path / "skin.json")
    assert [c.id for c in data.classes] == ["naevus", "basal-cell"]
    assert data["train"].labels.tolist() == [1, 1, 0, 0]
    classes = "classes: [{id: bcc, name: carcinoma, label: basal_cell}, {id: naevus, name: mole}]"
    other = load_data(declaration(tmp_path, f"path: skin.json\n{classes}"))
    assert other["train"].labels.tolist() == [0, 0, 1, 1]
    assert other.classes[0].name == "carcinoma"


def test_a_split_file_in_another_order_is_joined_by_name_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its numbers decide the halves of base-to-novel in published code; here the classes do."""
    names = [c.name for c in preset("kvasir").classes]
    listing: dict[str, list[list[object]]] = {split: [] for split in ("train", "val", "test")}
    for k, name in enumerate(names):
        for s, split in enumerate(listing):
            file = f"{split}/{k}.png"
            (tmp_path / split).mkdir(exist_ok=True)
            picture((k, s, 0)).save(tmp_path / file)
            listing[split].append([file, k, name])
    declared = tmp_path / "kvasir.yaml"
    declared.write_text("preset: kvasir\npath: split.json\n")
    (tmp_path / "split.json").write_text(json.dumps(listing))
    usual = load_data(declared)
    assert usual.notes == ()
    assert "number" not in capsys.readouterr().err
    turned = {s: [[f, 7 - int(str(k)), c] for f, k, c in rows] for s, rows in listing.items()}
    (tmp_path / "split.json").write_text(json.dumps(turned))
    data = load_data(declared)
    assert data.classes == usual.classes
    assert data["test"].labels.tolist() == usual["test"].labels.tolist() == list(range(8))
    (note,) = data.notes
    assert note.startswith("the files number the classes otherwise: ulcerative-colitis, polyps, ")
    assert note in " ".join(capsys.readouterr().err.split("\n"))
    findings = check_data(declared).findings
    assert [f.text for f in findings if f.kind == "class order"] == [note]
    assert all(f.level == "warning" for f in findings if f.kind == "class order")
    turned["train"][0][2] = "a thing of its own"
    turned["train"][0][1] = 8
    (tmp_path / "split.json").write_text(json.dumps(turned))
    refused(declared, "the label 'a thing of its own' is none of the declared classes")


@pytest.mark.parametrize("shape", [(), (3,)], ids=["grey", "rgb"])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 9, 7, *shape), dtype=np.uint8)
    archive(tmp_path / "x.npz", train_images=pixels)
    data = load_data(declaration(tmp_path, NPZ + "modality: dermatoscopy"))
    assert data.classes[1].modality == "dermatoscopy"
    train = data["train"]
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    got = np.array(train.image(3))
    assert np.array_equal(got, pixels[3] if shape else np.repeat(pixels[3][..., None], 3, 2))
    assert train.image(0).size == (7, 9)


def test_npz_of_a_known_set_needs_no_declaration(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(8, dtype=np.uint8), 2)[:, None]
    images = np.zeros((16, 4, 4, 3), dtype=np.uint8)
    data = load_data(
        archive(tmp_path / "bloodmnist_224.npz", train_images=images, train_labels=labels)
    )
    assert data.dataset == "bloodmnist"
    assert data["train"].image(0).size == (4, 4)
    assert data.classes[3].name.startswith("immature granulocytes(")
    assert data.templates
    with pytest.raises(DataError, match=r"does not say what its classes are called\. Write a decl"):
        load_data(archive(tmp_path / "x.npz"))


def save_dataset(path: Path, *, labels: bool = True) -> Path:
    import datasets

    names = list(COLOURS)
    kind = datasets.ClassLabel(names=names) if labels else datasets.Value("string")
    features = datasets.Features(
        {"picture": datasets.Image(), "dx": kind, "who": datasets.Value("string")}
    )
    parts = {}
    for split, count in (("train", 3), ("validation", 2), ("test", 2)):
        cases = [(c, k) for c in names for k in range(count)]
        parts[split] = datasets.Dataset.from_dict(
            {
                "picture": [picture(COLOURS[c], k) for c, k in cases],
                "dx": [c for c, _ in cases],
                "who": [f"{split}{k}" for _, k in cases],
            },
            features=features,
        )
    datasets.DatasetDict(parts).save_to_disk(path)
    return path


def test_saved_datasets_folder(tmp_path: Path) -> None:
    data = load_data(save_dataset(tmp_path / "skin"))
    assert {s.name: s.counts() for s in data} == {"train": (3, 3), "val": (2, 2), "test": (2, 2)}
    assert data["test"].image(3).getpixel((11, 11)) == COLOURS["naevus"]
    assert data["test"].patients == (None,) * 4
    columns = "columns: {image: picture, label: dx, patient: who}"
    known = load_data(declaration(tmp_path, f"path: skin\n{columns}"))
    assert known["test"].patients == ("test0", "test1") * 2


def test_parquet_folder_through_load_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    saved = datasets.load_from_disk(save_dataset(tmp_path / "skin"))
    for name, rows in saved.items():
        rows.to_parquet(tmp_path / "exported" / f"{name}-0.parquet")
    data = load_data(tmp_path / "exported")
    assert {s.name: s.counts() for s in data} == {"train": (3, 3), "val": (2, 2), "test": (2, 2)}
    assert data["val"].digests == load_data(tmp_path / "skin")["val"].digests


def test_every_layout_gives_the_same_digests(tmp_path: Path) -> None:
    splits = {"train": 3, "val": 2, "test": 2}
    root = folder(tmp_path / "skin", splits)
    by_folder = load_data(root)
    by_table = load_data(table(root, rows_of(root, splits)))
    arrays = {}
    for split in by_folder:
        arrays[f"{split.name}_images"] = np.stack(
            [np.array(split.image(i)) for i in range(len(split))]
        )
        arrays[f"{split.name}_labels"] = split.labels
    np.savez(root / "skin.npz", **arrays)
    classes = "classes: [{id: basal-cell, name: a}, {id: naevus, name: b}]"
    by_archive = load_data(declaration(root, f"path: skin.npz\n{classes}"))
    for name in splits:
        assert by_folder[name].digest == by_table[name].digest == by_archive[name].digest


# What can be wrong, one line each.


def refused(spec: str | Path, match: str, kind: type[Exception] = DataError) -> None:
    with pytest.raises(kind, match=match) as caught:
        load_data(spec)
    assert "\n" not in str(caught.value)


def test_no_such_thing(tmp_path: Path) -> None:
    refused("bloodmist", r"no such file, folder or preset\. .*Did you mean 'bloodmnist'\?")
    refused(tmp_path / "absent.yaml", "cannot be read", RecipeError)
    for name in ("absent", "absent.csv", "absent.json", "absent.npz"):
        path = declaration(
            tmp_path,
            f"path: {name}\nlayout: "
            + {
                "absent": "folder",
                "absent.csv": "csv-table",
                "absent.json": "split-json",
                "absent.npz": "npz",
            }[name],
        )
        refused(path, rf"{path}: there is no {tmp_path / name}\. Check `path`; it is relative to")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    refused(tmp_path / "notes.txt", "no data layout fits this path")
    refused(
        declaration(tmp_path, "path: notes.txt\nlayout: npx"),
        r"data\.yaml: unknown data layout 'npx'", UnknownNameError,
    )  # fmt: skip


def test_declaration_faults(tmp_path: Path) -> None:
    two = "{id: a, name: x}, {id: b, name: y}"
    for text, match in [
        ("paht: x", r"unknown key 'paht'.*Did you mean 'path'"),
        ("path: x\nasset: y", "exactly one of path, asset and hub, not path and asset"),
        ("modality: x", "exactly one of path, asset and hub, not none"),
        ("path: x\ntemplate: a photo", r"exactly one \{\} for the class name: 'a photo'"),
        ("path: x\ntemplate: 'a {name}'", r"exactly one \{\}"),
        ("path: x\ntemplates: ['a {}', '{} {}']", r"exactly one \{\}"),
        (f"path: x\nclasses: [{two}, {{id: a, name: z}}]", "the class id 'a' stands twice"),
        (f"path: x\nclasses: [{two}, {{id: c, name: x}}]", "the class name 'x' stands twice"),
        ("path: x\nclasses: [{id: 'A b', name: x}]", "classes.0.id"),
        ("path: x\ndivide: {val: 0.5, test: 0.5}", "leave nothing to train on"),
        ("path: x\nsplits: {trian: a}", "splits"),
    ]:
        refused(declaration(tmp_path, text), match, RecipeError)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": 3, "val": 1, "test": 1})
    bad = root / "train" / "naevus" / "01.png"
    whole = bad.read_bytes()
    data = load_data(root)
    for content in (whole[:40], b"", b"not an image"):
        bad.write_bytes(content)
        for read in (lambda: data["train"].image(4), lambda: load_data(root)["train"].digest):
            with pytest.raises(DataError, match=r"naevus/01\.png: the image cannot be read"):
                read()
    bad.unlink()
    with pytest.raises(DataError, match=r"naevus/01\.png: the image is missing"):
        data["train"].image(4)
    Image.fromarray(np.full((4, 4), 3000, dtype=np.uint16)).save(bad)
    for read in (lambda: data["train"].image(4), lambda: data["train"].digest):
        with pytest.raises(DataError, match=r"more than 8 bits per channel.*mode I;16"):
            read()


def test_splits_that_are_absent_or_empty(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", {"train": 4, "test": 2})
    refused(root, r"no 'val' split; found test, train\. Add it.*`divide: \{val: 0\.1\}`")
    made = load_data(declaration(tmp_path, "path: a\ndivide: {val: 0.25}"))
    assert [len(s) for s in made] == [6, 2, 4]
    (root / "val").mkdir()
    refused(root, "the split 'val' is empty")
    other = folder(tmp_path / "b", {"train": 2, "val": 1, "test": 1})
    for path in (other / "train" / "naevus").iterdir():
        path.unlink()
    refused(other, "the class 'naevus' has no image in train")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images in this folder; wanted root/class/image.png")
    refused(
        folder(tmp_path / "few", {"": 2}),
        "too few images or patients to divide; found 2, wanted at",
    )


def test_labels_and_classes_that_do_not_fit(tmp_path: Path) -> None:
    folder(tmp_path / "a", {"train": 2, "val": 1, "test": 1})
    classes = "path: a\nclasses: [{id: naevus, name: naevus}, {id: melanoma, name: melanoma}]"
    refused(
        declaration(tmp_path, classes), "the label 'basal_cell' is none of the declared classes"
    )
    three = "path: a\nclasses: [{id: naevus, name: n}, {id: basal_cell, name: b}, {id: c, name: c}]"
    refused(declaration(tmp_path, three), "the class 'c' has no image in train")
    one = "path: a\nclasses: [{id: naevus, name: n}]"
    refused(declaration(tmp_path, one), "nothing to tell apart; found 1 class")
    same = "path: a\nclasses: [{id: naevus, name: n}, {id: x, name: m, label: naevus}]"
    refused(declaration(tmp_path, same), "two classes answer to the label 'naevus'")
    (tmp_path / "a" / "train" / "Naevus").mkdir()
    picture((1, 2, 3)).save(tmp_path / "a" / "train" / "Naevus" / "0.png")
    refused(tmp_path / "a", "no class id can be made of 'naevus'; found the same id as 'Naevus'")


def test_table_faults(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"train": 2, "val": 1, "test": 1})
    refused(
        table(tmp_path, rows, "path,lable,split,patient"), "no column 'label'. Did you mean 'lable'"
    )
    refused(table(tmp_path, []), "the table lists no images")
    refused(table(tmp_path, [*rows, "x.png,naevus,train,p"]), r"the image .*x\.png is missing")
    refused(table(tmp_path, [*rows, "x.png,,train,p"]), "line 10 has no 'label'")
    refused(table(tmp_path, ['"x.png,naevus']), "not a CSV table")
    (tmp_path / "images.csv").write_bytes(b"path,label\n\xff,a\n")
    refused(tmp_path / "images.csv", "not UTF-8 text")


def test_the_same_patient_or_image_in_two_splits(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"train": 2, "val": 1, "test": 1})
    shared = [row.replace("test-0", "train-1") for row in rows]
    refused(
        table(tmp_path, shared),
        "the patient 'train-1' stands in both train and test; found 1 shared",
    )
    allowed = declaration(tmp_path, "path: images.csv\noverlap: allow")
    assert load_data(allowed)["test"].patients == ("train-1",) * 2
    leaked = [*rows, "train/naevus/00.png,naevus,test,other"]
    refused(table(tmp_path, leaked), r"the image '.*00\.png' stands in both train and test")
    refused(table(tmp_path, [*rows, rows[0]]), "an image stands twice in train")


def test_split_json_faults(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 1, "val": 1, "test": 1})
    path = tmp_path / "skin.json"
    good = ["train/naevus/00.png", 0, "naevus"]
    for content, match in [
        ("{", "not valid JSON"),
        ("[]", "not a split file; found list, wanted"),
        (json.dumps({"train": 3}), "'train' is not a list; found int"),
        (json.dumps({"train": [good, ["a", "b", "c"]]}), r"train\[1\] is not \[path, label, class"),
        (json.dumps({"train": [["a", True, "c"]]}), r"train\[0\] is not"),
        (json.dumps({"train": [good[:2]]}), r"train\[0\] is not"),
        (
            json.dumps({"train": [good, [good[0], 0, "mole"]]}),
            r"calls label 0 'mole'; wanted 'naevus'",
        ),
        (json.dumps({"train": [["x.png", 0, "naevus"]]}), r"the image .*x\.png is missing"),
        (json.dumps({"val": [good, [good[0], 1, "mole"]]}), "no 'train' split; found val"),
    ]:
        path.write_text(content, encoding="utf-8")
        refused(path, match)


def test_npz_faults(tmp_path: Path) -> None:
    path, data = tmp_path / "x.npz", declaration(tmp_path, NPZ)
    images = np.zeros((6, 4, 4), dtype=np.uint8)
    for changed, match in [
        ({"val_labels": None}, "no array 'val_labels' in the archive; found train_images,"),
        ({"train_labels": np.array([[1], "a", 3, 4, 5, 6], dtype=object)}, "holds pickled objects"),
        ({"train_images": images.astype(np.float32)}, r"not 8-bit grey or RGB.*found float32 \[6"),
        ({"train_images": np.zeros((6, 4, 4, 4), dtype=np.uint8)}, "not 8-bit grey or RGB"),
        (
            {"train_labels": np.zeros((6, 14), dtype=np.uint8)},
            r"not one whole number per.*\[6, 14\]",
        ),
        ({"train_labels": np.full(6, 7)}, "the label '7' is none of the declared classes"),
        ({"test_images": images[:0], "test_labels": np.zeros(0, int)}, "the split 'test' is empty"),
    ]:
        archive(path, **changed)
        refused(data, match)
    path.write_bytes(archive(path).read_bytes()[:300])
    refused(data, "not an npz archive")
    np.save(tmp_path / "x.npy", images)
    path.write_bytes((tmp_path / "x.npy").read_bytes())
    refused(data, "a single array, not an npz archive")


def test_npz_with_damaged_pixels(tmp_path: Path) -> None:
    path, data = archive(tmp_path / "x.npz"), declaration(tmp_path, NPZ)
    content = bytearray(path.read_bytes())
    content[250] ^= 255
    path.write_bytes(content)
    refused(data, "the array 'train_images' is damaged")


def test_hub_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_dataset(tmp_path / "skin", labels=False)
    refused(saved, r"no column 'label'.*Declare `columns: \{label: NAME\}`")
    columns = "columns: {image: who, label: dx}"
    refused(declaration(tmp_path, f"path: skin\n{columns}"), "the column 'who' holds no images")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    refused("hub:nobody/skin@main", r"nobody/skin: .*offline\. Fetch it once while online")


def test_a_gated_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub.errors import GatedRepoError

    def gated(*args: object, **kwargs: object) -> None:
        response = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("gated", response=response)

    monkeypatch.setattr(datasets, "load_dataset", gated)
    refused(
        "hub:lab/skin", "lab/skin: the data set is gated. Accept its terms on its page and log in"
    )

    def wrapped(*args: object, **kwargs: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", wrapped)
    refused("hub:lab/skin", "gated dataset.*Accept its terms on its page and log in")


@pytest.mark.assets
def test_the_real_blood_cells() -> None:
    data = load_data("bloodmnist")
    assert [len(s) for s in data] == [11959, 1712, 3421]
    assert data["train"].counts() == (852, 2181, 1085, 2026, 849, 993, 2330, 1643)
    assert data["train"].image(0).size == (28, 28)
    assert data["test"].digest == BLOOD_TEST


BLOOD_TEST = "7b4daa193981ae3103ece3064dc252983ab9aed9cc37b83d4ba2bb1d27e077aa"
