"""open_clip models from files: configuration, weights and tokenizer, and clear errors about them.

open_clip's own `create_model` takes the folder for granted that a model was trained in, resolves no
revision and says little about what does not fit; so its parts are called one by one.
"""

import copy
import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache.errors import ModelError
from prompt_tune.hub_files import hub_errors, hub_folder
from prompt_tune.preprocess import Preprocess

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "pytorch_model.bin",
)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
FORMATS = {".safetensors", ".bin", ".pt", ".pth"}


@dataclass(frozen=True)
class Source:
    """Everything a model is built from.

    Attributes:
        name: for tables; no path.
        config: open_clip's `model_cfg`.
        preprocess: open_clip's `preprocess_cfg`.
        weights: the file.
        folder: where tokenizer and text configuration may lie, if anywhere.
    """

    name: str
    config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path
    folder: Path | None = None
    notes: dict[str, str] = field(default_factory=dict)


def architectures() -> list[str]:
    """The architectures open_clip has a configuration for."""
    import open_clip

    return [str(name) for name in open_clip.list_models()]


def architecture(name: str) -> dict[str, Any]:
    """open_clip's configuration of a named architecture.

    Raises:
        ModelError: unknown; the nearest names are given.
    """
    from open_clip import get_model_config

    known = architectures()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        do = f"Nearest: {', '.join(near)}." if near else "See open_clip.list_models()."
        what = f"unknown open_clip architecture {name!r}"
        raise ModelError(what, do=do)
    config: dict[str, Any] = get_model_config(name)
    return config


def arch_source(arch: str, weights: Path) -> Source:
    """A named architecture with a weights file.

    Raises:
        ModelError: unknown architecture, or no such file.
    """
    config = architecture(arch)
    if not weights.is_file():
        what = "no such weights file"
        raise ModelError(what, where=weights, do="Check backbone.weights.")
    if weights.suffix not in FORMATS:
        what = "weights of an unknown format"
        raise ModelError(what, where=weights.name, found=weights.suffix, wanted="safetensors")
    return Source(arch, config, {}, weights, notes={"source": f"{arch} + {weights.name}"})


def folder_source(folder: Path) -> Source:
    """A folder as open_clip's `local-dir:` reads it.

    Raises:
        ModelError: no folder, no configuration or no weights in it.
    """
    if not folder.is_dir():
        what = "no such backbone folder"
        raise ModelError(what, where=folder, do="Check the path.")
    config, preprocess = _read_config(folder / CONFIG)
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        do = f"Put {WEIGHTS[0]} there."
        what = "the backbone folder holds no weights"
        raise ModelError(what, where=folder, do=do)
    notes = {"source": f"folder {folder.resolve().name}"}
    return Source(folder.resolve().name, config, preprocess, found[0], folder, notes)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config = stored["model_cfg"]
        _ = config["embed_dim"], config["vision_cfg"], config["text_cfg"]
    except FileNotFoundError as error:
        what = f"the backbone folder holds no {CONFIG}"
        raise ModelError(what, where=path.parent) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "not an open_clip configuration"
        wanted = "model_cfg with embed_dim, vision_cfg and text_cfg"
        raise ModelError(what, where=path, wanted=wanted) from error
    return config, stored.get("preprocess_cfg") or {}


def hub_source(repo: str, revision: str | None = None) -> Source:
    """A model of the Hugging Face hub, from the local copy where there is one.

    Raises:
        ModelError: gated, unknown, not an open_clip model, or absent while offline.
    """
    folder = hub_folder(repo, revision, first=CONFIG, one_of=WEIGHTS, others=TOKENIZER)
    found = folder_source(folder)
    notes = {"source": f"{repo} at {folder.name}"}
    return dataclasses.replace(found, name=repo, notes=notes)


def _text_config(source: Source) -> dict[str, Any]:
    """The text configuration, its Hugging Face configuration looked for in the folder first.

    A saved configuration names the folder the model was trained in, which need not exist here.
    """
    text = dict(source.config["text_cfg"])
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False  # every weight comes from the file
        if source.folder is not None and _is_hf_config(source.folder / "config.json"):
            text["hf_model_name"] = str(source.folder)
    return text


