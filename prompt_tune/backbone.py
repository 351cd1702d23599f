"""A frozen vision-language backbone: two towers, a tokenizer, a scale, and what identifies them."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from cache.errors import RecipeError
from cache.recipe import Alternatives, RecipePart, digest_of
from prompt_tune.alignment_record import RECORD, AlignmentRecord, alignment_record
from prompt_tune.open_clip_files import Source, arch_source, build, folder_source, hub_source
from prompt_tune.preprocess import Preprocess
from prompt_tune.towers import ImageTower, TextTower, image_tower, text_tower

PROBES = (
    "A photo of a Basophil, 40x: naïve γδ-T cell / H&E (stage II)!",
    "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
    "",
)
# What a Hugging Face text tower computes beyond what names and shapes of its weights say.
HF_SETTINGS = (
    "model_type",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
    "position_embedding_type",
)
# Where weights were to come from when they were trained; not what they compute.
ORIGINS = {
    "hf_model_name",
    "hf_tokenizer_name",
    "hf_model_pretrained",
    "timm_model_pretrained",
    "tokenizer_kwargs",
}


class BackboneSpec(RecipePart):
    """Where a backbone comes from: exactly one of `hub`, `arch`, `folder` and `aligned`."""

    alternatives: ClassVar[Alternatives] = {
        "hub": ("revision",),
        "arch": ("weights",),
        "folder": (),
        "aligned": (),
    }

    hub: str | None = None
    """An open_clip model of the Hugging Face hub: `organisation/name`."""
    revision: str | None = None
    """Branch, tag or commit of `hub`."""
    arch: str | None = None
    """An open_clip architecture, with its weights file in `weights`."""
    weights: str | None = None
    folder: str | None = None
    """A folder with `open_clip_config.json`, weights and tokenizer. One that `vademecum align` made
    counts as aligned here too."""
    aligned: str | None = None
    """A folder made by `vademecum align`; another one is refused."""

    @model_validator(mode="after")
    def _one_place(self) -> "BackboneSpec":
        places = {"hub": self.hub, "arch": self.arch, "folder": self.folder}
        places["aligned"] = self.aligned
        given = [name for name, value in places.items() if value is not None]
        if len(given) != 1:
            what = "a backbone comes from exactly one place"
            found, wanted = " and ".join(given) or "none", " or ".join(places)
            raise RecipeError(what, where="backbone", found=found, wanted=wanted)
        if (self.arch is None) != (self.weights is None):
            what = "an architecture and its weights file go together"
            found = "only " + ("weights" if self.arch is None else "arch")
            do = "Set both arch and weights."
            raise RecipeError(what, where="backbone", found=found, do=do)
        if self.revision is not None and self.hub is None:
            what = "a revision belongs to a hub model"
            raise RecipeError(what, where="backbone.revision", found=f"with {given[0]}")
        return self

    @property
    def path(self) -> Path | None:
        """The file or folder it comes from; None for a hub model."""
        place = self.weights or self.folder or self.aligned
        return None if place is None else Path(place).expanduser()

    def found_at(self, path: str) -> "BackboneSpec":
        """The same backbone where its file or folder is now."""
        places = ("weights", "folder", "aligned")
        key = next(name for name in places if getattr(self, name) is not None)
        return self.model_copy(update={key: path})


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model in eval mode.

    Attributes:
        name: for tables; without paths.
        model: the open_clip module; its towers share its weights.
        tokenizer: open_clip's, as it pads and truncates.
        logit_scale: already exponentiated.
        fingerprint: SHA-256 over every weight, the configuration, the tokenizer and, where the
            backbone was aligned, the list of images that alignment saw.
        image_fingerprint: over the image tower and its preprocessing alone.
        text_fingerprint: over everything else: text tower, projection and tokenizer.
        notes: what a reader of a result must know about it.
        config: the open_clip configuration, without paths.
        alignment: what alignment saw; None for a backbone that was not aligned.
    """

    name: str
    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    image: ImageTower = field(repr=False)
    text: TextTower = field(repr=False)
    logit_scale: float
    preprocess: Preprocess
    fingerprint: str
    image_fingerprint: str
    text_fingerprint: str
    embed_dim: int
    notes: dict[str, str]
    config: dict[str, Any] = field(repr=False)
    alignment: AlignmentRecord | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        config: dict[str, Any],
        preprocess: Preprocess,
        notes: dict[str, str],
        alignment: AlignmentRecord | None = None,
        device: str = "cpu",
    ) -> Self:
        """A backbone of an open_clip model, which it freezes and moves to `device`.

        Raises:
            ModelError: a tower is of a kind that cannot take prompts.
        """
        model = model.eval().requires_grad_(requires_grad=False)
        config = path_free(config)
        image_digest = digest_of(
            {
                "weights": weights_digest(_visual(model).state_dict().items()),
                "vision_cfg": config["vision_cfg"],
                "embed_dim": config["embed_dim"],
                "quick_gelu": config.get("quick_gelu", False),
                "preprocess": preprocess.digest,
            }
        )
        rest = ((n, w) for n, w in model.state_dict().items() if not n.startswith("visual."))
        whole: dict[str, Any] = {
            "image": image_digest,
            "weights": weights_digest(rest),
            "config": config | {"text_model": _hf_settings(model)},
            "tokenizer": tokenizer_digest(tokenizer),
            "alignment": "" if alignment is None else alignment.digest,
        }
        model = model.to(device)
        scale: Any = model.logit_scale
        return cls(
            name=name,
            model=model,
            tokenizer=tokenizer,
            image=image_tower(model),
            text=text_tower(model, tokenizer),
            logit_scale=float(scale.detach().double().exp()),
            preprocess=preprocess,
            fingerprint=digest_of(whole),
            image_fingerprint=image_digest,
            text_fingerprint=digest_of(
                {k: whole[k] for k in ("weights", "tokenizer")}
                | {"config": {k: v for k, v in whole["config"].items() if k != "vision_cfg"}}
            ),
            embed_dim=int(config["embed_dim"]),
            notes=notes,
            config=config,
            alignment=alignment,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def zeroing(self, patches: int) -> Self:
        """This backbone with the first patches of every image zeroed, and features of its own."""
        if not patches:
            return self
        digest = digest_of([self.image_fingerprint, "zeroed", patches])
        return replace(self, image=self.image.zeroing(patches), image_fingerprint=digest)

    def with_model(self, model: nn.Module, *, note: str) -> "Backbone":
        """This backbone with a changed copy of its model: new towers, new fingerprints."""
        return Backbone.of(
            model,
            self.tokenizer,
            name=self.name,
            config=self.config,
            preprocess=self.preprocess,
            notes={**self.notes, "changed": note},
            alignment=self.alignment,
            device=str(self.device),
        )


def _visual(model: nn.Module) -> nn.Module:
    return model.get_submodule("visual")


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over (name, type, shape, bytes) of every tensor, in the order of the names."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights):
        values = tensor.detach().cpu().contiguous()
        head = f"{name}\0{values.dtype}\0{tuple(values.shape)}\0"
        total.update(head.encode())
        total.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, its context and what it makes of a few probes."""
    inner = getattr(tokenizer, "tokenizer", None)
    vocabulary = tokenizer.encoder if inner is None else inner.get_vocab()
    probes = tokenizer(list(PROBES)).tolist()
    return digest_of([sorted((str(k), int(v)) for k, v in vocabulary.items()), probes])


def _hf_settings(model: nn.Module) -> dict[str, Any]:
    settings = getattr(getattr(model, "text", None), "config", None)
    return {key: getattr(settings, key, None) for key in HF_SETTINGS} if settings else {}


def path_free(config: dict[str, Any]) -> dict[str, Any]:
    """An open_clip configuration without the names of where parts of it came from."""
    return {
        key: {k: v for k, v in value.items() if k not in ORIGINS}
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def _source(spec: BackboneSpec) -> Source:
    if spec.hub is not None:
        return hub_source(spec.hub, spec.revision)
    if spec.arch is not None and spec.weights is not None:
        return arch_source(spec.arch, Path(spec.weights).expanduser())
    return folder_source(Path(spec.folder or spec.aligned or "").expanduser())


def _alignment(spec: BackboneSpec) -> AlignmentRecord | None:
    """The record of an aligned folder, by whichever key the recipe names it."""
    if spec.aligned is not None:
        return alignment_record(Path(spec.aligned).expanduser())
    folder = Path(spec.folder).expanduser() if spec.folder is not None else None
    return alignment_record(folder) if folder and (folder / RECORD).exists() else None


def load_backbone(spec: BackboneSpec, *, device: str = "cpu") -> Backbone:
    """The backbone a recipe names, frozen, in fp32, ready on `device`.

    Raises:
        ModelError: absent, gated, damaged, of unknown architecture, or tensors that do not fit.
    """
    source = _source(spec)
    record, notes = _alignment(spec), source.notes
    model, tokenizer, preprocess = build(source)
    if record is not None:
        record.check_weights(weights_digest(model.state_dict().items()))
        notes = {**notes, "alignment": record.describe()}
    return Backbone.of(
        model,
        tokenizer,
        name=source.name,
        config=source.config,
        preprocess=preprocess,
        notes=notes,
        alignment=record,
        device=device,
    )
