"""Alignment makes a backbone out of two towers, and sees only what the protocol allows."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from cache.errors import DataError, ModelError, RecipeError, RunError, StorageError
from prompt_tune import align_run
from prompt_tune.align import AlignSpec, pooled_captions
from prompt_tune.align_run import align_data, load_align_recipe
from prompt_tune.alignment_record import alignment_record
from prompt_tune.backbone import BackboneSpec, load_backbone
from prompt_tune.data.few_shot import few_shot
from prompt_tune.data.source import load_data

IDS = ("basophil", "monocyte", "platelet", "polyp")
BASE = IDS[:3]


@pytest.fixture(scope="module")
def towers(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("towers")
    image = tiny_models.tiny_clip(base / "image", layers=2)
    text = tiny_models.tiny_sentence_encoder(base / "text")
    return {"image": str(image), "text": str(text)}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))


def write_data(folder: Path, *, held_out_salt: int = 0) -> str:
    """Coloured noise, one colour per class; the salt changes val, test and the last class only."""
    folder.mkdir(parents=True)
    arrays = {}
    for number, (split, n) in enumerate({"train": 8, "val": 3, "test": 5}.items()):
        labels = np.repeat(np.arange(4), n)
        pixels = np.zeros((4 * n, 28, 28, 3), dtype=np.uint8)
        for k in range(4):
            held_out = split != "train" or k == 3
            rng = np.random.default_rng([number, k, held_out_salt if held_out else 0])
            colour = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]][k])
            noise = rng.integers(-40, 40, (n, 28, 28, 3))
            pixels[labels == k] = (colour + noise).clip(0, 255).astype(np.uint8)
        arrays |= {f"{split}_images": pixels, f"{split}_labels": labels[:, None]}
    np.savez(folder / "toy.npz", **arrays)
    declaration = {
        "dataset": "toy",
        "path": "toy.npz",
        "layout": "npz",
        "classes": [{"id": i, "name": i} for i in IDS],
        "template": "a photo of a {}.",
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(declaration))
    return str(folder / "toy.yaml")


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_data(tmp_path / "data")


def spec_of(towers: dict[str, str], **changes: object) -> AlignSpec:
    plain = {
        "image": {"folder": towers["image"]},
        "text": {"folder": towers["text"]},
        "templates": ["an image of {}.", "this is {}."],
        "samples": {"shots": 4, "seed": 3},
        "context_length": 64,
        "steps": 60,
        "lr": 0.01,
        **changes,
    }
    return AlignSpec.model_validate_json(json.dumps(plain))


def test_makes_a_backbone_that_loads(towers: dict[str, str], data: str, tmp_path: Path) -> None:
    result = align_data(spec_of(towers), data=data, out=tmp_path / "aligned")
    assert result.made
    assert "not zero-shot on those classes" in result.describe()
    backbone = load_backbone(BackboneSpec(aligned=str(tmp_path / "aligned")))
    assert backbone.text.kind == "bert"
    assert backbone.logit_scale == pytest.approx(100.0, rel=1e-5)
    assert "16 train images of 4 classes of toy" in backbone.notes["alignment"]

    source = load_data(data)
    test = source["test"]
    images = torch.stack([backbone.preprocess(test.image(i)) for i in range(len(test))])
    text = backbone.text.encode_texts([source.template.format(c.name) for c in source.classes])
    with torch.no_grad():
        found = F.normalize(backbone.image.encode(images), dim=-1) @ F.normalize(text, dim=-1).T
    accuracy = (found.argmax(1).numpy() == test.labels).mean()
    assert accuracy > 0.6  # chance is 0.25


def test_both_towers_stay_as_they_were(towers: dict[str, str], data: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    align_data(spec_of(towers), data=data, out=tmp_path / "aligned")
    found = load_file(tmp_path / "aligned" / "open_clip_model.safetensors")
    image = load_file(Path(towers["image"]) / "open_clip_model.safetensors")
    text = load_file(Path(towers["text"]) / "model.safetensors")
    left = dict(found)
    for name, value in image.items():
        if name.startswith("visual."):
            assert torch.equal(left.pop(name), value)
    for name, value in text.items():
        if not name.startswith("pooler."):
            assert torch.equal(left.pop(f"text.transformer.{name}"), value)
    assert set(left) == {"logit_scale", "text.proj.weight"}


def test_pooled_captions_are_the_text_tower_before_its_projection(
    towers: dict[str, str], data: str, tmp_path: Path
) -> None:
    align_data(spec_of(towers, steps=1), data=data, out=tmp_path / "aligned")
    backbone = load_backbone(BackboneSpec(aligned=str(tmp_path / "aligned")))
    captions = ["basophil", "a photo of a large dark cell with granules."]
    pooled = pooled_captions(backbone.model, backbone.tokenizer, captions)
    weight = backbone.model.get_parameter("text.proj.weight")
    assert torch.allclose(pooled @ weight.T, backbone.text.encode_texts(captions), atol=1e-5)


def test_the_sample_is_that_of_a_tuning_run(
    towers: dict[str, str], data: str, tmp_path: Path
) -> None:
    result = align_data(spec_of(towers), data=data, out=tmp_path / "aligned")
    tuned = few_shot(load_data(data)["train"], 4, 3)
    assert result.record.samples == tuned
    assert result.record.ids == tuple(load_data(data)["train"].ids[i] for i in tuned.indices)


def test_it_saw_no_held_out_image_or_class(
    towers: dict[str, str], data: str, tmp_path: Path
) -> None:
    source = load_data(data)
    align_data(spec_of(towers, classes=list(BASE)), data=data, out=tmp_path / "aligned")
    record = alignment_record(tmp_path / "aligned")
    assert tuple(c.id for c in record.classes) == BASE
    held_out = source["val"].digests + source["test"].digests
    novel = source["train"].select([3]).digests
    record.check_disjoint(held_out + novel, IDS[3:])


def test_negative_control_a_leak_is_found(
    towers: dict[str, str], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above fails where alignment is made to read the test split, or a novel class."""
    source = load_data(data)
    with monkeypatch.context() as patch:
        patch.setattr(align_run, "TRAIN", "test")
        align_data(spec_of(towers, classes=list(BASE)), data=data, out=tmp_path / "leak")
    leaked = alignment_record(tmp_path / "leak")
    with pytest.raises(DataError, match=r"alignment saw a held-out image, as test/\d+; found pix"):
        leaked.check_disjoint(source["test"].digests, IDS[3:])

    align_data(spec_of(towers), data=data, out=tmp_path / "all")
    seen = alignment_record(tmp_path / "all")
    seen.check_disjoint(source["test"].digests)
    with pytest.raises(DataError, match="alignment saw the held-out class 'polyp'"):
        seen.check_disjoint(source["test"].digests, IDS[3:])


