"""The int8 ONNX image tower becomes open_clip weights: on a small export and on the real one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache.errors import ModelError
from prompt_tune.convert import (
    ARCHITECTURE,
    KEYS,
    PARAMETERS,
    converted_image_tower,
    read_onnx,
    to_open_clip,
)

WIDTH, LAYERS, EMBED = 64, 2, 24
PINNED = "77ad83f6fa5bd47cc9d553995e13538d54bf68b9f559d236730c900205ba6367"
QUANTISED = re.compile(r"(self_attn\.\w+_proj|mlp\.fc\d|visual_projection)\.weight$")


def node_name(weight: str) -> str:
    if weight == "visual_projection.weight":
        return "/visual_projection/MatMul_quant"
    inner = weight.removeprefix("vision_model.encoder.layers.").removesuffix(".weight")
    layer, part, name = inner.split(".")
    return f"/vision_model/encoder/layers.{layer}/{part}/{name}/MatMul_quant"


def export(model: torch.nn.Module, path: Path) -> None:
    """An int8 export of a CLIP image tower; the model gets the rounded weights too."""
    import onnx
    from onnx import helper, numpy_helper

    tensors, nodes = [], []
    for name, value in model.state_dict().items():
        if name.endswith("position_ids"):
            continue
        if not QUANTISED.search(name):
            tensors.append(numpy_helper.from_array(value.numpy(), name))
            continue
        weight = value.numpy().T  # [in, out], one scale per output channel
        scale = np.abs(weight).max(axis=0) / 127
        zero = (np.arange(weight.shape[1]) % 3 - 1).astype(np.int8)
        rounded = np.clip(np.rint(weight / scale) + zero, -128, 127).astype(np.int8)
        base = node_name(name).strip("/").replace("/", "_")
        for array, end in ((rounded, "_quantized"), (zero, "_zero_point"), (scale, "_scale")):
            tensors.append(numpy_helper.from_array(array.astype(array.dtype), base + end))
        inputs = ["x", base + "_quantized", "x_zero", base + "_zero_point"]
        nodes.append(helper.make_node("MatMulInteger", inputs, ["y" + base], name=node_name(name)))
        exact = ((rounded.astype(np.float32) - zero.astype(np.float32)) * scale).T
        value.copy_(torch.from_numpy(np.ascontiguousarray(exact)))
    graph = helper.make_graph(nodes, "tower", [], [], initializer=tensors)
    onnx.save(helper.make_model(graph), str(path))


@pytest.fixture(scope="module")
def hf_model() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        image_size=32,
        patch_size=8,
        projection_dim=EMBED,
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModelWithProjection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_a_small_export_gives_the_same_features(hf_model: torch.nn.Module, tmp_path: Path) -> None:
    from open_clip import CLIP

    export(hf_model, tmp_path / "tower.onnx")
    state = to_open_clip(read_onnx(tmp_path / "tower.onnx"))
    vision = {"image_size": 32, "layers": LAYERS, "width": WIDTH, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    model = CLIP(EMBED, vision, text, quick_gelu=True).eval()
    model.visual.load_state_dict(state)  # strict
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = hf_model(pixel_values=images).image_embeds
        assert torch.allclose(model.visual(images), expected, atol=1e-4)
        assert not torch.allclose(expected[0], expected[1], atol=1e-2)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx
    from onnx import helper, numpy_helper

    path = tmp_path / "x.onnx"

    def refused(text: str) -> None:
        with pytest.raises(ModelError, match=text):
            to_open_clip(read_onnx(path))

    path.write_bytes(b"\xff\xffnothing of the kind")
    refused("x.onnx: the file is not ONNX")

    arrays = {"w_quantized": np.zeros((2, 2), np.int8), "z": np.zeros(2, np.int8)}
    arrays["w_scale"] = np.ones(2, np.float32)
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    node = helper.make_node("MatMulInteger", ["x", "w_quantized", "y", "z"], ["o"], name="/other")
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [], tensors)), str(path))
    refused("not an export of a CLIP image tower; found a product called '/other'")

    name = "vision_model.encoder.layers.0.self_attn.q_proj.bias"
    lonely = numpy_helper.from_array(np.zeros(2, np.float32), name)
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [lonely])), str(path))
    refused("the image tower lacks a weight; found no vision_model.*k_proj.bias")

    lonely.data_location = onnx.TensorProto.EXTERNAL
    model = helper.make_model(helper.make_graph([], "g", [], [], [lonely]))
    path.write_bytes(model.SerializeToString())
    refused("keeps its weights in other files")

    monkeypatch.setattr("prompt_tune.convert.MAX_BYTES", 10)
    refused("the ONNX file is too large to parse; found .*, wanted at most 10 bytes")


@pytest.mark.assets
def test_the_embedded_tower() -> None:
    import open_clip
    from safetensors.torch import load_file

    from prompt_tune.backbone import Backbone, weights_digest
    from prompt_tune.open_clip_files import Source, architecture, fill, new_model, preprocessing

    path = converted_image_tower()
    assert converted_image_tower() == path
    state = load_file(path)
    assert (len(state), sum(v.numel() for v in state.values())) == (KEYS, PARAMETERS)
    assert weights_digest(state.items()) == PINNED

    config = architecture(ARCHITECTURE) | {
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        }
    }
    model = new_model(Source("b16", config, {}, path))
    fill(model.get_submodule("visual"), state, path.name)
    preprocess = preprocessing({}, model)

    backbone = Backbone.of(
        model,
        open_clip.get_tokenizer("ViT-B-16"),
        name="b16",
        config=config,
        preprocess=preprocess,
        notes={},
    )
    ramp = np.linspace(0, 255, 224).astype(np.uint8)
    pictures = [np.stack([np.tile(ramp, (224, 1))] * 3, -1), np.zeros((224, 224, 3), np.uint8)]
    images = torch.stack([preprocess(Image.fromarray(p)) for p in pictures])
    with torch.no_grad():
        found = backbone.image.encode(images)
    assert found.shape == (2, 512)
    # CLIP's features have norms near ten and are far from orthogonal whatever the picture shows.
    assert ((found.norm(dim=1) > 5) & (found.norm(dim=1) < 20)).all()
    cosine = torch.nn.functional.cosine_similarity(found[:1], found[1:])
    assert 0.3 < float(cosine) < 0.97
