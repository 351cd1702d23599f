"""The live-token engine against a plain computation of every position, by the libraries' blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from prompt_tune.towers import PromptLayout, Stage, image_tower, text_tower

NAMES = ("basophil", "large round cell", "immature granulocytes segmented", "skin")
LAYERS = 3
QUICK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def models(tiny_models, tmp_path_factory) -> dict[str, tuple[Any, Any]]:
    folder = tmp_path_factory.mktemp("towers")
    places = {
        "causal": tiny_models.tiny_clip(folder / "clip", layers=LAYERS),
        "bert-cls": tiny_models.tiny_biomedclip(folder / "bert", text_layers=LAYERS),
        "bert-mean": tiny_models.tiny_assembled(folder / "mean", text_layers=LAYERS),
    }
    loaded = {}
    for name, place in places.items():
        model = open_clip.create_model(f"local-dir:{place}").double().eval()
        with torch.no_grad():  # fresh weights are so small that attention would be uniform
            for key, weight in model.named_parameters():
                if weight.ndim == 2 and ("encoder.layer" in key or "trunk.blocks" in key):
                    weight *= 6
        loaded[name] = model, open_clip.get_tokenizer(f"local-dir:{place}")
    return loaded


# ---- the plain computation ----------------------------------------------------------------------


def plain_text(model: Any, layout: PromptLayout, stages: list[Stage], batch: int) -> Tensor:
    """Every position of every class, one class at a time: [batch, classes, embed]."""
    return torch.stack(
        [_plain_class(model, layout, stages, batch, c) for c in range(layout.classes)], dim=1
    )


def _plain_class(model, layout, stages, batch, c) -> Tensor:
    text = getattr(model, "text", model)
    causal = not hasattr(text, "pooler")
    table = text.token_embedding if causal else text.transformer.embeddings.word_embeddings
    name = table(torch.tensor([*layout.name_ids[c], layout.end_id]))
    start = table(torch.tensor([layout.start_id]))
    prompt = _prompt(layout, stages[0], batch, c)
    x = torch.cat([start.expand(batch, -1, -1), prompt, name.expand(batch, -1, -1)], dim=1)
    length = x.shape[1]
    if causal:
        blocks = text.transformer.resblocks
        x = x + text.positional_embedding[:length]
    else:
        blocks = text.transformer.encoder.layer
        e = text.transformer.embeddings
        x = x + e.position_embeddings.weight[:length] + e.token_type_embeddings.weight[0]
        x = e.LayerNorm(x)
    for k, block in enumerate(blocks):
        if 0 < k < len(stages):
            prompt = _prompt(layout, stages[k], batch, c)
            x = torch.cat([x[:, :1], prompt, x[:, 1 + prompt.shape[1] :]], dim=1)
        mask = {"attn_mask": text.attn_mask[:length, :length].double()} if causal else {}
        x = block(x, **mask)
    if causal:
        return text.ln_final(x[:, -1]) @ text.text_projection
    mean = type(text.pooler).__name__ == "MeanPooler"
    return text.proj(x.mean(dim=1) if mean else x[:, 0])


def _prompt(layout: PromptLayout, stage: Stage, batch: int, c: int) -> Tensor:
    context = stage.context if stage.context.ndim == 2 else stage.context[c]
    rows = [context.expand(batch, -1, -1)]
    if layout.row_counts[c] and stage.prefix is not None:
        edge = stage.prefix.shape[2] + stage.suffix.shape[2]
        at = sum(n - edge for n in layout.row_counts[:c])
        middle = stage.middle[at : at + layout.row_counts[c] - edge]
        rows += [stage.prefix[:, c], middle.expand(batch, -1, -1), stage.suffix[:, c]]
    return torch.cat([r.expand(batch, -1, -1) for r in rows], dim=1)


def random_stages(width, counts, *, stages, batch, edges, per_class, seed) -> list[Stage]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    classes, (p, s) = len(counts), edges
    return [
        Stage(
            context=draw(classes, 2, width) if per_class else draw(2, width),
            prefix=draw(batch, classes, p, width),
            suffix=draw(batch, classes, s, width),
            middle=draw(sum(counts) - classes * (p + s), width),
        )
        for _ in range(stages)
    ]


def tensors(stages: list[Stage]) -> list[Tensor]:
    every = [x for s in stages for x in (s.context, s.prefix, s.suffix, s.middle)]
    return [x for x in every if x.numel()]


def compare(fast: Tensor, plain: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
    weight = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1)).double()
    ours = torch.autograd.grad((fast * weight).sum(), inputs)
    theirs = torch.autograd.grad((plain * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.norm()) > 1e-6
        assert float((a - b).norm() / b.norm()) < 1e-10


# ---- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "bert-cls", "bert-mean"])
@QUICK
@given(
    counts=st.lists(st.integers(3, 7), min_size=1, max_size=4),
    stages=st.integers(1, LAYERS),
    batch=st.integers(1, 3),
    per_class=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_engine_equals_the_computation_of_every_position(
    models, kind, counts, stages, batch, per_class, seed
):
    model, tokenizer = models[kind]
    tower = text_tower(model, tokenizer)
    names = NAMES[: len(counts)]
    layout = PromptLayout.build(tower, names, n_context=2, row_counts=counts, intervened=(2, 1))
    given = random_stages(
        tower.width,
        counts,
        stages=stages,
        batch=batch,
        edges=(2, 1),
        per_class=per_class,
        seed=seed,
    )
    compare(tower.encode(layout, given), plain_text(model, layout, given, batch), tensors(given))


@pytest.mark.parametrize("kind", ["causal", "bert-cls", "bert-mean"])
@pytest.mark.parametrize("stages", range(1, LAYERS + 1))
def test_every_text_depth_with_ragged_rows(models, kind, stages):
    model, tokenizer = models[kind]
    tower = text_tower(model, tokenizer)
    counts = [3, 9, 5, 3]  # the first and last class have no middle rows
    layout = PromptLayout.build(tower, NAMES, n_context=2, row_counts=counts, intervened=(2, 1))
    given = random_stages(
        tower.width, counts, stages=stages, batch=2, edges=(2, 1), per_class=False, seed=5
    )
    compare(tower.encode(layout, given), plain_text(model, layout, given, 2), tensors(given))


@pytest.mark.parametrize("kind", ["causal", "bert-mean"])
def test_many_name_tokens_take_the_other_attention_path(models, kind):
    model, tokenizer = models[kind]
    tower = text_tower(model, tokenizer)
    names = ["large round cell", " ".join(["segmented dark nucleus"] * 4)]
    layout = PromptLayout.build(tower, names, n_context=2, row_counts=[4, 6], intervened=(1, 1))
    assert 3 * layout.parts["name"].longest > 2 * (tower.width // tower.blocks[0].heads)
    given = random_stages(
        tower.width, [4, 6], stages=2, batch=2, edges=(1, 1), per_class=True, seed=8
    )
    compare(tower.encode(layout, given), plain_text(model, layout, given, 2), tensors(given))


@pytest.mark.parametrize("kind", ["causal", "bert-cls", "bert-mean"])
def test_one_image_alone_gives_its_row_of_the_batch(models, kind):
    tower = text_tower(*models[kind])
    counts = [5, 4]
    layout = PromptLayout.build(tower, NAMES[:2], n_context=2, row_counts=counts, intervened=(2, 2))
    given = random_stages(
        tower.width, counts, stages=2, batch=3, edges=(2, 2), per_class=False, seed=2
    )
    together = tower.encode(layout, given)
    assert (together[0] - together[1]).abs().max() > 1e-3
    for i in range(3):
        alone = [
            Stage(s.context, s.prefix[i : i + 1], s.suffix[i : i + 1], s.middle) for s in given
        ]
        torch.testing.assert_close(tower.encode(layout, alone)[0], together[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["causal", "bert-mean"])
def test_a_context_may_depend_on_the_image(models, kind):
    tower = text_tower(*models[kind])
    layout = PromptLayout.build(tower, NAMES[:2], n_context=2)
    g = torch.Generator().manual_seed(0)
    contexts = torch.randn(3, 2, 2, tower.width, generator=g, dtype=torch.float64)
    together = tower.encode(layout, [Stage(contexts), Stage(contexts * 2)])
    for i in range(3):
        alone = tower.encode(layout, [Stage(contexts[i]), Stage(contexts[i] * 2)])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-12)


# ---- images -------------------------------------------------------------------------------------


def plain_image(model: Any, images: Tensor, prompts: list[Tensor]) -> Tensor:
    """Every position, with the library's blocks."""
    visual = model.visual
    timm = hasattr(visual, "trunk")
    n = prompts[0].shape[0] if prompts else 0
    if timm:
        trunk = visual.trunk
        x, norm, blocks = trunk._pos_embed(trunk.patch_embed(images)), trunk.norm_pre, trunk.blocks
    else:
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + visual.positional_embedding
        norm, blocks = visual.ln_pre, visual.transformer.resblocks
    x = norm(torch.cat([x, *(p.expand(x.shape[0], -1, -1) for p in prompts[:1])], dim=1))
    for k, block in enumerate(blocks):
        if 0 < k < len(prompts):
            x = torch.cat([x[:, :-n], prompts[k].expand(x.shape[0], -1, -1)], dim=1)
        x = block(x)
    if timm:
        return visual.head(visual.trunk.head(visual.trunk.norm(x)[:, 0]))
    if visual.pool_type == "avg":
        return visual.ln_post(x)[:, 1 : x.shape[1] - n].mean(dim=1) @ visual.proj
    return visual.ln_post(x[:, 0]) @ visual.proj


