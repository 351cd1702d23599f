"""An int8 ONNX export of a CLIP image tower, as open_clip weights in fp32.

The ONNX file is parsed, never run: its graph rounds activations so coarsely that features lose
most of their meaning, while its weights are good to about one per cent of their deviation.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from cache.assets import fetch, table
from cache.errors import ModelError
from cache.user_folder import private_temporary, publish, storage_errors, user_cache

VERSION = 1  # of the conversion; part of the folder name of what it makes
MAX_BYTES = 512 * 2**20  # protobuf is parsed in memory
ARCHITECTURE = "ViT-B-16-quickgelu"
KEYS, PARAMETERS = 152, 86_192_640
MATMUL = re.compile(r"/vision_model/encoder/(layers\.\d+)/(self_attn|mlp)/(\w+)/MatMul_quant")

State = dict[str, Float[Tensor, "..."]]


def _arrays(graph: Any, where: Path) -> dict[str, np.ndarray]:
    import onnx

    arrays = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            what = "the ONNX file keeps its weights in other files"
            raise ModelError(what, where=where.name, found=tensor.name)
        arrays[tensor.name] = onnx.numpy_helper.to_array(tensor)
    return arrays


def _weight_name(node: str) -> str:
    """The Hugging Face name of the weight a quantised product reads."""
    if found := MATMUL.fullmatch(node):
        return "vision_model.encoder.{}.{}.{}.weight".format(*found.groups())
    if node == "/visual_projection/MatMul_quant":
        return "visual_projection.weight"
    what = "the ONNX file is not an export of a CLIP image tower"
    raise ModelError(what, found=f"a product called {node!r}")


def read_onnx(path: Path) -> State:
    """The weights of the tower under Hugging Face names, each `[out, in]`.

    A quantised weight is `W = (q - zero_point) * scale`, per output channel, transposed.

    Raises:
        ModelError: too large, not ONNX, or not an image tower of CLIP.
    """
    import onnx

    if (size := path.stat().st_size) > MAX_BYTES:
        what = "the ONNX file is too large to parse"
        raise ModelError(what, where=path.name, found=size, wanted=f"at most {MAX_BYTES} bytes")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's error class depends on its backend
        what = "the file is not ONNX"
        raise ModelError(what, where=path.name) from error
    arrays = _arrays(graph, path)
    weights = {n: a for n, a in arrays.items() if n.startswith("vision_model.")}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            quantised, zero_point = arrays[node.input[1]], arrays[node.input[3]]
            scale = arrays[node.input[1].removesuffix("_quantized") + "_scale"]
            centred = quantised.astype(np.float32) - zero_point.astype(np.float32)
            weights[_weight_name(node.name)] = np.ascontiguousarray((centred * scale).T)
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in weights.items()}


NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def to_open_clip(weights: State) -> State:
    """Hugging Face names to open_clip's: queries, keys and values stacked, projection transposed.

    Raises:
        ModelError: a weight is missing.
    """
    state: State = {}
    try:
        for name, value in weights.items():
            if name == "visual_projection.weight":
                state["proj"] = value.T.contiguous()
            elif ".self_attn.q_proj." in name:
                parts = [
                    weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
                ]
                new = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
                state[_renamed(new)] = torch.cat(parts)
            elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
                state[_renamed(name)] = value
    except KeyError as error:
        what = "the image tower lacks a weight"
        raise ModelError(what, found=f"no {error.args[0]}") from error
    return state


def _renamed(name: str) -> str:
    name = name.removeprefix("vision_model.")
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def converted_image_tower(asset: str = "clip-vit-b16-image") -> Path:
    """The embedded image tower as fp32 safetensors for open_clip's `ViT-B-16-quickgelu`.

    Made once per asset digest in the user's cache folder.

    Raises:
        ModelError: what was read is not that tower.
        VademecumError: see `cache.assets.fetch`.
    """
    source = fetch(asset)
    root = user_cache() / "converted"
    folder = root / f"{asset}-{table()[asset].members[0].sha256[:16]}-v{VERSION}"
    target = folder / "visual.safetensors"
    if target.is_file():
        return target
    state = to_open_clip(read_onnx(source))
    count = sum(value.numel() for value in state.values())
    if (len(state), count) != (KEYS, PARAMETERS):
        what = f"the asset is not the image tower of {ARCHITECTURE}"
        found, wanted = f"{len(state)} tensors, {count} values", f"{KEYS} and {PARAMETERS}"
        raise ModelError(what, where=asset, found=found, wanted=wanted)
    with storage_errors(root), private_temporary(root, asset) as work:
        save_file(state, work / target.name, metadata={"architecture": ARCHITECTURE})
        with (work / target.name).open("rb+") as stream:
            os.fsync(stream.fileno())
        publish(work, folder)
    return target
