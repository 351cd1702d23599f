"""Backbones from folders, files and the hub's local copy, and every refusal."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache.errors import ModelError, RecipeError
from cache.recipe import validate
from prompt_tune.backbone import BackboneSpec, load_backbone
from prompt_tune.hub_files import hub_errors
from prompt_tune.open_clip_files import architecture

WEIGHTS = "open_clip_model.safetensors"
KINDS = ["tiny_clip", "tiny_biomedclip", "tiny_assembled"]


@pytest.fixture(scope="module")
def folders(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("backbones")
    return {kind: getattr(tiny_models, kind)(base / kind) for kind in KINDS}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """An assembled backbone that a test may damage."""
    return Path(shutil.copytree(folders["tiny_assembled"], tmp_path / "copy"))


def loaded(folder: Path):
    return load_backbone(BackboneSpec(folder=str(folder)))


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_open_clip(folders: dict[str, Path], kind: str) -> None:
    import open_clip

    backbone = loaded(folders[kind])
    model = open_clip.create_model(f"local-dir:{folders[kind]}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folders[kind]}")
    texts = ["a photo of a basophil.", "immature granulocytes"]
    images = torch.randn(2, 3, *[backbone.preprocess.image_size] * 2)
    with torch.no_grad():
        assert torch.allclose(
            backbone.text.encode_texts(texts), model.encode_text(tokenizer(texts)), atol=1e-5
        )
        assert torch.allclose(backbone.image.encode(images), model.encode_image(images), atol=1e-5)
    assert backbone.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert backbone.embed_dim == 24
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not any(m.training for m in backbone.model.modules())


def test_loading_leaves_the_generator_alone(folders: dict[str, Path]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loaded(folders["tiny_clip"])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_folder_is_the_same_backbone(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """The saved configuration names the old folder, which is gone."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(folders[kind], moved)
    config = moved / "open_clip_config.json"
    config.write_text(config.read_text().replace(str(folders[kind]), "/nowhere/old"))
    here, there = loaded(folders[kind]), loaded(moved)
    assert there.fingerprint == here.fingerprint
    assert there.image_fingerprint == here.image_fingerprint
    assert str(tmp_path) not in json.dumps(there.notes) + there.name


def test_the_fingerprint_covers_every_weight(copy: Path) -> None:
    before = loaded(copy)

    def nudge(state: dict[str, torch.Tensor]) -> None:
        state["text.transformer.encoder.layer.0.attention.self.query.bias"][0] += 1e-6

    rewrite(copy, nudge)
    after = loaded(copy)
    assert after.fingerprint != before.fingerprint
    assert after.image_fingerprint == before.image_fingerprint


def test_the_image_fingerprint_covers_tower_and_preprocessing(copy: Path) -> None:
    before = loaded(copy)
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"][0] += 0.01
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    other_mean = loaded(copy)

    def nudge(state: dict[str, torch.Tensor]) -> None:
        state["visual.ln_post.bias"][0] += 1e-6

    rewrite(copy, nudge)
    seen = {before.image_fingerprint, other_mean.image_fingerprint, loaded(copy).image_fingerprint}
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "num_attention_heads", 8),
        ("config.json", "layer_norm_eps", 1e-5),
        ("open_clip_config.json", "quick_gelu", False),
    ],
)
def test_the_fingerprint_covers_the_configuration(
    copy: Path, file: str, key: str, value: object
) -> None:
    before = loaded(copy).fingerprint
    config = json.loads((copy / file).read_text())
    (config.get("model_cfg", config))[key] = value
    (copy / file).write_text(json.dumps(config))
    assert loaded(copy).fingerprint != before


def test_the_fingerprint_covers_the_tokenizer(copy: Path) -> None:
    before = loaded(copy).fingerprint
    text = (copy / "tokenizer.json").read_text()
    swapped = text.replace('"basophil":', '"@":', 1).replace('"monocyte":', '"basophil":', 1)
    (copy / "tokenizer.json").write_text(swapped.replace('"@":', '"monocyte":', 1))
    assert loaded(copy).fingerprint != before


