"""What a run on an aligned backbone may train on and be evaluated on."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from cache.errors import DataError, ModelError
from cache.recipe import validate
from prompt_tune import align_run
from prompt_tune.align import AlignSpec
from prompt_tune.align_run import align_data
from prompt_tune.backbone import BackboneSpec, load_backbone
from prompt_tune.compare import compare_runs
from prompt_tune.data.few_shot import few_shot
from prompt_tune.data.source import load_data
from prompt_tune.evaluation import evaluate
from prompt_tune.recipe import TuneRecipe
from prompt_tune.setup import prepare
from prompt_tune.tuning import tune


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, toy: ModuleType, tiny_models: ModuleType
) -> Iterator[SimpleNamespace]:
    """Images, two towers, and a backbone aligned on two shots of each class."""
    base = tmp_path_factory.mktemp("aligned-runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VADEMECUM_HOME", str(base / "home"))
        found = SimpleNamespace(
            base=base,
            data=str(toy.images(base / "images")),
            classes=toy.CLASSES,
            towers={
                "image": {"folder": str(tiny_models.tiny_clip(base / "image", layers=1))},
                "text": {"folder": str(tiny_models.tiny_sentence_encoder(base / "text"))},
            },
        )
        found.aligned = align(found, "aligned")
        yield found


def align(world: SimpleNamespace, name: str, *, data: str | None = None, **changes: Any) -> Path:
    fields = world.towers | {
        "templates": ["this is {}."], "samples": {"shots": 2}, "context_length": 32, "steps": 3,
    } | changes  # fmt: skip
    spec = AlignSpec.model_validate_json(json.dumps(fields))
    return align_data(spec, data=data or world.data, out=world.base / name, device="cpu").folder


def recipe_on(backbone: Path, *, key: str = "aligned", **changes: Any) -> TuneRecipe:
    fields = {"backbone": {key: str(backbone)}, "method": {"name": "zero-shot"}} | changes
    return validate(TuneRecipe, fields, where="test")


def prepared(world: SimpleNamespace, recipe: TuneRecipe, data: str | None = None) -> Any:
    return prepare(recipe, data=data or world.data, knowledge=None, samples=None)


def test_a_folder_with_a_record_is_aligned_by_whichever_key_it_is_named(
    world: SimpleNamespace,
) -> None:
    named = load_backbone(BackboneSpec(aligned=str(world.aligned)))
    as_folder = load_backbone(BackboneSpec(folder=str(world.aligned)))
    assert as_folder.fingerprint == named.fingerprint
    assert as_folder.notes == named.notes
    assert "6 train images of 3 classes" in as_folder.notes["alignment"]
    assert as_folder.alignment == named.alignment is not None
    with pytest.raises(ModelError, match="not a folder made by `vademecum align`"):
        load_backbone(BackboneSpec(aligned=str(world.base / "image")))


@pytest.mark.parametrize("key", ["aligned", "folder"])
def test_alignment_on_the_runs_own_sample_or_fewer_is_allowed(
    world: SimpleNamespace, key: str
) -> None:
    for samples in ({"shots": 2}, {"shots": 3}, {"shots": None}):
        setup = prepared(world, recipe_on(world.aligned, key=key, samples=samples))
        assert setup.backbone.alignment is not None
        assert set(setup.backbone.alignment.samples.digests) <= set(setup.train.digests)


@pytest.mark.parametrize("key", ["aligned", "folder"])
@pytest.mark.parametrize("samples", [{"shots": 1}, {"shots": 2, "seed": 2}], ids=["fewer", "seed"])
def test_alignment_beyond_a_few_shot_sample_is_refused(
    world: SimpleNamespace, key: str, samples: dict[str, int]
) -> None:
    match = r"alignment saw an image that this run does not train on; found train/\d+\. Align with"
    with pytest.raises(DataError, match=match):
        prepared(world, recipe_on(world.aligned, key=key, samples=samples))


def test_alignment_on_another_split_is_refused(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, match in (
        ("val", r"alignment saw a held-out image, as val/\d+"),
        ("test", r"alignment saw an image that this run does not train on; found test/\d+"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(align_run, "TRAIN", split)
            leak = align(world, f"leak-{split}")
        with pytest.raises(DataError, match=match):
            prepared(world, recipe_on(leak))


def twin(world: SimpleNamespace, tmp_path: Path, toy: ModuleType, split: str) -> str:
    """The same data, but the last image of a split is one that alignment saw."""
    data = str(toy.images(tmp_path / "images"))
    source = load_data(data)
    seen = few_shot(source["train"], 2, 1).indices[-1]
    Image.open(source["train"].files[seen]).save(source[split].files[-1])
    return data


def test_a_run_is_not_evaluated_where_alignment_saw_an_image_even_outside_the_part(
    world: SimpleNamespace, tmp_path: Path, toy: ModuleType
) -> None:
    data = twin(world, tmp_path, toy, "test")
    tune(recipe_on(world.aligned), data=data, out=tmp_path / "run")
    assert evaluate(tmp_path / "run", split="val", resamples=10).result["images"] == 6
    match = r"alignment saw a held-out image, as train/\d+"
    for part in (None, 3):
        with pytest.raises(DataError, match=match):
            evaluate(tmp_path / "run", part=part, resamples=10)
    assert not (tmp_path / "run" / "eval" / "test-3").exists()
    with pytest.raises(DataError, match=match):
        prepared(world, recipe_on(world.aligned), twin(world, tmp_path / "val", toy, "val"))


def test_base_classes_serve_a_run_on_novel_ones(world: SimpleNamespace) -> None:
    """Alignment on base classes alone; classes the run does not have are left aside."""
    base, novel = list(world.classes[:2]), list(world.classes[1:])
    aligned = align(world, "base", classes=base)
    prepared(world, recipe_on(aligned, classes=novel, samples={"shots": 2}))
    prepared(world, recipe_on(world.aligned, classes=base, samples={"shots": 2}))
    with pytest.raises(DataError, match="this run does not train on"):
        prepared(world, recipe_on(world.aligned, classes=base, samples={"shots": 1}))
    record = load_backbone(BackboneSpec(aligned=str(aligned))).alignment
    assert record is not None
    record.check_disjoint((), [world.classes[2]])
    with pytest.raises(DataError, match=f"saw the held-out class {world.classes[1]!r}"):
        record.check_disjoint((), novel)


def test_another_data_set_is_left_aside_unless_an_image_is_held_out(
    world: SimpleNamespace, tmp_path: Path, toy: ModuleType
) -> None:
    data = Path(toy.images(tmp_path / "images"))
    data.write_text(data.read_text().replace(toy.DATASET, "other-cells"))
    prepared(world, recipe_on(world.aligned, samples={"shots": 1}), str(data))
    other = Path(twin(world, tmp_path / "twin", toy, "val"))
    other.write_text(other.read_text().replace(toy.DATASET, "other-cells"))
    with pytest.raises(DataError, match="alignment saw a held-out image"):
        prepared(world, recipe_on(world.aligned), str(other))


@pytest.mark.parametrize("change", [{"ids": ["train/0"]}, {"classes": [{"id": "a", "name": "a"}]}])
def test_a_record_whose_parts_do_not_fit_is_damaged(
    world: SimpleNamespace, tmp_path: Path, change: dict[str, object]
) -> None:
    record = json.loads((world.aligned / "alignment.json").read_text()) | change
    (tmp_path / "alignment.json").write_text(json.dumps(record))
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).symlink_to(world.aligned / name)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (world.aligned / name).exists():
            (tmp_path / name).symlink_to(world.aligned / name)
    with pytest.raises(ModelError, match=r"alignment\.json: the alignment record is damaged"):
        load_backbone(BackboneSpec(folder=str(tmp_path)))


def test_the_zero_shot_row_says_that_it_was_aligned(world: SimpleNamespace, tmp_path: Path) -> None:
    for name, recipe in (
        ("zero", recipe_on(world.aligned, key="folder")),
        ("ensemble", recipe_on(world.aligned, method={"name": "zero-shot", "ensemble": True})),
        ("plain", recipe_on(world.base / "image", key="folder")),
        ("probe", recipe_on(world.aligned, method={"name": "linear-probe"})),
    ):
        tune(recipe, data=world.data, out=tmp_path / name)
        evaluate(tmp_path / name, resamples=10)
    folders = [tmp_path / name for name in ("zero", "ensemble", "plain", "probe")]
    labels = [row["label"] for row in compare_runs(folders, split="test").rows]
    assert labels == [
        "zero-shot, aligned", "zero-shot, ensemble, aligned", "zero-shot", "linear-probe",
    ]  # fmt: skip
