"""Towers against open_clip's own encoders, and backbones that are refused."""

from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

from cache.errors import ModelError, PromptOverflowError
from prompt_tune.towers import PromptLayout, Stage, image_tower, text_tower

SENTENCES = ["a photo of a basophil.", "a picture of large round cells with dark nuclei", "skin"]
NAMES = ["basophil", "large_round_cell", "monocyte seen under light"]
EXACT = {"rtol": 0, "atol": 1e-12}
KINDS = {
    "clip": ("tiny_clip", {"layers": 3}),
    "biomedclip": ("tiny_biomedclip", {"text_layers": 3}),
    "assembled": ("tiny_assembled", {}),
}


@pytest.fixture(scope="module")
def loaded(tiny_models, tmp_path_factory) -> dict[str, tuple[Any, Any]]:
    folder = tmp_path_factory.mktemp("towers")
    out = {}
    for name, (build, options) in KINDS.items():
        place = getattr(tiny_models, build)(folder / name, **options)
        model = open_clip.create_model(f"local-dir:{place}").double().eval()
        out[name] = model, open_clip.get_tokenizer(f"local-dir:{place}")
    return out


def make_clip(*, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Any:
    """A very small CLIP made directly, for the variants that no configuration file asks for."""
    vision_cfg = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text_cfg = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    make = open_clip.model.CustomTextCLIP
    model = make(8, {**vision_cfg, **(vision or {})}, {**text_cfg, **(text or {})})
    return model.double().eval()


# ---- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_plain_texts_equal_open_clip(loaded, kind):
    model, tokenizer = loaded[kind]
    tower = text_tower(model, tokenizer)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(SENTENCES))
    torch.testing.assert_close(tower.encode_texts(SENTENCES), expected, **EXACT)
    torch.testing.assert_close(tower.encode_texts(SENTENCES, batch_size=2), expected, **EXACT)
    assert tower.embed_dim == expected.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_of_words_equals_open_clip_on_the_sentence(loaded, kind):
    model, tokenizer = loaded[kind]
    tower = text_tower(model, tokenizer)
    ids = tower.tokenize(["a photo of a"])[0][1:-1]
    assert len(ids) == 4
    layout = PromptLayout.build(tower, NAMES, n_context=4)
    sentences = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(sentences))
    ours = tower.encode(layout, [Stage(tower.embed(ids))])
    torch.testing.assert_close(ours, expected[None], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_words_equal_open_clip_on_the_sentence(loaded, kind):
    model, tokenizer = loaded[kind]
    tower = text_tower(model, tokenizer)
    words = ["dark", "round", "cell", "with", "pink", "blue", "skin"]
    ids = [tower.tokenize([w])[0][1:-1] for w in words]
    assert all(len(i) == 1 for i in ids)
    rows = tower.embed([i[0] for i in ids])
    context = tower.embed(tower.tokenize(["a photo of a"])[0][1:-1])
    counts = [7, 3, 5]
    layout = PromptLayout.build(tower, NAMES, n_context=4, row_counts=counts, intervened=(2, 1))
    stage = Stage(
        context,
        prefix=rows[:2].expand(1, 3, -1, -1),
        suffix=torch.stack([rows[n - 1 : n] for n in counts])[None],
        middle=torch.cat([rows[2 : n - 1] for n in counts]),
    )
    sentences = [
        f"a photo of a {' '.join(words[:n])} {name.replace('_', ' ')}."
        for name, n in zip(NAMES, counts, strict=True)
    ]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(sentences))
    torch.testing.assert_close(tower.encode(layout, [stage]), expected[None], **EXACT)


def test_shapes_are_read_from_the_model(loaded):
    for kind, expected in {
        "clip": ("causal", 32, 3, 24, 77),
        "biomedclip": ("bert", 48, 3, 24, 256),
        "assembled": ("bert", 48, 3, 24, 128),
    }.items():
        t = text_tower(*loaded[kind])
        assert (t.kind, t.width, t.depth, t.embed_dim, t.context_length) == expected
    for kind, size in {"clip": (32, 3, 24, 32), "biomedclip": (64, 6, 24, 160)}.items():
        i = image_tower(loaded[kind][0])
        assert (i.width, i.depth, i.embed_dim, i.image_size) == size


def test_texts_are_never_cut(loaded):
    tower = text_tower(*loaded["clip"])
    long = "cell " * 80
    assert len(tower.tokenize([long])[0]) == 82
    with pytest.raises(PromptOverflowError, match="found 82 tokens, wanted at most 77"):
        tower.encode_texts([long])
    bert = text_tower(*loaded["biomedclip"])
    with pytest.raises(PromptOverflowError, match="found 302 tokens, wanted at most 256"):
        bert.encode_texts(["cell " * 300])


