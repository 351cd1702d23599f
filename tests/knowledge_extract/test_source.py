"""Finding a model, and the one line when it is not there."""

import importlib
import importlib.util
import json
import shutil

import gguf
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

import knowledge_extract
from cache.errors import MissingExtraError, ModelError, RecipeError, SystemRefusedError
from cache.recipe import validate
from knowledge_extract import source as sources
from knowledge_extract.gguf import Conversion, kept_dtype
from knowledge_extract.model import as_language_model, load_model, pick_device
from knowledge_extract.recipe import ModelRecipe
from knowledge_extract.settings import RunSettings

CPU = RunSettings(device="cpu", offline=True)


def find(**fields):
    return sources.find(validate(ModelRecipe, fields, where="recipe"), CPU)


def test_a_folder_is_its_base_name_and_the_digests_of_its_files(model_folder, tmp_path):
    folder = model_folder("llama")
    found = find(folder=str(folder))
    assert found.identity["name"] == folder.name
    assert str(folder.parent) not in json.dumps(found.identity)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(found.identity["files"])

    copy = shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    assert find(folder=str(copy)).identity == found.identity
    (copy / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    other = find(folder=str(copy))
    assert other.model_digest == found.model_digest
    assert other.tokenizer_digest != found.tokenizer_digest


@pytest.mark.parametrize(
    ("absent", "match"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer*", "has no tokenizer"),
    ],
)
def test_a_folder_that_lacks_something(model_folder, tmp_path, absent, match):
    copy = shutil.copytree(model_folder("llama"), tmp_path / "copy")
    for path in copy.glob(absent):
        path.unlink()
    with pytest.raises(ModelError, match=match):
        find(folder=str(copy))


def test_no_such_folder(tmp_path):
    with pytest.raises(ModelError, match=r"absent: no such model folder. Point model.folder"):
        find(folder=str(tmp_path / "absent"))


def test_weights_that_are_not_weights(model_folder, tmp_path):
    copy = shutil.copytree(model_folder("llama"), tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="copy: the model cannot be loaded; found"):
        load_model(find(folder=str(copy)), "none", "float32", 2, CPU)


def test_a_weight_that_is_missing_is_not_made_up(model_folder, tmp_path):
    copy = shutil.copytree(model_folder("llama"), tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    match = "copy: 1 weights are missing; found model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=match):
        load_model(find(folder=str(copy)), "none", "float32", 2, CPU)


def test_gguf_files_that_are_none(tmp_path):
    with pytest.raises(ModelError, match=r"no such GGUF file. Check model.gguf."):
        find(gguf=str(tmp_path / "absent.gguf"))
    (tmp_path / "x.gguf").write_bytes(b"PK\3\4")
    with pytest.raises(ModelError, match=r"not a GGUF file; found b'PK\\x03\\x04'"):
        find(gguf=str(tmp_path / "x.gguf"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    run = RunSettings(models=tmp_path / "models")
    found = sources.from_gguf(tmp_path / "x.gguf", run.models)
    with pytest.raises(ModelError, match="this GGUF file cannot be converted"):
        found.weights()
    assert not list((tmp_path / "models").glob("*/*"))  # nothing half-converted


@pytest.mark.parametrize(
    ("kind", "wanted"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
)
def test_gguf_matrices_keep_their_precision(tmp_path, kind, wanted):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("norm", np.ones(32, np.float32))
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    matrix = np.ones((32, 32), kinds[kind])
    if kind == "BF16":
        writer.add_tensor("w", matrix.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor("w", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert kept_dtype(path) == wanted


def test_offline_and_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no/where: revision 'main' is not on this machine") as no:
        find(hub="no/where")
    assert "give model.folder or model.gguf" in str(no.value)


def response(status):
    # The hub's own HTTP library, which has been renamed once.
    http = importlib.import_module(hub.Response.__module__.partition(".")[0])
    return http.Response(status, request=http.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (hub.GatedRepoError("x", response=response(403)), "no/where: the model is gated. Accept"),
        (hub.RepositoryNotFoundError("x", response=response(404)), "no such model on the hub"),
        (hub.RevisionNotFoundError("x", response=response(404)), "no revision 'main'"),
        (hub.RemoteEntryNotFoundError("x", response=response(404)), "has no config.json"),
        (hub.OfflineModeIsEnabled("x"), "is not on this machine"),
        (hub.HfHubHTTPError("five hundred", response=response(500)), "refused; found five hundred"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch, error, match):
    def refuse(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match=match):
        find(hub="no/where")


def test_a_revision_becomes_a_commit(monkeypatch, tmp_path):
    commit = "a" * 40
    place = tmp_path / "snapshots" / commit / "config.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_a, **_k: str(place))
    found = find(hub="some/model")
    assert found.identity == {"source": "hub", "name": "some/model", "commit": commit}
    assert found.hub_options() == {"revision": commit, "local_files_only": True}


def test_weights_of_a_hub_model_are_fetched_once_and_only_what_is_needed(monkeypatch):
    files = ["config.json", "model-1.safetensors", "model-2.safetensors", "onnx/a.safetensors"]
    files += ["pytorch_model.bin", "model.safetensors.index.json"]
    fetched, here = [], {"model-1.safetensors"}
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_a, **_k: files)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda _n, f, **_k: f if f in here else None
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _n, f, **_k: fetched.append(f))
    found = sources.ModelSource("a/b", {}, "", "", place="a/b", commit="c" * 40)
    assert found.weights() == "a/b"
    assert fetched == ["model-2.safetensors"]
    here.add("model-2.safetensors")
    found.weights()
    assert fetched == ["model-2.safetensors"]

    def refuse(*_args, **_kwargs):
        raise hub.HfHubHTTPError("five hundred", response=response(500))

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(ModelError, match="a/b: the weights cannot be fetched; found five hundred"):
        found.weights()


def absent(monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a)
    )


def test_a_machine_without_the_stage_s_packages(monkeypatch):
    absent(monkeypatch, "transformers")
    match = r"reading a language model needs the package 'transformers'.* -e '.\[extract\]'"
    with pytest.raises(MissingExtraError, match=match):
        knowledge_extract.extract  # noqa: B018 - the attribute is what is tested
    assert knowledge_extract.RunSettings is RunSettings


def test_a_machine_without_gguf(monkeypatch, tmp_path):
    absent(monkeypatch, "gguf")
    with pytest.raises(MissingExtraError, match="reading a GGUF file needs the package 'gguf'"):
        Conversion(tmp_path / "x.gguf", tmp_path / "models").weights()


@pytest.mark.parametrize("quantisation", ["nf4", "fp4", "int8"])
def test_a_missing_extra_is_named(model_folder, monkeypatch, quantisation):
    absent(monkeypatch, "bitsandbytes")
    match = f"quantisation '{quantisation}' needs the package 'bitsandbytes'.*pip install"
    with pytest.raises(MissingExtraError, match=match):
        load_model(find(folder=str(model_folder())), quantisation, "float32", 2, CPU)


def test_a_device_that_is_not_there():
    with pytest.raises(SystemRefusedError, match="the device 'cuda:7' cannot be used"):
        pick_device("cuda:7")
    match = "^--device: no such device; found 'gpu', wanted cpu, cuda, cuda:N or auto$"
    with pytest.raises(RecipeError, match=match):
        pick_device("gpu")


def test_layers_that_are_not_found():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration: the decoder layers of this"):
        as_language_model(T5ForConditionalGeneration(config), 0, "none")