def test_weights_do_not_depend_on_what_is_held_out(
    towers: dict[str, str], data: str, tmp_path: Path
) -> None:
    other = write_data(tmp_path / "salted", held_out_salt=9)
    spec = spec_of(towers, classes=list(BASE))
    results = [
        align_data(spec, data=d, out=tmp_path / f"aligned{i}") for i, d in enumerate((data, other))
    ]
    assert load_data(data)["test"].digest != load_data(other)["test"].digest
    assert results[0].record.weights == results[1].record.weights
    assert results[0].record.digest == results[1].record.digest
    everything = align_data(spec_of(towers), data=other, out=tmp_path / "everything")
    assert everything.record.weights != results[0].record.weights


def test_the_sample_list_is_part_of_the_fingerprint(
    towers: dict[str, str], data: str, tmp_path: Path
) -> None:
    aligned = tmp_path / "aligned"
    align_data(spec_of(towers), data=data, out=aligned)
    spec = BackboneSpec(aligned=str(aligned))
    before = load_backbone(spec)
    record = json.loads((aligned / "alignment.json").read_text())
    record["samples"]["digests"][0] = "0" * 64
    (aligned / "alignment.json").write_text(json.dumps(record))
    after = load_backbone(spec)
    assert after.fingerprint != before.fingerprint
    assert after.image_fingerprint == before.image_fingerprint
    (aligned / "alignment.json").unlink()
    plain = load_backbone(BackboneSpec(folder=str(aligned)))
    assert plain.fingerprint not in {before.fingerprint, after.fingerprint}


def test_again_does_nothing_and_another_recipe_is_refused(
    towers: dict[str, str], data: str, tmp_path: Path
) -> None:
    out = tmp_path / "aligned"
    first = align_data(spec_of(towers), data=data, out=out)
    stamps = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    again = align_data(spec_of(towers), data=data, out=out)
    assert (first.made, again.made) == (True, False)
    assert again.record == first.record
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == stamps
    changes: tuple[dict[str, object], ...] = (
        {"seed": 2},
        {"samples": {"shots": 3, "seed": 3}},
        {"templates": ["an image of {}."]},
        {"classes": list(BASE)},
    )
    for change in changes:
        with pytest.raises(RunError, match="aligned: the folder holds another alignment"):
            align_data(spec_of(towers, **change), data=data, out=out)


