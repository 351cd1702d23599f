"""An open_clip model assembled from an image tower and a sentence encoder that never met."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cache.assets import fetch, table
from cache.errors import ModelError, RecipeError
from cache.recipe import Alternatives, RecipePart
from prompt_tune.convert import ARCHITECTURE, converted_image_tower
from prompt_tune.open_clip_files import (
    TOKENIZER,
    Source,
    architecture,
    fill,
    folder_source,
    new_model,
    new_tokenizer,
    preprocessing,
)
from prompt_tune.preprocess import Preprocess

Pooling = Literal["mean", "cls"]
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}


class ImageTowerSpec(RecipePart):
    """An image tower: an embedded `asset`, an `arch` with `weights`, or that of a `folder`."""

    alternatives: ClassVar[Alternatives] = {"asset": (), "arch": ("weights",), "folder": ()}

    asset: str | None = None
    arch: str | None = None
    weights: str | None = None
    """Safetensors of the image tower, or of the whole model."""
    folder: str | None = None
    """An open_clip folder, whose text tower is left aside."""

    @model_validator(mode="after")
    def _one_place(self) -> "ImageTowerSpec":
        _exactly_one(asset=self.asset, arch=self.arch, folder=self.folder, where="image")
        if (self.arch is None) != (self.weights is None):
            what = "an architecture and its weights file go together"
            raise RecipeError(what, where="image", do="Set both arch and weights.")
        return self


class SentenceEncoderSpec(RecipePart):
    """A sentence encoder: an embedded `asset`, or a `folder` with weights and tokenizer."""

    alternatives: ClassVar[Alternatives] = {"asset": (), "folder": ()}

    asset: str | None = None
    folder: str | None = None
    pooling: Pooling = "mean"
    """How it pools its tokens into one sentence, as it was trained."""

    @model_validator(mode="after")
    def _one_place(self) -> "SentenceEncoderSpec":
        _exactly_one(asset=self.asset, folder=self.folder, where="text")
        return self


def _exactly_one(*, where: str, **places: str | None) -> None:
    given = [name for name, value in places.items() if value is not None]
    if len(given) != 1:
        what = "a tower comes from exactly one place"
        found, wanted = " and ".join(given) or "none", " or ".join(places)
        raise RecipeError(what, where=where, found=found, wanted=wanted)


@dataclass(frozen=True)
class Towers:
    """Where both towers lie, and the digests of their files."""

    vision_cfg: dict[str, Any]
    embed_dim: int
    quick_gelu: bool
    preprocess: dict[str, Any]
    image_weights: Path
    text_folder: Path
    pooler: str
    digests: dict[str, str]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_towers(image: ImageTowerSpec, text: SentenceEncoderSpec) -> Towers:
    """Locates both towers; fetches and converts what is embedded.

    Raises:
        ModelError: a file is missing or not what it should be.
        VademecumError: see `cache.assets.fetch`.
    """
    preprocess: dict[str, Any] = {}
    if image.folder is not None:
        source = folder_source(Path(image.folder).expanduser())
        config, preprocess, weights = source.config, source.preprocess, source.weights
        image_digest = file_digest(weights)
    elif image.asset is not None:
        config, weights = architecture(ARCHITECTURE), converted_image_tower(image.asset)
        image_digest = table()[image.asset].members[0].sha256
    else:
        config, weights = architecture(image.arch or ""), Path(image.weights or "").expanduser()
        if not weights.is_file():
            what = "no such weights file"
            raise ModelError(what, where=weights, do="Check image.weights.")
        image_digest = file_digest(weights)
    folder = fetch(text.asset) if text.asset else Path(text.folder or "").expanduser()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            what = f"the sentence encoder's folder holds no {name}"
            raise ModelError(what, where=folder)
    return Towers(
        vision_cfg=config["vision_cfg"],
        embed_dim=int(config["embed_dim"]),
        quick_gelu=bool(config.get("quick_gelu", False)),
        preprocess=preprocess,
        image_weights=weights,
        text_folder=folder,
        pooler=POOLERS[text.pooling],
        digests={"image": image_digest, "text": file_digest(folder / "model.safetensors")},
    )


def assembled_config(towers: Towers, context_length: int) -> dict[str, Any]:
    """open_clip's configuration of the pair, with a linear projection without bias."""
    return {
        "embed_dim": towers.embed_dim,
        "quick_gelu": towers.quick_gelu,
        "vision_cfg": towers.vision_cfg,
        "text_cfg": {
            "hf_model_name": ".",
            "hf_tokenizer_name": ".",
            "hf_model_pretrained": False,
            "hf_proj_type": "linear",
            "hf_pooler_type": towers.pooler,
            "context_length": context_length,
        },
    }


def assemble(towers: Towers, context_length: int) -> tuple[nn.Module, Any, Preprocess, Source]:
    """Model, tokenizer, preprocessing and source; the projection is still to be trained.

    Raises:
        ModelError: a tower is of an unknown kind, or its weights do not fit.
    """
    config = assembled_config(towers, context_length)
    source = Source(
        "assembled", config, towers.preprocess, towers.image_weights, towers.text_folder
    )
    tokenizer, model = new_tokenizer(source), new_model(source)
    _check_context(model, context_length)
    images = towers.image_weights
    fill(model.get_submodule("visual"), _image_state(images), images.name)
    encoder = towers.text_folder / "model.safetensors"
    fill(model.get_submodule("text.transformer"), _text_state(encoder), encoder.name)
    return model, tokenizer, preprocessing(towers.preprocess, model), source


def _check_context(model: nn.Module, context_length: int) -> None:
    text: Any = model.get_submodule("text")
    longest = int(getattr(text.config, "max_position_embeddings", context_length))
    if context_length > longest:
        what = "the sentence encoder has fewer positions"
        raise RecipeError(what, where="context_length", found=context_length, wanted=longest)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        what = "the weights are damaged or not safetensors"
        raise ModelError(what, where=path.name) from error


def _image_state(path: Path) -> dict[str, torch.Tensor]:
    """The image tower's tensors, whether the file holds it alone or the whole model."""
    state = _tensors(path)
    inside = {n.removeprefix("visual."): w for n, w in state.items() if n.startswith("visual.")}
    return inside or state


def _text_state(path: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors without its pooler, which sentence encoders do not use."""
    state = {name.removeprefix("bert."): value for name, value in _tensors(path).items()}
    return {
        name: value
        for name, value in state.items()
        if not name.startswith(("pooler.", "cls.")) and not name.endswith("position_ids")
    }


def save_assembled(folder: Path, model: nn.Module, source: Source, preprocess: Preprocess) -> None:
    """Writes what `folder_source` reads: configuration, tokenizer files, every weight in fp32."""
    from safetensors.torch import save_file

    config = {"model_cfg": source.config, "preprocess_cfg": preprocess.settings()}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in ("config.json", *TOKENIZER):
        if source.folder is not None and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
