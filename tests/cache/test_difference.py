"""Differences between two caches: named by field, counted by entry, measured by layer."""

import dataclasses
import json

import numpy as np
import pytest

from cache import BlockSpec, ClassRecord, ShardFolder, seal
from cache.combining.difference import Change, diff
from cache.errors import CacheFormatError


def made(make, path, entries, **changes):
    folder = ShardFolder(path.with_suffix(".parts"), header=make.header(**changes))
    folder.commit(entries, batch_shape=(1,))
    seal(folder, path)
    return path


def with_values(entry, values):
    return dataclasses.replace(entry, values={**entry.values, **values})


def test_the_same_content_has_no_difference(make, sealed, tmp_path):
    copy = tmp_path / "copy.h5"
    copy.write_bytes(sealed.read_bytes())
    found = diff(sealed, copy, rtol=0.0)
    assert found.same and found.within(0.0)
    assert all(block.same and block.equal == 6 for block in found.blocks.values())
    assert found.fields == found.blocks_a == found.blocks_b == ()
    assert found.describe().startswith("the same content  ")
    assert json.loads(json.dumps(found.to_json()))["within"] is True


def test_every_field_that_differs_is_named(make, tmp_path):
    model = {"hub": "org/other", "files": {}}
    classes = [
        {"id": "ig", "descriptions": ["new"]},
        {"id": "basophil", "descriptions": ["A long text about /usr/share things.", "two"]},
    ]
    records = (ClassRecord("basophil", "basophil", "histology"), *make.CLASSES[1:])
    make.cache_at(tmp_path / "a.h5")
    make.cache_at(
        tmp_path / "b.h5",
        recipe={**make.RECIPE, "model": model, "classes": classes},
        provenance={**make.PROVENANCE, "tool": "vademecum"},
        classes=records,
    )
    found = diff(tmp_path / "a.h5", tmp_path / "b.h5")
    assert not found.same and not found.within(1.0)
    assert [change.at for change in found.fields] == [
        "class table.basophil.modality",
        "class table.basophil.source",
        "provenance.tool",
        "recipe.classes.basophil.descriptions[1]",
        "recipe.classes.ig",
        "recipe.model.files.model.safetensors",
        "recipe.model.hub",
    ]
    assert found.fields[-1] == Change("recipe.model.hub", "org/name", "org/other")
    assert found.fields[2].only == "b"
    text = found.describe()
    assert 'recipe.model.hub: "org/name" in a, "org/other" in b' in text
    assert 'provenance.tool: only in b: "vademecum"' in text


def test_layers_are_measured(make, tmp_path):
    blocks = {"layers": make.BLOCKS["layers"]}
    one = [make.entry("layers", c, 0, rows=2) for c in ("ig", "basophil")]
    values = one[0].values["values"].astype("f2")
    moved = values.copy()
    moved[1, 1, 3] += np.float16(2.0)  # layer 2
    moved[:, 2] = -moved[:, 2]  # layer 30
    two = [with_values(one[0], {"values": moved.astype("f4")}), one[1]]
    a = made(make, tmp_path / "a.h5", one, blocks=blocks)
    b = made(make, tmp_path / "b.h5", two, blocks=blocks)
    block = diff(a, b).blocks["layers"]
    assert (block.equal, block.different, block.only_a, block.only_b) == (1, ("ig/0",), (), ())
    first, second, third = block.layers
    assert [one.layer for one in block.layers] == [1, 2, 30]
    assert (first.max_abs, first.mean_abs) == (0.0, 0.0)
    assert first.cosine_min == pytest.approx(1.0)
    assert second.max_abs == 2.0
    assert second.mean_abs == pytest.approx(2.0 / (4 * 5))  # four rows of width five
    x, y = (v[1, 1].astype("f8") for v in (values, moved))
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert second.cosine_min == pytest.approx(cosine)
    assert second.cosine_mean == pytest.approx((3 + cosine) / 4)
    assert third.cosine_min == pytest.approx(-1.0)
    assert third.cosine_mean == pytest.approx(0.0)
    assert third.max_abs == 2 * np.abs(values[:, 2].astype("f8")).max()
    assert f"{2.0:10.4g}" in diff(a, b).describe()


