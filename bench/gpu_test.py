"""`make gpu-test`: both stages on a GPU, at the size they are meant for, with random weights.

Prints one table. Where no CUDA device is at hand every row says "not measured".

    python bench/gpu_test.py [--layers 32] [--width 4096]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # beside this lies a `cache.py`

ROWS = (
    "extract nf4", "extract bf16", "resume after one unit", "verify", "one CILMP epoch",
)  # fmt: skip
CLASSES = ("eosinophil", "monocyte", "platelet")


def random_language_model(folder: Path, *, layers: int, width: int, device: str) -> Path:
    """A Llama of 8B shape with random bf16 weights and a small byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", *sorted(alphabet)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=width, num_hidden_layers=layers,
        intermediate_size=width * 7 // 2, num_attention_heads=width // 128,
        num_key_value_heads=max(width // 512, 1), bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return folder


def recipe_for(folder: Path, quantisation: str) -> Any:
    """An extraction recipe for the random model."""
    from cache.recipe import validate
    from knowledge_extract import ExtractRecipe

    data = {
        "dataset": "toy-cells",
        "model": {"folder": str(folder), "licence": "Apache-2.0"},
        "quantisation": quantisation,
        "compute_dtype": "bfloat16",
        "on_overflow": "float32",
        "templates": {"question": "Describe {name}."},
        "classes": [{"id": c, "name": c, "modality": "blood smear"} for c in CLASSES],
        "blocks": {
            "answers": {"kind": "answers", "max_new_tokens": 16},
            "layers": {"kind": "states", "of": "answers", "pooling": "end_token", "layers": "all"},
        },
    }
    return validate(ExtractRecipe, data, where="gpu-test")


def interrupted(recipe: Any, out: Path, settings: Any) -> None:
    """An extraction that the user stops when its first unit is committed."""
    from knowledge_extract import extract
    from knowledge_extract.engine import Engine

    real, done = Engine.entries, []

    def entries(self: Any, unit: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(unit)
        return real(self, unit)

    Engine.entries = entries  # type: ignore[method-assign]
    try:
        extract(recipe, out, settings)
    except KeyboardInterrupt:
        return
    finally:
        Engine.entries = real  # type: ignore[method-assign]
    message = "the extraction was over before it could be interrupted"
    raise RuntimeError(message)


def toy_images(folder: Path) -> Path:
    """A few coloured squares per class and split."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4), ("test", 4)):
        for k, name in enumerate(CLASSES):
            place = folder / split / name
            place.mkdir(parents=True)
            for n in range(count):
                pixels = random.integers(0, 120, (64, 64, 3)) + 60 * (np.arange(3) == k)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{n}.png")
    declaration = folder.with_suffix(".yaml")
    names = "".join(f"  - {{id: {c}, name: {c}}}\n" for c in CLASSES)
    declaration.write_text(
        f"dataset: toy-cells\nlayout: folder\npath: {folder.name}\nmodality: blood smear\n"
        f"template: 'a photo of a {{}}.'\nclasses:\n{names}"
    )
    return declaration


def random_clip(file: Path) -> Path:
    """Random weights of OpenAI's ViT-B/16 shape."""
    import open_clip
    from safetensors.torch import save_file

    model = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, file)
    return file


def measure(layers: int, width: int, device: str) -> list[dict[str, Any]]:
    """The rows of the table."""
    import torch

    import prompt_tune  # noqa: F401 - makes torchvision importable

    on_gpu = device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        return [{"what": what, "seconds": None, "peak_gb": None, "note": ""} for what in ROWS]
    from cache.inspect import verify
    from cache.recipe import validate
    from knowledge_extract import RunSettings, extract
    from prompt_tune import TuneRecipe, tune

    found: list[dict[str, Any]] = []

    def timed(what: str, work: Any) -> Any:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        row = {"what": what, "seconds": round(seconds, 2), "peak_gb": round(peak, 2), "note": ""}
        found.append(row)
        return result

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_language_model(folder / "llm", layers=layers, width=width, device=device)
        settings = RunSettings(device=device)
        nf4, bf16 = folder / "nf4.h5", folder / "bf16.h5"
        timed(ROWS[0], lambda: extract(recipe_for(model, "nf4"), nf4, settings))
        timed(ROWS[1], lambda: extract(recipe_for(model, "none"), bf16, settings))
        small, halfway = RunSettings(device=device, batch_size=2), folder / "halfway.h5"
        interrupted(recipe_for(model, "nf4"), halfway, small)
        kept = timed(ROWS[2], lambda: extract(recipe_for(model, "nf4"), halfway, small))
        found[-1]["note"] = f"{kept.reused} entries kept, {kept.computed} computed"
        if not kept.reused or not kept.computed:
            message = "nothing was resumed"
            raise RuntimeError(message)
        timed(ROWS[3], lambda: verify(nf4))
        recipe = validate(
            TuneRecipe,
            {
                "backbone": {
                    "arch": "ViT-B-16-quickgelu",
                    "weights": str(random_clip(folder / "clip.safetensors")),
                },
                "method": {"name": "cilmp", "text_depth": "full", "visual_depth": "full"},
                "samples": {"shots": 16},
                "train": {"epochs": 1, "batch_size": 16, "views": "live"},
            },
            where="gpu-test",
        )
        data = str(toy_images(folder / "images"))
        timed(
            ROWS[4],
            lambda: tune(recipe, data=data, knowledge=nf4, out=folder / "run", device=device),
        )
    return found


def main() -> None:
    """Prints the table and, last, the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--device", default="cuda", help="cpu rehearses the steps, no more")
    options = parser.parse_args()
    rows = measure(options.layers, options.width, options.device)
    for row in rows:
        shown = "not measured (no CUDA device)"
        if row["seconds"] is not None:
            shown = (
                f"{row['seconds']:8.2f} s  peak {row['peak_gb']:6.2f} GB  {row['note']}".rstrip()
            )
        print(f"{row['what']:28}{shown}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