def test_with_model_gives_new_towers_and_fingerprints(folders: dict[str, Path]) -> None:
    import copy as copies

    backbone = loaded(folders["tiny_assembled"])
    model = copies.deepcopy(backbone.model)
    same = backbone.with_model(model, note="copied")
    assert same.fingerprint == backbone.fingerprint
    with torch.no_grad():
        model.visual.proj.mul_(2.0)
    changed = backbone.with_model(model, note="doubled")
    assert changed.fingerprint != backbone.fingerprint
    assert changed.image_fingerprint != backbone.image_fingerprint
    assert changed.notes["changed"] == "doubled"
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(changed.image.encode(image), 2 * backbone.image.encode(image))


def test_architecture_and_weights(tmp_path: Path) -> None:
    """`arch` reads open_clip's table; the weights are those of a smallest real architecture."""
    import open_clip

    name = "ViT-S-32-alt"
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors"
    )
    spec = BackboneSpec(arch=name, weights=str(tmp_path / "w.safetensors"))
    backbone = load_backbone(spec)
    assert backbone.text.kind == "causal"
    assert backbone.embed_dim == architecture(name)["embed_dim"]
    assert backbone.notes == {"source": f"{name} + w.safetensors"}
    for name_, value in model.state_dict().items():
        assert torch.equal(backbone.model.state_dict()[name_], value)


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({}, "exactly one place; found none, wanted hub or arch or folder or aligned"),
        ({"hub": "a/b", "folder": "f"}, "exactly one place; found hub and folder"),
        ({"arch": "ViT-B-16"}, "weights file go together; found only arch"),
        ({"folder": "f", "weights": "w"}, "weights file go together; found only weights"),
        ({"folder": "f", "revision": "main"}, "a revision belongs to a hub model"),
        ({"fodler": "f"}, "unknown key 'fodler'. Did you mean 'folder'?"),
    ],
)
def test_wrong_recipes(recipe: dict[str, str], text: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(text)):
        validate(BackboneSpec, recipe, where="backbone")


def refusal(spec: BackboneSpec, text: str) -> None:
    with pytest.raises(ModelError, match=text) as caught:
        load_backbone(spec)
    assert "\n" not in str(caught.value)


def test_unknown_architecture_names_the_nearest(tmp_path: Path) -> None:
    spec = BackboneSpec(arch="ViT-B-16-quickgelo", weights=str(tmp_path / "w"))
    refusal(
        spec, "unknown open_clip architecture 'ViT-B-16-quickgelo'. Nearest: ViT-B-16-quickgelu"
    )


def test_missing_files(copy: Path, tmp_path: Path) -> None:
    refusal(BackboneSpec(folder=str(tmp_path / "none")), "none: no such backbone folder")
    refusal(BackboneSpec(arch="ViT-B-16", weights=str(tmp_path / "w")), "w: no such weights file")
    refusal(BackboneSpec(aligned=str(copy)), "not a folder made by `vademecum align`")
    (copy / WEIGHTS).unlink()
    refusal(BackboneSpec(folder=str(copy)), "the backbone folder holds no weights")
    (copy / "open_clip_config.json").write_text("{}")
    refusal(BackboneSpec(folder=str(copy)), "not an open_clip configuration; wanted model_cfg")
    (copy / "open_clip_config.json").unlink()
    refusal(BackboneSpec(folder=str(copy)), "the backbone folder holds no open_clip_config.json")