def test_repeatable_and_self_contained(
    towers: dict[str, str], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = {kind: shutil.copytree(path, tmp_path / kind) for kind, path in towers.items()}
    for n in (1, 2):
        monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / f"home{n}"))
        named = {kind: str(path) for kind, path in copies.items()}
        align_data(spec_of(named), data=data, out=tmp_path / f"aligned{n}")
    before = load_backbone(BackboneSpec(aligned=str(tmp_path / "aligned1")))
    for path in copies.values():
        shutil.rmtree(path)
    moved = (tmp_path / "aligned2").rename(tmp_path / "moved")
    assert load_backbone(BackboneSpec(aligned=str(moved))).fingerprint == before.fingerprint
    for file in moved.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_changed_weights_are_refused(towers: dict[str, str], data: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "aligned"
    align_data(spec_of(towers, steps=1), data=data, out=out)
    state = load_file(out / "open_clip_model.safetensors")
    state["text.proj.weight"][0, 0] += 1e-4
    save_file(state, out / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match="the weights are not those the alignment left"):
        load_backbone(BackboneSpec(aligned=str(out)))
    (out / "alignment.json").write_text("{")
    with pytest.raises(ModelError, match=r"alignment\.json: the alignment record is damaged"):
        load_backbone(BackboneSpec(aligned=str(out)))


def test_nothing_half_made_is_left(
    towers: dict[str, str], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    monkeypatch.setattr("prompt_tune.align.save_assembled", _no_space)
    with pytest.raises(StorageError, match="no space left"):
        align_data(spec_of(towers), data=data, out=place / "aligned")
    assert list(place.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file: a file stands where a folder should be"):
        align_data(spec_of(towers), data=data, out=tmp_path / "file" / "aligned")


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"templates": []}, "templates: alignment needs at least one template"),
        ({"templates": ["cell"]}, "a template holds {} exactly once; found 'cell'"),
        ({"templates": ["a photo of a {}."]}, "tested with is held apart from alignment; found"),
        ({"image": {}}, "image: a tower comes from exactly one place; found none, wanted asset"),
        ({"image": {"asset": "a", "folder": "f"}}, "exactly one place; found asset and folder"),
        ({"image": {"arch": "ViT-B-16"}}, "weights file go together. Set both arch and weights"),
        ({"text": {}}, "text: a tower comes from exactly one place; found none"),
        ({"context_length": 4096}, "has fewer positions; found 4096, wanted 512"),
    ],
)
def test_wrong_recipes(
    towers: dict[str, str], data: str, tmp_path: Path, changes: dict[str, object], text: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(text)):
        align_data(spec_of(towers, **changes), data=data, out=tmp_path / "aligned")
    assert not (tmp_path / "aligned").exists()


def test_what_is_missing_or_does_not_fit(towers: dict[str, str], data: str, tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str, **changes: object) -> None:
        with pytest.raises(kind, match=message):
            align_data(spec_of(towers, **changes), data=data, out=tmp_path / "aligned")

    refused(DataError, "no class 'polip'.* Did you mean 'polyp'", classes=["polip", "monocyte"])
    refused(DataError, "has too few images for 9 shots", samples={"shots": 9})
    refused(
        ModelError,
        "none: the sentence encoder's folder holds no config.json",
        text={"folder": str(tmp_path / "none")},
    )
    weights = str(tmp_path / "w.safetensors")
    refused(ModelError, "no such weights file", image={"arch": "ViT-B-16", "weights": weights})
    encoder = str(Path(towers["text"]) / "model.safetensors")
    refused(
        ModelError,
        "the weights do not fit the model; found 152 missing",
        image={"arch": "ViT-B-16", "weights": encoder},
    )
    (tmp_path / "aligned").mkdir()
    refused(RunError, "aligned: something else is there")


def test_presets_by_name() -> None:
    spec = load_align_recipe("clip-minilm", ("samples.shots=2", "seed=5"))
    assert (spec.image.asset, spec.text.asset) == ("clip-vit-b16-image", "minilm-l6-v2")
    assert (spec.samples.shots, spec.samples.seed, spec.seed) == (2, 1, 5)
    with pytest.raises(RecipeError, match=r"clip-minlm: no such .* Did you mean 'clip-minilm'"):
        load_align_recipe("clip-minlm")
    with pytest.raises(RecipeError, match=r"unknown key 'step'\. Did you mean 'steps'"):
        load_align_recipe("clip-minilm", ("step=3",))