def test_text_depth_is_at_most_the_towers(loaded):
    tower = text_tower(*loaded["clip"])
    layout = PromptLayout.build(tower, NAMES, n_context=1)
    stage = Stage(torch.zeros(1, tower.width))
    with pytest.raises(ModelError, match="does not fit the text tower; found 4, wanted 1 to 3"):
        tower.encode(layout, [stage] * 4)
    with pytest.raises(ModelError, match="found 0, wanted 1 to 3"):
        tower.encode(layout, [])


def test_towers_are_frozen_and_in_eval_mode(loaded):
    model, tokenizer = loaded["biomedclip"]
    model.train().requires_grad_(True)
    text_tower(model, tokenizer)
    image_tower(model)
    for part in (model.text, model.visual):
        assert not any(p.requires_grad for p in part.parameters())
        assert not any(m.training for m in part.modules())


@pytest.mark.parametrize("pooler", ["cls_pooler", "cls_last_hidden_state_pooler", "mean_pooler"])
@pytest.mark.parametrize("projection", ["linear", "mlp", None])
def test_bert_poolers_and_projections(tiny_models, tmp_path, pooler, projection):
    size = tiny_models.save_tokenizer(tmp_path)
    tiny_models.save_bert_config(tmp_path, size, width=16, layers=2, heads=2)
    torch.manual_seed(0)
    encoder = open_clip.hf_model.HFTextEncoder(
        str(tmp_path), 8 if projection else 16, None, pooler, projection, pretrained=False
    )
    encoder = encoder.double().eval()
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=32)
    tower = text_tower(SimpleNamespace(text=encoder), tokenizer)
    ids = tower.tokenize(["a photo of a"])[0][1:-1]
    layout = PromptLayout.build(tower, NAMES, n_context=4)
    with torch.no_grad():
        sentences = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
        expected = encoder(tokenizer(sentences))
    ours = tower.encode(layout, [Stage(tower.embed(ids))])
    torch.testing.assert_close(ours, expected[None], **EXACT)
    assert tower.embed_dim == expected.shape[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"proj_bias": True},
        {"proj_type": "none"},
        {"ls_init_value": 0.3},
        {"pool_type": "eos", "eos_id": 49407},
    ],
    ids=str,
)
def test_variants_of_the_causal_tower(options):
    model = make_clip(text=options)
    tower = text_tower(model, SimpleTokenizer(context_length=16))
    layout = PromptLayout.build(tower, NAMES, n_context=4)
    ids = tower.tokenize(["a photo of a"])[0][1:-1]
    sentences = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    with torch.no_grad():
        expected = model.encode_text(tower.tokenizer(sentences))
    ours = tower.encode(layout, [Stage(tower.embed(ids))])
    torch.testing.assert_close(ours, expected[None], **EXACT)
    assert tower.embed_dim == expected.shape[1]


def test_float32_follows_the_model(loaded, tiny_models, tmp_path):
    place = tiny_models.tiny_clip(tmp_path / "clip", layers=2)
    model = open_clip.create_model(f"local-dir:{place}").eval()
    tower = text_tower(model, open_clip.get_tokenizer(f"local-dir:{place}"))
    layout = PromptLayout.build(tower, NAMES, n_context=2)
    context = torch.zeros(2, 32, dtype=torch.float64)
    single = tower.encode(layout, [Stage(context)] * 2)
    assert single.dtype == torch.float32
    model.double()  # what was computed before in float32 is not used again
    double = tower.encode(layout, [Stage(context)] * 2)
    assert double.dtype == torch.float64
    fresh = text_tower(model, tower.tokenizer).encode(layout, [Stage(context)] * 2)
    torch.testing.assert_close(double, fresh, **EXACT)


# ---- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [None, []])
def test_images_without_prompts_equal_open_clip(loaded, kind, prompts):
    model, _ = loaded[kind]
    tower = image_tower(model)
    images = torch.randn(3, 3, tower.image_size, tower.image_size).double()
    with torch.no_grad():
        expected = model.encode_image(images)
    torch.testing.assert_close(tower.encode(images, prompts), expected, **EXACT)
    assert tower.embed_dim == expected.shape[1]


@pytest.mark.parametrize(
    "options",
    [
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"final_ln_after_pool": True},
        {"no_ln_pre": True},
        {"ls_init_value": 0.3},
        {"patch_dropout": 0.5},
    ],
    ids=str,
)
def test_variants_of_the_open_clip_tower(options):
    model = make_clip(vision=options)
    images = torch.randn(2, 3, 16, 16).double()
    with torch.no_grad():
        expected = model.encode_image(images)
    torch.testing.assert_close(image_tower(model).encode(images), expected, **EXACT)


