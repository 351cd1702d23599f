"""Sample lists are the same on every machine, and a stored one wins over the seed."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DataError
from prompt_tune.data import (
    DataClass,
    ImageSplit,
    SampleList,
    few_shot,
    load_data,
    stored_or_drawn,
    stratified_part,
)
from prompt_tune.data.layouts.npz import pixel_rows


def split_of(labels: Sequence[int], *, salt: int = 0, classes: int = 3) -> ImageSplit:
    """A split whose image `i` is a 2x2 picture of the number i."""
    n = len(labels)
    pixels = np.zeros((n, 2, 2, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1], pixels[:, 1, 1, 2] = np.arange(n), n, salt
    return ImageSplit(
        name="train",
        classes=tuple(DataClass("abc"[k], f"class {k}") for k in range(classes)),
        labels=np.array(labels, dtype=np.int64),
        ids=tuple(f"train/{k}" for k in range(n)),
        patients=(None,) * n,
        files=tuple(f"image {k}" for k in range(n)),
        rows=pixel_rows(pixels),
        at=np.arange(n),
    )


LABELS = [0, 1, 2, 0, 1, 0, 0, 2, 1, 0, 2, 2]


def test_drawn_by_hash_of_seed_and_digest() -> None:
    split = split_of(LABELS)
    order = sorted(
        range(12), key=lambda i: hashlib.sha256(f"7\n{split.digests[i]}".encode()).hexdigest()
    )
    wanted = sorted(i for k in range(3) for i in [i for i in order if LABELS[i] == k][:2])
    found = few_shot(split, 2, 7)
    assert list(found.indices) == wanted
    assert found.labels == tuple(LABELS[i] for i in wanted)
    assert found.digests == tuple(split.digests[i] for i in wanted)
    assert found.counts() == (2, 2, 2)
    assert found.split_digest == split.digest


def test_the_recorded_draw() -> None:
    assert few_shot(split_of(LABELS), 2, 1).indices == RECORDED
    assert stratified_part(split_of(LABELS), 5, 1).indices == RECORDED_PART


RECORDED = (0, 1, 2, 5, 8, 11)
RECORDED_PART = (0, 2, 5, 8, 11)


@given(st.permutations(range(12)), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_files_does_not_matter(order: list[int], seed: int) -> None:
    split = split_of(LABELS)
    shuffled = split.subset(order)
    for draw in (lambda s: few_shot(s, 2, seed), lambda s: stratified_part(s, 7, seed)):
        assert set(draw(shuffled).digests) == set(draw(split).digests)


def test_fewer_shots_are_contained_in_more_and_seeds_differ() -> None:
    split = split_of([i % 3 for i in range(90)])
    drawn = [set(few_shot(split, k, 1).indices) for k in (1, 2, 4, 8, 16)]
    assert all(a < b for a, b in itertools.pairwise(drawn))
    assert drawn[-1] != set(few_shot(split, 16, 2).indices)
    assert drawn[-1] == set(few_shot(split, 16, 1).indices)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_a_part_keeps_the_proportions(labels: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(labels)))
    split = split_of(labels)
    part = stratified_part(split, n, 3)
    counts = split.counts()
    present = sum(c > 0 for c in counts)
    assert len(part) == n == len(set(part.indices))
    for count, kept in zip(counts, part.counts(), strict=True):
        assert kept <= count
        if n >= present and count:
            assert kept >= 1
        if all(c * n >= len(labels) for c in counts if c):  # nobody was lifted to one
            assert abs(kept - count * n / len(labels)) < 1


def test_applied_to_its_split() -> None:
    split = split_of(LABELS)
    chosen = few_shot(split, 1, 5)
    part = chosen.apply(split)
    assert part.digests == chosen.digests
    assert part.ids == tuple(f"train/{i}" for i in chosen.indices)


def test_too_few_images_are_refused_unless_allowed() -> None:
    split = split_of([0, 0, 0, 1, 2])
    with pytest.raises(DataError, match="'b' has too few images for 2 shots; found 1, wanted 2"):
        few_shot(split, 2, 1)
    assert few_shot(split, 2, 1, allow_fewer=True).counts() == (2, 1, 1)
    with pytest.raises(DataError, match="at least one image per class; found 0"):
        few_shot(split, 0, 1)
    for n in (0, 6):
        with pytest.raises(DataError, match=f"at most all; found {n}, wanted 1 to 5"):
            stratified_part(split, n, 1)


def test_a_stored_list_wins_over_the_seed(tmp_path: Path) -> None:
    split, path = split_of(LABELS), tmp_path / "train.json"
    first = stored_or_drawn(path, split, lambda s: few_shot(s, 2, 1))
    assert first == few_shot(split, 2, 1)
    assert stored_or_drawn(path, split, lambda s: few_shot(s, 2, 2)) == first
    assert SampleList.load(path) == first
    assert first.digest != few_shot(split, 2, 2).digest
    text = path.read_text(encoding="utf-8")
    assert json.loads(text)["seed"] == 1
    assert str(tmp_path) not in text


def test_a_list_of_other_data_is_refused(tmp_path: Path) -> None:
    split, path = split_of(LABELS), tmp_path / "train.json"
    few_shot(split, 2, 1).save(path)
    for other, match in [
        (split_of(LABELS, salt=1), r"case train/\d+ is not the image or label the sample list"),
        (split_of([*LABELS[:-1], 0]), "is not the image or label"),
        (split_of(LABELS).subset(range(3)), "names a case the split does not have"),
        (split_of(LABELS).select([1, 0, 2]), "another split or other classes"),
    ]:
        with pytest.raises(DataError, match=match):
            SampleList.load(path, other)
        with pytest.raises(DataError, match=match):
            SampleList.load(path).apply(other)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d | {"indices": d["indices"][:-1]},
        lambda d: d | {"indices": [d["indices"][0]] * len(d["indices"])},
        lambda d: d | {"indices": [-1, *d["indices"][1:]]},
        lambda d: d | {"indices": [0.5, *d["indices"][1:]]},
        lambda d: d | {"format": "something else"},
        lambda d: {k: v for k, v in d.items() if k != "labels"},
        lambda d: [d],
        lambda d: d | {"extra": 1},
    ],
)
def test_a_damaged_list_is_refused(tmp_path: Path, spoil: object) -> None:
    path = tmp_path / "train.json"
    few_shot(split_of(LABELS), 2, 1).save(path)
    assert callable(spoil)
    path.write_text(json.dumps(spoil(json.loads(path.read_text(encoding="utf-8")))))
    with pytest.raises(DataError, match=r"not a sample list, or damaged\. Delete it"):
        SampleList.load(path)


def test_an_absent_or_truncated_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    with pytest.raises(DataError, match="no such sample list"):
        SampleList.load(path)
    few_shot(split_of(LABELS), 2, 1).save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="not a sample list, or damaged"):
        SampleList.load(path)


@pytest.mark.assets
def test_the_recorded_sample_of_the_real_blood_cells() -> None:
    data = load_data("bloodmnist")
    shots = few_shot(data["train"], 16, 1)
    assert shots.counts() == (16,) * 8
    assert shots.digest == BLOOD_SHOTS
    part = stratified_part(data["test"], 400, 1)
    assert part.counts() == (29, 73, 36, 68, 28, 33, 78, 55)
    assert part.digest == BLOOD_PART


BLOOD_SHOTS = "444e5d3db0d8548974d52a3c503fefcf9fb5ad6e3c02d72d072c8b36de2dff5c"
BLOOD_PART = "8c8e5c8c3c4d38d080a40bc91ad5ed9e5ca744c3a869344ff35b549f113bccce"