def _image_case(model: Any, stages: int) -> None:
    tower = image_tower(model)
    g = torch.Generator().manual_seed(stages)
    size = tower.image_size
    images = torch.randn(2, 3, size, size, generator=g, dtype=torch.float64)
    prompts = [
        torch.randn(3, tower.width, generator=g, dtype=torch.float64).requires_grad_()
        for _ in range(stages)
    ]
    compare(tower.encode(images, prompts), plain_image(model, images, prompts), prompts)


@contextmanager
def cut_to(model: Any, depth: int, pool: str) -> Iterator[None]:
    """The image tower with its first blocks only, and another pooling."""
    visual = model.visual
    if hasattr(visual, "trunk"):
        holder, name, pooling, wanted = visual.trunk, "blocks", visual.trunk, "token"
        option = "global_pool"
    else:
        holder, name, pooling, wanted = visual.transformer, "resblocks", visual, pool
        option = "pool_type"
    kept, used = getattr(holder, name), getattr(pooling, option)
    setattr(holder, name, kept[:depth])
    setattr(pooling, option, wanted)
    try:
        yield
    finally:
        setattr(holder, name, kept)
        setattr(pooling, option, used)


@pytest.mark.parametrize("kind", ["causal", "bert-cls"])
@QUICK
@given(
    depth=st.integers(1, LAYERS),
    stages=st.integers(0, LAYERS),
    batch=st.integers(1, 3),
    count=st.integers(1, 4),
    pool=st.sampled_from(["tok", "avg"]),
    seed=st.integers(0, 99),
)
def test_an_image_tower_equals_the_computation_of_every_position(
    models, kind, depth, stages, batch, count, pool, seed
):
    model, g = models[kind][0], torch.Generator().manual_seed(seed)
    with cut_to(model, depth, pool):
        tower = image_tower(model)
        assert len(tower.blocks) == depth

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

        images = draw(batch, 3, tower.image_size, tower.image_size)
        prompts = [draw(count, tower.width) for _ in range(min(stages, depth))]
        found, plain = tower.encode(images, prompts), plain_image(model, images, prompts)
        compare(found, plain, [images, *prompts])


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_visual_depth_of_an_open_clip_tower(models, stages):
    _image_case(models["causal"][0], stages)


