"""`data check`: planted faults are found, all of them, and nothing else."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

import cli
from cache.errors import DataError
from prompt_tune.data.check import DataReport, check_data
from prompt_tune.data.duplicates import (
    DISTANCE,
    difference_hash,
    equal_groups,
    hamming,
    near_pairs,
    thumbnail,
)

COUNTS = {"train": 5, "val": 2, "test": 3}


def _scene(random: np.random.Generator, size: int = 48) -> Image.Image:
    """A smooth random image: what a photograph is, and noise is not."""
    small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def _data(root: Path, seed: int = 0) -> list[str]:
    """Distinct images of two classes in a table; returns its rows."""
    random = np.random.default_rng(seed)
    rows = []
    for split, count in COUNTS.items():
        for name in ("mole", "melanoma"):
            for k in range(count + (name == "mole")):
                path = root / split / f"{name}{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                _scene(random).save(path)
                rows.append(f"{split}/{name}{k}.png,{name},{split},{split}-{name}-{k}")
    return rows


def _check(root: Path, rows: list[str], more: str = "") -> DataReport:
    (root / "skin.csv").write_text("path,label,split,patient\n" + "\n".join(rows))
    (root / "skin.yaml").write_text(
        "dataset: skin\npath: skin.csv\nmodality: dermoscopy\n"
        "classes: [{id: mole, name: mole}, {id: melanoma, name: melanoma}]\n" + more
    )
    return check_data(root / "skin.yaml")


def _kinds(report: DataReport) -> dict[str, tuple[str, int]]:
    return {f.kind: (f.level, len(f.items)) for f in report.findings}


def test_sound_data_pass(tmp_path: Path) -> None:
    report = _check(tmp_path, _data(tmp_path))
    assert report.findings == () and report.passed
    train = report.splits["train"]
    assert (train.images, train.classes) == (11, {"mole": 6, "melanoma": 5})
    assert (train.majority, train.commonest) == (6 / 11, "mole")
    assert (train.sizes, train.modes, train.patients) == ({"48x48": 11}, {"RGB": 11}, 11)
    assert report.facts["counts_as_expected"] is None
    text = report.describe()
    assert "always answering 'mole' is right in 54.5%" in text and text.endswith("passed")


def test_every_broken_file_is_named(tmp_path: Path) -> None:
    rows = _data(tmp_path)
    absent = [f"train/absent{k}.png,mole,train,x{k}" for k in range(15)]
    for name in ("train/mole1.png", "test/melanoma0.png"):
        (tmp_path / name).write_bytes(b"no image")
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / "val" / "mole0.png")
    report = _check(tmp_path, [*rows, *absent])
    assert _kinds(report) == {"missing": ("fault", 15), "unreadable": ("fault", 3)}
    text = report.describe()
    assert all(f"absent{k}.png" in text for k in range(15))
    assert all(name in text for name in ("mole1.png", "melanoma0.png", "more than 8 bits"))
    assert not report.passed


def test_labels_splits_and_classes_that_do_not_fit(tmp_path: Path) -> None:
    rows = _data(tmp_path)
    wrong = [rows[0].replace(",mole,", ",nevus,"), rows[1].replace(",mole,", ",wart,"), *rows[2:]]
    report = _check(tmp_path, wrong)
    assert _kinds(report) == {"label": ("fault", 2)}
    assert report.splits["train"].images == 9
    report = _check(tmp_path, [r for r in rows if ",test," not in r])
    assert _kinds(report) == {"splits": ("fault", 0)}
    assert "no 'test' split" in report.findings[0].text
    report = _check(tmp_path, [r for r in rows if ",melanoma,train," not in r])
    assert _kinds(report) == {"no image": ("fault", 1)}
    report = _check(tmp_path, [r for r in rows if ",melanoma,val," not in r])
    assert _kinds(report) == {"no image": ("warning", 1)} and report.passed
    report = _check(tmp_path, [*rows, rows[3]])
    assert _kinds(report)["listed twice"] == ("fault", 1)


def test_patients_in_two_splits(tmp_path: Path) -> None:
    rows = [r.replace("test-mole-", "train-mole-") for r in _data(tmp_path)]
    report = _check(tmp_path, rows)
    assert _kinds(report) == {"patients": ("fault", 4)}
    assert report.findings[0].items[0] == "train-mole-0"
    allowed = _check(tmp_path, rows, "overlap: allow\n")
    assert _kinds(allowed) == {"patients": ("warning", 4)} and allowed.passed
    some = [rows[0].replace("train-mole-0", ""), *_data(tmp_path)[1:]]
    assert _kinds(_check(tmp_path, some)) == {"no patient": ("warning", 0)}


def test_equal_pixels_whatever_the_file(tmp_path: Path) -> None:
    rows = _data(tmp_path)

    def copy(one: str, other: str) -> str:
        with Image.open(tmp_path / one) as image:
            image.save(tmp_path / other)
        return other

    rows.append(f"{copy('train/mole0.png', 'test/again.bmp')},mole,test,t1")
    rows.append(f"{copy('train/mole1.png', 'train/again.tif')},melanoma,train,t2")
    rows.append(f"{copy('val/mole0.png', 'val/again.bmp')},mole,val,t3")
    report = _check(tmp_path, rows)
    assert _kinds(report) == {
        "equal across splits": ("fault", 1),
        "equal, two classes": ("fault", 1),
        "equal within a split": ("warning", 2),
    }
    across = next(f for f in report.findings if f.kind == "equal across splits")
    assert across.items == ("train/0 (mole) = test/7 (mole)",)
    conflict = next(f for f in report.findings if f.kind == "equal, two classes")
    assert conflict.items == ("train/1 (mole) = train/11 (melanoma)",)


def test_near_duplicates_and_conflicting_labels(tmp_path: Path) -> None:
    rows = _data(tmp_path)
    with Image.open(tmp_path / "train" / "mole0.png") as image:
        image.save(tmp_path / "test" / "near.jpg", quality=80)
    with Image.open(tmp_path / "train" / "mole1.png") as image:
        dark = ImageEnhance.Brightness(image).enhance(0.8)
        dark.resize((96, 96), Image.Resampling.BICUBIC).save(tmp_path / "train" / "near.png")
    rows += ["test/near.jpg,mole,test,t1", "train/near.png,melanoma,train,t2"]
    report = _check(tmp_path, rows)
    assert _kinds(report) == {
        "near across splits": ("warning", 1),
        "near, two classes": ("warning", 1),
        "near within a split": ("warning", 1),
    }
    assert report.passed
    assert report.findings[0].items[0].startswith("train/0 (mole) ~ test/7 (mole), ")


def test_expected_counts_are_a_warning_unless_strict(tmp_path: Path) -> None:
    rows = _data(tmp_path)
    right = "expected: {images: {train: [6, 5], val: 5}}\n"
    report = _check(tmp_path, rows, right)
    assert report.facts["counts_as_expected"] is True and not report.findings
    wrong = right.replace("[6, 5]", "[5, 6]").replace("val: 5", "val: 4")
    report = _check(tmp_path, rows, wrong)
    assert [f.text for f in report.findings] == [
        "train has other counts than expected: mole 6 not 5, melanoma 5 not 6",
        "val has 5 images, expected 4",
    ]
    assert report.passed and report.facts["counts_as_expected"] is False
    digest = "files: {skin.csv: 'md5:" + "0" * 32 + "'}, strict: true}\n"
    report = _check(tmp_path, rows, right.replace("}}\n", "}, ") + digest)
    assert report.facts["file_as_expected"] is False and not report.passed


def test_the_command_and_its_exit_code(tmp_path: Path) -> None:
    rows = _data(tmp_path)
    before = _check(tmp_path, rows)
    there = set(tmp_path.rglob("*"))
    done = CliRunner().invoke(cli.app, ["data", "check", str(tmp_path / "skin.yaml"), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json.loads(json.dumps(before.to_json()))
    assert set(tmp_path.rglob("*")) == there, "nothing is written"
    (tmp_path / "train" / "mole0.png").unlink()
    done = CliRunner().invoke(cli.app, ["data", "check", str(tmp_path / "skin.yaml")])
    assert done.exit_code == 1 and "mole0.png" in done.stdout and "failed" in done.stdout
    with pytest.raises(DataError, match="no such file, folder or preset"):
        check_data("bloodmist")


# Hashes and pairs.


def test_the_hash_is_one_bit_per_pair_of_neighbours() -> None:
    assert difference_hash(Image.new("L", (9, 8), 7)) == 0, "as bright is not brighter"
    pixels = np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1))
    assert difference_hash(Image.fromarray(pixels)) == 0, "brighter to the right"
    assert difference_hash(Image.fromarray(pixels[:, ::-1].copy())) == (1 << 64) - 1
    pixels[2, 3] = 255  # the third row: brighter than its right neighbour alone
    assert difference_hash(Image.fromarray(pixels)) == 1 << (63 - (8 * 2 + 3))


def test_hamming_counts_bits() -> None:
    random = np.random.default_rng(0)
    one, other = (random.integers(0, 2**63, 200, dtype=np.uint64) for _ in range(2))
    wanted = [(a ^ b).bit_count() for a, b in zip(one.tolist(), other.tolist())]
    assert hamming(one, other).tolist() == wanted


def test_equal_groups() -> None:
    assert equal_groups(["a", "b", "d", "a", "e", "b", "c", "a"]) == [[0, 3, 7], [1, 5]]


def test_pairs_are_those_of_a_search_over_all() -> None:
    """The oracle compares every pair of hashes and of thumbnails."""
    random = np.random.default_rng(1)
    images = []
    for _ in range(60):
        scene = _scene(random)
        images.append(scene)
        for quality in (90, 40, 10):
            packed = io.BytesIO()
            scene.save(packed, "JPEG", quality=quality)
            images.append(Image.open(packed))
        images.append(scene.rotate(6))
    hashes = np.array([difference_hash(i) for i in images], dtype=np.uint64)
    thumbnails = np.stack([thumbnail(i) for i in images])
    digests = [str(k) for k in range(len(images))]
    wanted = []
    for a in range(len(images)):
        for b in range(a + 1, len(images)):
            bits = (int(hashes[a]) ^ int(hashes[b])).bit_count()
            alike = np.corrcoef(thumbnails[a].ravel(), thumbnails[b].ravel())[0, 1] >= 0.98
            if bits <= DISTANCE and alike:
                wanted.append((a, b, bits))
    found = near_pairs(hashes, thumbnails, digests)
    assert found.pairs == wanted and found.crowded == 0
    assert {bits for _, _, bits in wanted} >= set(range(DISTANCE + 1))
    assert 100 < len(wanted) < 600, "copies are found, other scenes are not"
    digests[1] = digests[0]
    assert near_pairs(hashes, thumbnails, digests).pairs == [p for p in wanted if 1 not in p[:2]]


@pytest.mark.parametrize("distance", [0, 1, 2, 5])
def test_no_pair_escapes_the_search(distance: int) -> None:
    """Every way to leave just one part of the hash alike, and one bit too many."""
    edges = [64 * k // (distance + 1) for k in range(distance + 2)]
    scene = thumbnail(_scene(np.random.default_rng(3)))
    for spared in range(distance + 1):
        other = sum(1 << low for k, low in enumerate(edges[:-1]) if k != spared)
        hashes = np.array([0, other, other | 1 << (edges[spared + 1] - 1)], dtype=np.uint64)
        pairs = near_pairs(hashes, np.stack([scene] * 3), ["a", "b", "c"], distance=distance).pairs
        assert (0, 1, distance) in pairs
        assert not [p for p in pairs if p[:2] == (0, 2)]


def test_plain_images_and_crowds_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import prompt_tune.data.duplicates as module

    random = np.random.default_rng(2)
    scene = thumbnail(_scene(random))
    hashes = np.full(6, 12345, dtype=np.uint64)
    plain = np.stack([np.full_like(scene, 9), np.full_like(scene, 8), *[scene] * 4])
    digests = [str(k) for k in range(6)]
    pairs = near_pairs(hashes, plain, digests).pairs
    assert {k for a, b, _ in pairs for k in (a, b)} == {2, 3, 4, 5} and len(pairs) == 6
    monkeypatch.setattr(module, "CROWD", 3)
    crowd = near_pairs(hashes, plain, digests)
    assert (crowd.pairs, crowd.crowded) == ([], 4)