def test_a_tolerance_is_relative_to_the_largest_value_of_the_layer(make, tmp_path):
    blocks = {"embedded": make.BLOCKS["embedded"]}
    one = make.entry("embedded", "ig")
    values = np.full((2, 7), 4.0, "f4")
    moved = values.copy()
    moved[0, 0] = 3.0
    a, b = (
        made(make, tmp_path / f"{name}.h5", [with_values(one, {"values": v})], blocks=blocks)
        for name, v in (("a", values), ("b", moved))
    )
    found = diff(a, b, rtol=0.25)
    assert found.within(0.25) and not found.within(0.2499)
    assert found.blocks["embedded"].layers[0].layer is None
    assert "is within a relative tolerance of 0.25" in found.describe()
    assert "is not within a relative tolerance of 0.2" in diff(a, b, rtol=0.2).describe()
    assert found.to_json()["within"] is True and diff(a, b).to_json()["within"] is None


def test_entries_texts_blocks_and_classes_of_one_side(make, tmp_path):
    answers, layers = make.BLOCKS["answers"], make.BLOCKS["layers"]
    own = BlockSpec("texts", {"model": "org/other", "max_new_tokens": 8})
    one = make.entry("answers", "ig")
    a = made(
        make,
        tmp_path / "a.h5",
        [one, make.entry("answers", "basophil", 3), make.entry("attributes", "ig")],
        blocks={"answers": answers, "attributes": make.BLOCKS["attributes"]},
    )
    b = made(
        make,
        tmp_path / "b.h5",
        [with_values(one, {"text": "other", "prompt_tokens": 1}), make.entry("layers", "ig")],
        blocks={"answers": answers, "layers": layers},
        classes=make.CLASSES[1:],
    )
    found = diff(a, b)
    assert (found.blocks_a, found.blocks_b) == (("attributes",), ("layers",))
    block = found.blocks["answers"]
    assert block.texts == ("ig/0/text", "ig/0/prompt_tokens")
    assert block.only_a == ("basophil/3",)
    assert [(change.at, change.only) for change in found.fields] == [("class table.basophil", "a")]
    text = found.describe()
    for line in (
        "texts that differ: ig/0/text",
        "block layers: only in b",
        "only in a: basophil/3",
    ):
        assert line in text
    c = made(make, tmp_path / "c.h5", [one], blocks={"answers": own})
    block = diff(c, b).blocks["answers"]
    assert [change.at for change in block.spec] == ["spec.model"]
    assert block.different == ("ig/0",)
    block = diff(c, a).blocks["answers"]
    assert (block.equal, block.different) == (1, ())
    assert not block.within(1.0)


def test_arrays_that_cannot_be_compared(make, tmp_path):
    blocks = {"layers": make.BLOCKS["layers"]}
    fewer = {"layers": BlockSpec("states", {"model": "org/name", "bits": 4}, "f4", (2, 7), 5)}
    wider = {"layers": BlockSpec("states", {"model": "org/name", "bits": 4}, "f2", (1, 2, 30), 4)}
    one = make.entry("layers", "ig", rows=2)
    values = one.values["values"]
    a = made(make, tmp_path / "a.h5", [one], blocks=blocks)
    b = made(make, tmp_path / "b.h5", [make.entry("layers", "ig", rows=3)], blocks=blocks)
    assert diff(a, b).blocks["layers"].uncomparable == ("ig/0",)
    assert not diff(a, b).within(9.0)
    picked = with_values(one, {"values": values[:, [1, 2]]})
    c = made(make, tmp_path / "c.h5", [picked], blocks=fewer)
    (layer,) = diff(a, c).blocks["layers"].layers  # layer 2 is the one they share
    assert (layer.layer, layer.max_abs) == (2, 0.0)
    d = made(make, tmp_path / "d.h5", [with_values(one, {"values": values[..., :4]})], blocks=wider)
    assert diff(a, d).blocks["layers"].uncomparable == ("ig/0",)


def test_damage_is_refused(make, sealed, tmp_path):
    bad = tmp_path / "bad.h5"
    raw = bytearray(sealed.read_bytes())
    raw[make.body_of(sealed)["layout"]["layers__values"]] ^= 1
    bad.write_bytes(raw)
    with pytest.raises(CacheFormatError, match=r"bad\.h5: dataset layers__values is damaged"):
        diff(sealed, bad)


def test_merged_recipes_are_compared_part_by_part(make, tmp_path):
    for name, recipes in {"a": [{"seed": 1}, {"seed": 2}], "b": [{"seed": 2}, {"seed": 3}]}.items():
        make.cache_at(tmp_path / f"{name}.h5", recipe={"merged": recipes})
    found = diff(tmp_path / "a.h5", tmp_path / "b.h5")
    assert sorted((c.only, c.a or c.b) for c in found.fields if c.only) == [
        ("a", {"seed": 1}),
        ("b", {"seed": 3}),
    ]
    assert len(found.fields) == 2