@pytest.mark.parametrize("stages", range(1, 7))
def test_every_visual_depth_of_a_timm_tower(models, stages):
    _image_case(models["bert-cls"][0], stages)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_timm_tower_with_a_norm_in_front_and_normed_attention(stages):
    model = open_clip.CustomTextCLIP(
        8,
        {"timm_model_name": "test_vit", "timm_proj": "", "image_size": 16},
        {"context_length": 8, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1},
    )
    torch.manual_seed(0)
    options = {"pre_norm": True, "scale_attn_norm": True, "init_values": 0.5}
    trunk = VisionTransformer(16, 8, num_classes=8, embed_dim=32, depth=2, num_heads=2, **options)
    model.visual.trunk = trunk
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.double().eval()
    _image_case(model, stages)


@pytest.mark.parametrize("stages", [1, 3])
def test_averaging_towers_read_patches_and_no_prompts(models, stages):
    model = models["causal"][0]
    model.visual.pool_type = "avg"
    try:
        _image_case(model, stages)
    finally:
        model.visual.pool_type = "tok"


# ---- nothing dead is computed -------------------------------------------------------------------


class Counting:
    """A block that notes how many rows pass."""

    def __init__(self, block: Any) -> None:
        self.block, self.heads, self.norm = block, block.heads, block.norm
        self.rows = {"query": 0, "key_value": 0, "close": 0}

    def query(self, entered):
        self.rows["query"] += entered.shape[0] * entered.shape[1]
        return self.block.query(entered)

    def key_value(self, entered, *, bias=True):
        self.rows["key_value"] += entered.shape[:-1].numel()
        return self.block.key_value(entered, bias=bias)

    def query_key_value(self, entered):
        return torch.cat([self.query(entered), self.key_value(entered)], dim=-1)

    def close(self, x, attended):
        self.rows["close"] += attended.shape[0] * attended.shape[1]
        return self.block.close(x, attended)