def _is_hf_config(path: Path) -> bool:
    try:
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def new_model(source: Source) -> nn.Module:
    """The model with random weights, in fp32 on CPU, in eval mode; torch's generator is untouched.

    Raises:
        ModelError: a kind of model that is not supported, or a configuration that does not fit.
    """
    from open_clip import CLIP, CustomTextCLIP

    config = copy.deepcopy(source.config)
    if "multimodal_cfg" in config:
        what = "a captioning model is not a backbone"
        raise ModelError(what, where=source.name, wanted="a CLIP with two towers")
    config["text_cfg"] = _text_config(source)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    with torch.random.fork_rng(devices=[]):
        repo = str(config["text_cfg"].get("hf_model_name", source.name))
        with hub_errors(repo):
            try:
                model: nn.Module = (CustomTextCLIP if custom else CLIP)(**config)
            except (TypeError, ValueError, KeyError, RuntimeError) as error:
                what = f"open_clip cannot build this configuration ({error})"
                raise ModelError(what, where=source.name) from error
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills the model from a file, every tensor of it, under open_clip's own conversions of names.

    Differs: position embeddings are never resized to another image size or context.

    Raises:
        ModelError: unreadable, unsafe, or tensors that are missing, unexpected or of another shape.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.factory import load_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    try:
        state = load_state_dict(str(path), weights_only=True)
        state = convert_state_dict(model, state)
    except Exception as error:  # damaged files raise whatever their parser raises
        raise _unreadable(path) from error
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in [n for n in state if n.endswith("embeddings.position_ids")]:
        del state[name]  # older versions of transformers kept it
    fill(model, state, path.name)


def fill(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copies every tensor of `state` into the module, in the module's precision.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; they are named.
    """
    here = module.state_dict()
    missing, unexpected = sorted(here.keys() - state.keys()), sorted(state.keys() - here.keys())
    found = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if found:
        what, do = "the weights do not fit the model", "Check that they belong to it."
        raise ModelError(what, where=where, found=" and ".join(found), do=do)
    for name, value in here.items():
        if value.ndim <= 1 and value.numel() == state[name].numel() == 1:
            state[name] = state[name].reshape(value.shape)  # a scale may be stored as [1]
        if value.shape != state[name].shape:
            what = f"the tensor {name} has another shape"
            shapes = list(state[name].shape), list(value.shape)
            raise ModelError(what, where=where, found=shapes[0], wanted=shapes[1])
    module.load_state_dict(state)


def _unreadable(path: Path) -> ModelError:
    if path.suffix == ".safetensors":
        return ModelError("the weights are damaged or not safetensors", where=path.name)
    what = "the weights are damaged, or a pickle that holds more than tensors"
    return ModelError(what, where=path.name, do="Convert them to safetensors.")


def new_tokenizer(source: Source) -> Any:
    """The tokenizer of a model: from its folder where it lies there, else by the name it gives.

    Raises:
        ModelError: not here and not to be fetched.
    """
    from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer

    text = source.config["text_cfg"]
    length = int(text.get("context_length", 77))
    name = text.get("hf_tokenizer_name", "")
    extra = dict(text.get("tokenizer_kwargs", {}))
    if not name:
        if "siglip" in source.name.lower() and source.folder is None:
            return SigLipTokenizer("c4-en", context_length=length)
        return SimpleTokenizer(context_length=length, **extra)
    if source.folder is not None and any((source.folder / n).is_file() for n in TOKENIZER):
        name = str(source.folder)
    with hub_errors(str(name)):
        try:
            mode = text.get("tokenizer_mode")
            return HFTokenizer(name, context_length=length, tokenizer_mode=mode, **extra)
        except (ValueError, KeyError, ImportError) as error:
            what = f"the tokenizer cannot be read ({error.__class__.__name__})"
            do = "Put the tokenizer's files, tokenizer.json among them, into the same folder."
            raise ModelError(what, where=Path(name).name, do=do) from error


def build(source: Source) -> tuple[nn.Module, Any, Preprocess]:
    """Model, tokenizer and preprocessing.

    Raises:
        ModelError: see `new_model`, `load_weights` and `new_tokenizer`.
    """
    tokenizer = new_tokenizer(source)
    model = new_model(source)
    load_weights(model, source.weights)
    return model, tokenizer, preprocessing(source.preprocess, model)


def preprocessing(settings: dict[str, Any], model: nn.Module) -> Preprocess:
    """The preprocessing a configuration declares, at the size the tower really reads."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), settings)
    size: Any = getattr(model.get_submodule("visual"), "image_size", None)
    if size is not None:
        merged["size"] = size
    return Preprocess.from_open_clip(merged)
