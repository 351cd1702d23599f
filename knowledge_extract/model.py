"""A causal language model with its tokenizer, loaded under one quantisation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cache.devices import check_device
from cache.errors import ModelError, SystemRefusedError
from cache.extras import need
from knowledge_extract.quiet import quiet
from knowledge_extract.settings import RunSettings
from knowledge_extract.source import ModelSource


@dataclass(frozen=True)
class LanguageModel:
    """A frozen causal model in evaluation mode, its parts named the same for every family."""

    model: Any
    decoder: nn.Module
    layers: nn.ModuleList
    width: int
    depth: int
    pad: int
    quantisation: str

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device = self.model.get_input_embeddings().weight.device
        return torch.device(device)

    def batch_limit(self, tokens: int) -> int | None:
        """The largest batch in which no row can change another; None where any batch will do.

        One, for three kinds of model: int8 looks for outlier columns over every token of a batch,
        padding included (measured: up to 0.3 of a state's norm); a sliding window counts padded
        slots; a recurrent state reads them.
        """
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        recurrent = getattr(self.model, "_is_stateful", False)
        alone = self.quantisation == "int8" or recurrent or (window and tokens > window)
        return 1 if alone else None


def pick_device(wanted: str) -> str:
    """`wanted`, or the best device of this machine for `auto`.

    Raises:
        RecipeError: see `check_device`.
        SystemRefusedError: a device this machine does not have.
    """
    check_device(wanted)
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        what = f"the device {wanted!r} cannot be used"
        do = "Use --device cpu, or auto."
        raise SystemRefusedError(what, found=str(error).splitlines()[0], do=do) from error
    return wanted


def _quantisation_config(quantisation: str, dtype: torch.dtype) -> Any:
    if quantisation == "none":
        return None
    need(f"quantisation {quantisation!r}", "bitsandbytes", "accelerate", extra="extract")
    from transformers import BitsAndBytesConfig

    if quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantisation, bnb_4bit_compute_dtype=dtype
    )


def decoder_layers(model: Any, depth: int) -> tuple[nn.Module, nn.ModuleList]:
    """The module that owns the decoder layers, and the layers, found by their number.

    Raises:
        ModelError: no list of `depth` layers, as in an encoder-decoder.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not found or getattr(model.config, "is_encoder_decoder", False):
        what = "the decoder layers of this model were not found"
        wanted = f"one list of {depth} layers in a decoder-only model"
        raise ModelError(what, where=type(model).__name__, wanted=wanted)
    name, layers = min(found, key=lambda pair: pair[0].count("."))
    owner = name.rpartition(".")[0]
    return model.get_submodule(owner), layers


def as_language_model(model: Any, pad: int, quantisation: str) -> LanguageModel:
    """A loaded Hugging Face causal model as a `LanguageModel`.

    Raises:
        ModelError: its layers were not found.
    """
    model.eval()
    model.requires_grad_(requires_grad=False)
    config = model.config.get_text_config()
    depth, width = int(config.num_hidden_layers), int(config.hidden_size)
    decoder, layers = decoder_layers(model, depth)
    return LanguageModel(model, decoder, layers, width, depth, pad, quantisation)


def _honour_dtype(model: Any, dtype: str) -> None:
    """Keeps bitsandbytes from rounding fp32 activations to bf16.

    Its 4-bit kernel for CPUs with AVX512-BF16 does so whatever the compute dtype is; one part in
    a hundred of a state then depends on the batch and on the machine.
    """
    if dtype != "bfloat16":
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False


def check_complete(report: Mapping[str, Any], source: ModelSource) -> None:
    """Refuses what the library would fill with random numbers after a warning.

    Raises:
        ModelError: a weight is missing or has another shape.
    """
    for fault in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report.get(fault) or ()):
            what = f"{len(names)} weights are {fault.partition('_')[0]}"
            do = "Fetch the model again."
            raise ModelError(what, where=source.label, found=names[0], do=do)


def load_model(
    source: ModelSource, quantisation: str, dtype: str, pad: int, run: RunSettings
) -> LanguageModel:
    """The source's weights under a quantisation and compute dtype, on the run's device.

    Raises:
        MissingExtraError: a package the quantisation or the device map needs is absent.
        ModelError: the weights are missing or are not those of a causal language model.
        SystemRefusedError: the device is absent or too small.
    """
    compute = getattr(torch, dtype)
    config = _quantisation_config(quantisation, compute)
    device_map: Any = run.device_map
    device = pick_device(run.device)
    if device_map is not None:
        need("a device map", "accelerate", extra="extract")
    elif config is not None:
        device_map = {"": device}
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": config, "device_map": device_map, "dtype": compute}
    options = {k: v for k, v in options.items() if v is not None}
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                source.weights(), **source.hub_options(), **options, output_loading_info=True
            )
            if device_map is None:
                model = model.to(device)
    except torch.OutOfMemoryError as error:
        what = "the model does not fit the device"
        do = "Use quantisation nf4, a device map, or a smaller model."
        raise SystemRefusedError(what, where=source.label, do=do) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        what = "the model cannot be loaded"
        do = "Check the files" + (", or run once with a network." if source.commit else ".")
        raise ModelError(what, where=source.label, found=str(error)[:300], do=do) from error
    check_complete(report, source)
    _honour_dtype(model, dtype)
    return as_language_model(model, pad, quantisation)