@pytest.mark.parametrize(
    ("trunk", "options"),
    [
        ("test_vit", {"timm_pool": "avg"}),
        ("test_vit", {"timm_pool": "token", "timm_proj": "mlp"}),
        ("test_vit", {"timm_pool": "token", "timm_proj": "none"}),
        ("test_vit", {"timm_pool": "token", "timm_proj": ""}),
        ("test_vit2", {"timm_pool": ""}),  # layer scale, a register token, averaged
        ("test_vit4", {"timm_pool": ""}),
    ],
    ids=str,
)
def test_variants_of_the_timm_tower(trunk, options):
    cfg = {"timm_model_name": trunk, "timm_model_pretrained": False, "image_size": 160}
    model = make_clip(vision={**cfg, **options})
    with torch.no_grad():
        for p in model.visual.parameters():
            if p.ndim < 2 or p.shape[0] == 1:  # fresh norms, scales and register tokens say nothing
                p += 0.3 * torch.randn_like(p)
        size = model.visual.trunk.patch_embed.img_size[0]
        images = torch.randn(1, 3, size, size).double()
        expected = model.encode_image(images)
    tower = image_tower(model)
    torch.testing.assert_close(tower.encode(images), expected, **EXACT)
    assert tower.embed_dim == expected.shape[1]


def test_visual_depth_is_at_most_the_towers(loaded):
    tower = image_tower(loaded["clip"][0])
    images = torch.zeros(1, 3, 32, 32).double()
    with pytest.raises(ModelError, match="does not fit the image tower; found 4, wanted 0 to 3"):
        tower.encode(images, [torch.zeros(2, 32)] * 4)
    with pytest.raises(ValueError, match="visual prompts of one run have one shape"):
        tower.encode(images, [torch.zeros(2, 32), torch.zeros(3, 32)])


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_causal_mask": True}, "TextTransformer with attention without a causal mask"),
        ({"embed_cls": True}, "TextTransformer with an appended class token"),
        ({"pool_type": "last"}, "TextTransformer with pooling 'last'"),
        ({"qk_norm": True}, "text tower is built of blocks .* found CustomResidualAttentionBlock"),
    ],
)
def test_text_towers_that_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        text_tower(make_clip(text=options), SimpleTokenizer(context_length=16))


def test_another_text_pooler_is_named(loaded):
    model, tokenizer = loaded["biomedclip"]
    kept, model.text.pooler = model.text.pooler, open_clip.hf_model.MaxPooler()
    try:
        with pytest.raises(ModelError, match="text pooler is not supported; found MaxPooler"):
            text_tower(model, tokenizer)
    finally:
        model.text.pooler = kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 1, 1, 1), "image_size": 32}, "found ModifiedResNet"),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "VisionTransformer with pooling att"),
        ({"pool_type": "none"}, "VisionTransformer with pooling 'none'"),
        ({"image_size": (16, 24)}, "images are not square; found 16 x 24"),
        (
            {"timm_model_name": "test_vit", "timm_pool": "max", "image_size": 160},
            "timm's VisionTransformer with pooling 'max'",
        ),
        (
            {"timm_model_name": "test_resnet", "timm_pool": "avg", "image_size": 160},
            "found timm's ResNet",
        ),
    ],
)
def test_image_towers_that_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        image_tower(make_clip(vision=options))


def test_timm_attention_that_is_refused():
    model = make_clip(vision={"timm_model_name": "test_vit", "image_size": 160})
    options = {"num_classes": 0, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model.visual.trunk = VisionTransformer(16, 8, qk_norm=True, **options)
    with pytest.raises(ModelError, match="timm's Attention with normalised queries or a gate"):
        image_tower(model)
    model.visual.trunk = VisionTransformer(16, 8, block_fn=ParallelScalingBlock, **options)
    with pytest.raises(ModelError, match="timm's ParallelScalingBlock with"):
        image_tower(model)


def test_other_bert_like_encoders_are_named(tiny_models, tmp_path):
    from transformers import RobertaConfig

    RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path)
    encoder = open_clip.hf_model.HFTextEncoder(
        str(tmp_path), 8, None, "mean_pooler", "linear", pretrained=False
    )
    with pytest.raises(ModelError, match="text tower is not supported; found RobertaModel"):
        text_tower(SimpleNamespace(text=encoder), None)
    with pytest.raises(ModelError, match="text tower is not supported; found SimpleNamespace"):
        text_tower(SimpleNamespace(), None)
    with pytest.raises(ModelError, match="image tower is not supported; found NoneType"):
        image_tower(SimpleNamespace())