def _counted(tower: Any) -> list[dict[str, int]]:
    tower.blocks = [Counting(b) for b in tower.blocks]
    return [b.rows for b in tower.blocks]


def test_replaced_text_positions_are_keys_and_values_only(models):
    tower = text_tower(*models["causal"])
    counts = [6, 4]
    layout = PromptLayout.build(tower, NAMES[:2], n_context=2, row_counts=counts, intervened=(2, 2))
    given = random_stages(
        tower.width, counts, stages=LAYERS, batch=3, edges=(2, 2), per_class=False, seed=0
    )
    tower.encode(layout, given)  # the start token's states are kept from here on
    rows = _counted(tower)
    tower.encode(layout, given)
    named = sum(map(len, layout.name_ids)) + 2  # both end tokens
    assert [r["close"] for r in rows] == [3 * named, 3 * named, 3 * 2]
    # At block 0 the names do not depend on the image yet.
    assert [r["query"] for r in rows] == [named, 3 * named, 3 * 2]
    rest, intervened = 1 + 2 + 2, 3 * 2 * 4  # start, context, middle; prefix and suffix
    assert [r["key_value"] for r in rows] == [
        rest + intervened + named,
        *[rest + intervened + 3 * named] * 2,
    ]


def test_positions_that_nobody_replaces_are_computed_once_for_all_they_stand_for(models):
    tower = text_tower(*models["causal"])
    counts = [6, 4]
    layout = PromptLayout.build(tower, NAMES[:2], n_context=2, row_counts=counts, intervened=(2, 2))
    given = random_stages(
        tower.width, counts, stages=1, batch=3, edges=(2, 2), per_class=False, seed=0
    )
    tower.encode(layout, given)
    rows = _counted(tower)
    tower.encode(layout, given)
    named = sum(map(len, layout.name_ids)) + 2
    # The context is shared by images and classes, and sees no row that depends on either.
    alive = 2 + 3 * (sum(counts) + named)
    assert [r["close"] for r in rows] == [alive, alive, 3 * 2]


def test_nothing_depends_on_the_image_unless_a_stage_does(models):
    tower = text_tower(*models["bert-cls"])
    layout = PromptLayout.build(tower, NAMES, n_context=2)
    rows = _counted(tower)
    context = torch.zeros(2, tower.width, dtype=torch.float64)
    assert tower.encode(layout, [Stage(context)] * LAYERS).shape == (1, 4, tower.embed_dim)
    named = sum(map(len, layout.name_ids)) + 4
    # The start token sees every class's name, so from block 0 on there is one per class.
    assert [r["close"] for r in rows] == [4 + named, 4 + named, 4]


def test_the_last_image_block_computes_what_is_pooled(models):
    tower = image_tower(models["causal"][0])
    rows = _counted(tower)
    prompts = [torch.zeros(3, tower.width, dtype=torch.float64)] * LAYERS
    tower.encode(torch.zeros(2, 3, 32, 32, dtype=torch.float64), prompts)
    assert [r["close"] for r in rows] == [2 * 17, 2 * 17, 2]
    assert [r["key_value"] for r in rows] == [2 * 17 + 3] * 3
