"""Compares CILMP with tensors of the published implementation.

    python tests/golden/check_cilmp.py FILE.npz --dtype float64

The last line of output is a JSON object: `logits_max_abs`, `loss_abs` and `grad_worst_rel` (the
worst relative L2 error of any gradient), and the same after `dropout_` where the file has masks.
The exit code is 1 beyond the tolerance. All sizes are read off the tensors; heads are 64 wide and
the method's prefix and suffix have as many rows as the masks, or 4.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from prompt_tune.method import Batch, KnowledgeRows, Problem
from prompt_tune.methods.cilmp import CILMP, CilmpConfig
from prompt_tune.towers import image_tower, text_tower

TOLERANCE = {
    "float64": {"logits_max_abs": 1e-6, "loss_abs": 1e-6, "grad_worst_rel": 1e-5},
    "float32": {"logits_max_abs": 2e-4, "loss_abs": 2e-4, "grad_worst_rel": 2e-3},
}
HEAD = 64
ROWS = 4  # prefix and suffix of a file without masks


class Golden:
    """A file's tensors by name."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix(prefix): torch.from_numpy(value)
            for name, value in self.arrays.items()
            if name.startswith(prefix)
        }

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])


def count(names: Any, prefix: str) -> int:
    """How many numbers follow `prefix` in the names."""
    return len({n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)})


def clip_of(weights: dict[str, torch.Tensor]) -> Any:
    """An open_clip CLIP of the sizes of `weights`, holding them."""
    from open_clip import CLIP

    vision_width, _, patch, _ = weights["visual.conv1.weight"].shape
    grid = round((len(weights["visual.positional_embedding"]) - 1) ** 0.5)
    vocabulary, width = weights["token_embedding.weight"].shape
    model = CLIP(
        embed_dim=weights["text_projection"].shape[1],
        vision_cfg={
            "image_size": grid * patch,
            "patch_size": patch,
            "width": vision_width,
            "head_width": HEAD,
            "layers": count(weights, "visual.transformer.resblocks."),
        },
        text_cfg={
            "context_length": len(weights["positional_embedding"]),
            "vocab_size": vocabulary,
            "width": width,
            "heads": width // HEAD,
            "layers": count(weights, "transformer.resblocks."),
        },
        quick_gelu=True,
    )
    missing, foreign = model.load_state_dict(weights, strict=False)
    if foreign or set(missing) - {"attn_mask"}:
        raise SystemExit(f"weights do not fit: missing {missing}, foreign {foreign}")
    return model.eval()


def method_of(golden: Golden, dtype: torch.dtype) -> CILMP:
    """The product's CILMP with the file's backbone, rows and parameters."""
    from open_clip.tokenizer import SimpleTokenizer

    parameters = {
        name.replace(".ctx", ".context"): value for name, value in golden.under("param.").items()
    }
    model = clip_of(golden.under("clip.")).to(dtype)
    backbone: Any = SimpleNamespace(
        image=image_tower(model),
        text=text_tower(model, SimpleTokenizer()),
        logit_scale=float(golden.tensor("clip.logit_scale").double().exp()),
        embed_dim=int(model.text_projection.shape[1]),
    )
    first = "stage.0.prefix" if "stage.0.prefix.R" in parameters else "stage.0.suffix"
    conditional = f"{first}.U1" in parameters
    masked = golden.arrays.get("dropout.mask_packed")
    rows = ROWS if masked is None else masked.shape[3]
    visual = count(parameters, "visual_prompt.")
    config = CilmpConfig(
        n_context=len(parameters["stage.0.context"]),
        context=None,
        visual_prompts=len(parameters["visual_prompt.0"]) if visual else 1,
        text_depth=count(parameters, "stage."),
        visual_depth=visual,
        prefix=rows if "stage.0.prefix.R" in parameters else 0,
        suffix=rows if "stage.0.suffix.R" in parameters else 0,
        rank=len(parameters["stage.0.projection.A"]),
        dropout=0.1,
        condition="image" if conditional else "none",
    )
    names = tuple(str(n) for n in golden.arrays["class_names"])
    hidden = tuple(golden.tensor(f"hidden.{i}") for i in range(len(names)))
    method = CILMP(config, Problem(backbone, names, rows=KnowledgeRows(hidden))).to(dtype)
    wanted = set(method.trainable())
    if set(parameters) != wanted:
        raise SystemExit(f"parameters do not fit: {sorted(set(parameters) ^ wanted)}")
    with torch.no_grad():
        for name, parameter in method.trainable().items():
            parameter.copy_(parameters[name])
    return method.eval()


def errors(golden: Golden, method: CILMP, prefix: str, kept: Any) -> dict[str, float]:
    """How far one step is from the file's."""
    names, parameters = zip(*method.trainable().items(), strict=True)
    images, labels = golden.tensor("images").to(parameters[0].dtype), golden.tensor("labels")
    logits = method.logits(Batch(labels, images=images), kept)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    worst = 0.0
    for name, grad in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        true = golden.tensor(f"{prefix}grad.{name.replace('.context', '.ctx')}").double()
        size = float(true.norm())
        error = float((grad.double() - true).norm()) / (size if size else 1.0)
        worst = max(worst, error if error == error else float("inf"))
    logits, loss = logits.detach(), loss.detach()
    return {
        "logits_max_abs": float((logits.double() - golden.tensor(f"{prefix}logits")).abs().max()),
        "loss_abs": float((loss.double() - golden.tensor(f"{prefix}loss")).abs()),
        "grad_worst_rel": worst,
    }


def main() -> int:
    """The errors of one file as JSON; 1 beyond the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float64")
    arguments = parser.parse_args()
    golden = Golden(arguments.file)
    method = method_of(golden, getattr(torch, arguments.dtype))
    result = errors(golden, method, "", None)
    if "dropout.mask_packed" in golden.arrays:
        masks = np.unpackbits(golden.arrays["dropout.mask_packed"], axis=-1)
        width = golden.arrays["hidden.0"].shape[1]
        kept = [
            tuple(torch.from_numpy(group[..., :width]).bool() for group in stage) for stage in masks
        ]
        dropped = errors(golden, method, "dropout.", kept)
        result |= {f"dropout_{name}": value for name, value in dropped.items()}
    limits = TOLERANCE[arguments.dtype]
    good = all(value <= limits[name.removeprefix("dropout_")] for name, value in result.items())
    print(json.dumps(result), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