def test_missing_tokenizer(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/nothing"
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    refusal(BackboneSpec(folder=str(copy)), "nobody/nothing: .*later runs work offline")


def test_tensors_that_do_not_fit(copy: Path) -> None:
    rewrite(copy, lambda state: state.update(extra=torch.zeros(1)))
    refusal(BackboneSpec(folder=str(copy)), r"do not fit the model; found 1 unexpected \(extra\)")
    rewrite(copy, lambda state: (state.pop("extra"), state.pop("visual.proj")))
    refusal(BackboneSpec(folder=str(copy)), r"found 1 missing \(visual.proj\)")
    rewrite(copy, lambda state: state.update({"visual.proj": torch.zeros(3, 4)}))
    refusal(
        BackboneSpec(folder=str(copy)),
        r"the tensor visual.proj has another shape; found \[3, 4\], wanted \[32, 24\]",
    )


def test_position_embeddings_are_not_resized_silently(copy: Path) -> None:
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 64
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    refusal(BackboneSpec(folder=str(copy)), "the tensor visual.positional_embedding has another")


def test_damaged_and_unsafe_weights(copy: Path, tmp_path: Path) -> None:
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[: len(data) // 2])
    refusal(BackboneSpec(folder=str(copy)), "the weights are damaged or not safetensors")
    (copy / WEIGHTS).unlink()
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"w": Malicious()}, copy / "open_clip_pytorch_model.bin")
    refusal(BackboneSpec(folder=str(copy)), "a pickle that holds more than tensors. Convert them")
    assert not marker.exists()


def test_a_pickle_of_tensors_alone_loads(copy: Path) -> None:
    before = loaded(copy).fingerprint
    torch.save(load_file(copy / WEIGHTS), copy / "open_clip_pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    assert loaded(copy).fingerprint == before


def test_unknown_format(copy: Path) -> None:
    weights = copy.parent / "w.npz"
    weights.write_bytes(b"")
    spec = BackboneSpec(arch="ViT-B-16", weights=str(weights))
    refusal(spec, "w.npz: weights of an unknown format; found .npz, wanted safetensors")


def test_captioning_model_and_nonsense_are_refused(copy: Path) -> None:
    config = json.loads((copy / "open_clip_config.json").read_text())
    nonsense = config | {"model_cfg": config["model_cfg"] | {"widht": 3}}
    (copy / "open_clip_config.json").write_text(json.dumps(nonsense))
    refusal(BackboneSpec(folder=str(copy)), "open_clip cannot build this configuration .*widht")
    config["model_cfg"]["multimodal_cfg"] = {}
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    refusal(BackboneSpec(folder=str(copy)), "a captioning model is not a backbone")


@pytest.fixture
def hub_copy(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model in the hub client's local copy, as it lies there after a download."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--clinic--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folders["tiny_clip"], home / "snapshots" / commit)
    return commit


def test_hub_model_offline(hub_copy: str, folders: dict[str, Path]) -> None:
    backbone = load_backbone(BackboneSpec(hub="clinic/tiny"))
    assert backbone.name == "clinic/tiny"
    assert backbone.notes == {"source": f"clinic/tiny at {hub_copy}"}
    assert backbone.fingerprint == loaded(folders["tiny_clip"]).fingerprint
    pinned = load_backbone(BackboneSpec(hub="clinic/tiny", revision=hub_copy))
    assert pinned.fingerprint == backbone.fingerprint


def test_absent_hub_model_offline(hub_copy: str) -> None:
    do = r"later runs work offline"
    refusal(BackboneSpec(hub="clinic/absent"), f"clinic/absent: .*{do}")
    refusal(BackboneSpec(hub="clinic/tiny", revision="v9"), f"clinic/tiny: .*{do}")
    refusal(BackboneSpec(hub="clinic//tiny"), "not the name of a hub model")


def test_what_the_hub_refuses_is_one_line() -> None:
    from types import SimpleNamespace

    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None, status_code=403)
    for kind, text in (
        (errors.GatedRepoError, "m: the model is gated. Accept its terms"),
        (errors.RepositoryNotFoundError, "m: the hub has no such model, or it is private"),
        (errors.RevisionNotFoundError, "m: the hub model has no such revision"),
        (errors.HfHubHTTPError, "m: the model is not here and cannot be fetched"),
    ):
        with pytest.raises(ModelError, match=text), hub_errors("m"):
            raise kind("refused", response=response)
