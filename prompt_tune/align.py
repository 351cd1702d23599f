"""Makes a backbone of an image tower and a sentence encoder by training one projection.

Both towers stay frozen (locked-image tuning, Zhai et al. 2022, with the text tower locked too).
Only `W: text width -> embedding` is trained, on cached features of training images with class
captions from several templates:

    loss = mean over templates j of CE(s <v_i, W t_jc> / (|v_i| |W t_jc|), y_i)  +  decay |W|^2 / 2

Differs: LiT trains the text tower on image-text pairs with a contrastive loss; here are no pairs,
so captions are class names and the loss is supervised. The result is therefore not zero-shot on the
classes it saw, and its record says which images and classes those were.
"""

import importlib.metadata
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from cache.durable import storage_errors
from cache.errors import RecipeError, RunError
from cache.recipe import RecipePart
from cache.user_folder import private_temporary, publish
from prompt_tune.alignment_record import (
    RECORD,
    AlignedClass,
    AlignmentRecord,
    alignment_record,
    request_digest,
)
from prompt_tune.assembly import (
    ImageTowerSpec,
    SentenceEncoderSpec,
    Towers,
    assemble,
    find_towers,
    save_assembled,
)
from prompt_tune.backbone import Backbone, weights_digest
from prompt_tune.data.few_shot import SampleList
from prompt_tune.data.images import ImageSplit
from prompt_tune.features import image_features
from prompt_tune.seeds import derive_seed

SCALE = 100.0
LIBRARIES = ("torch", "open_clip_torch", "transformers", "torchvision")


class AlignSamples(RecipePart):
    """The few-shot sample of the training split; equal shots and seed give that of a tuning run."""

    shots: Annotated[int, Field(ge=1)] = 8
    seed: int = 1


class AlignSpec(RecipePart):
    """An alignment: towers, captions, images, optimiser."""

    image: ImageTowerSpec
    text: SentenceEncoderSpec
    templates: tuple[str, ...]
    """Captions with `{}` for the class name; none may be the one that methods are tested with."""
    samples: AlignSamples = AlignSamples()
    classes: tuple[str, ...] | None = None
    """Class ids alignment may see, such as the base classes; null is all."""
    context_length: Annotated[int, Field(ge=8)] = 256
    steps: Annotated[int, Field(ge=1)] = 300
    lr: Annotated[float, Field(gt=0)] = 0.003
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    seed: int = 1

    def path_free(self) -> dict[str, Any]:
        """The resolved recipe with base names in place of paths."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        for tower in (plain["image"], plain["text"]):
            for key in ("weights", "folder"):
                if tower.get(key) is not None:
                    tower[key] = Path(tower[key]).name
        return plain


@dataclass(frozen=True)
class AlignInputs:
    """The images of an alignment: the sample itself, and where it came from."""

    dataset: str
    samples: SampleList
    split: ImageSplit


def check_templates(templates: tuple[str, ...], held_out: str | None = None) -> None:
    """Nothing, if the templates can be used and the held-out one is not among them.

    Raises:
        RecipeError: none, without `{}`, or the one a method is tested with.
    """
    if not templates:
        what = "alignment needs at least one template"
        raise RecipeError(what, where="templates")
    for template in templates:
        if template.count("{}") != 1:
            what = "a template holds {} exactly once"
            raise RecipeError(what, where="templates", found=repr(template))
    if held_out is not None and held_out in templates:
        what = "the template that methods are tested with is held apart from alignment"
        do = "Take it out of templates."
        raise RecipeError(what, where="templates", found=repr(held_out), do=do)


def pooled_captions(
    model: nn.Module, tokenizer: Any, captions: list[str]
) -> Float[Tensor, "captions width"]:
    """What the sentence encoder pools each caption into, before the projection."""
    text: Any = model.get_submodule("text")
    tokens = tokenizer(captions)
    mask = (tokens != text.config.pad_token_id).long()
    longest = int(mask.sum(dim=1).max())
    tokens, mask = tokens[:, :longest], mask[:, :longest]
    with torch.no_grad():
        states = text.transformer(input_ids=tokens, attention_mask=mask)
        pooled: Tensor = text.pooler(states, mask)
    return pooled


def scores(
    weight: Float[Tensor, "embed width"],
    image: Float[Tensor, "images embed"],
    text: Float[Tensor, "templates classes width"],
) -> Float[Tensor, "images templates classes"]:
    """`s <v, W t>` of normalised features, per template."""
    projected = F.normalize(text @ weight.T, dim=-1)
    return SCALE * torch.einsum("ie,tce->itc", F.normalize(image, dim=-1), projected)


def train_projection(
    image: Float[Tensor, "images embed"],
    text: Float[Tensor, "templates classes width"],
    labels: Int[Tensor, "images"],
    spec: AlignSpec,
) -> tuple[Float[Tensor, "embed width"], float]:
    """The projection, and its accuracy on these very images with the templates averaged.

    Full-batch AdamW with a cosine schedule, in float32 on CPU: seconds, and repeatable.
    """
    generator = torch.Generator().manual_seed(derive_seed(spec.seed, "projection"))
    shape = (image.shape[1], text.shape[2])
    weight = (torch.randn(shape, generator=generator) / math.sqrt(shape[1])).requires_grad_()
    optimiser = torch.optim.AdamW([weight], lr=spec.lr, weight_decay=spec.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, spec.steps)
    targets = labels[:, None].expand(-1, text.shape[0]).flatten()
    for _ in range(spec.steps):
        optimiser.zero_grad()
        logits = scores(weight, image, text)
        F.cross_entropy(logits.flatten(0, 1), targets).backward()
        optimiser.step()
        schedule.step()
    weight = weight.detach()
    chosen = scores(weight, image, text).mean(dim=1).argmax(dim=1)
    return weight, float((chosen == labels).double().mean())


def align(spec: AlignSpec, inputs: AlignInputs, out: Path, *, device: str = "cpu") -> Path:
    """`out`, a self-contained backbone folder that `backbone: {aligned: out}` loads.

    The same request on a finished folder does nothing.

    Args:
        spec: the recipe.
        inputs: the images alignment may see, all of them.
        out: the folder to make.
        device: where images are encoded.

    Raises:
        RecipeError: templates that cannot be used.
        ModelError: a tower is missing or does not fit.
        RunError: `out` is something else, or another alignment.
        StorageError: `out` cannot be written.
    """
    check_templates(spec.templates)
    towers = find_towers(spec.image, spec.text)
    recipe = spec.path_free()
    if out.exists():
        wanted = request_digest(inputs.dataset, inputs.samples, recipe, towers.digests)
        _refuse_another(out, wanted)
        return out
    with storage_errors(out.parent), private_temporary(out.absolute().parent, out.name) as work:
        _make(spec, towers, inputs, work, device)
        publish(work, out.absolute())
    return out


def _refuse_another(out: Path, wanted: str) -> None:
    if not (out / RECORD).is_file():
        what = "something else is there"
        raise RunError(what, where=out, wanted="a new folder", do="Choose another folder.")
    if alignment_record(out).request != wanted:
        what = "the folder holds another alignment"
        do = "Choose another folder, or delete this one."
        raise RunError(what, where=out, found="other images, towers or settings", do=do)


def _make(spec: AlignSpec, towers: Towers, inputs: AlignInputs, work: Path, device: str) -> None:
    model, tokenizer, preprocess, source = assemble(towers, spec.context_length)
    names = [c.name for c in inputs.split.classes]
    captions = [template.format(name) for template in spec.templates for name in names]
    pooled = pooled_captions(model, tokenizer, captions).unflatten(0, (-1, len(names)))

    backbone = Backbone.of(
        model,
        tokenizer,
        name="unaligned",
        config=source.config,
        preprocess=preprocess,
        notes={},
        device=device,
    )
    features = image_features(backbone, inputs.split)[:, 0]
    labels = torch.from_numpy(inputs.split.labels).long()
    weight, accuracy = train_projection(features, pooled, labels, spec)

    model = model.cpu()
    with torch.no_grad():
        model.get_parameter("text.proj.weight").copy_(weight)
        model.get_parameter("logit_scale").fill_(math.log(SCALE))
    save_assembled(work, model, source, preprocess)
    record = AlignmentRecord(
        dataset=inputs.dataset,
        samples=inputs.samples,
        ids=inputs.split.ids,
        classes=tuple(AlignedClass(id=c.id, name=c.name) for c in inputs.split.classes),
        recipe=spec.path_free(),
        towers=towers.digests,
        weights=weights_digest(model.state_dict().items()),
        train_accuracy=accuracy,
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
    )
    (work / RECORD).write_text(record.model_dump_json(indent=1), encoding="utf-8")
