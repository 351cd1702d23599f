from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cache.errors import ModelError, PromptOverflowError, RecipeError
from cache.recipe import validate
from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.method import Batch, KnowledgeRows, Problem
from prompt_tune.methods.cilmp import CILMP, CilmpConfig

NAMES = ("basophil", "red blood cell", "normal")
WIDTH = 24
ROWS = KnowledgeRows(
    tuple(torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (6, 8, 7))
)
SMALL: dict[str, Any] = {"prefix": 2, "suffix": 2, "rank": 3, "visual_prompts": 2}


@pytest.fixture(scope="module")
def backbone(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder: Path = tiny_models.tiny_clip(tmp_path_factory.mktemp("clip"), layers=3)
    loaded = load_backbone(BackboneSpec(folder=str(folder)))
    return loaded.with_model(loaded.model.double(), note="float64")


def build(backbone: Backbone, rows: KnowledgeRows | None = ROWS, **settings: Any) -> CILMP:
    torch.manual_seed(1)
    names = NAMES if rows is None else NAMES[: len(rows.values)]
    method = CILMP(CilmpConfig(**(SMALL | settings)), Problem(backbone, names, rows=rows))
    return method.double().eval()


def images(count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(count, 3, 32, 32, generator=generator).double()
    return Batch(torch.arange(count) % 3, images=pixels)


class RealSize:
    """The sizes and token ids of CLIP ViT-B/16, without its weights."""

    width, depth, embed_dim, context_length = 512, 12, 512, 77

    def tokenize(self, texts: Any) -> list[list[int]]:
        return [[0, *range(1, len(t.replace(".", " .").split()) + 1), 9] for t in texts]

    def embed(self, ids: Any) -> torch.Tensor:
        return torch.zeros(len(ids), 512)


def real_size(**settings: Any) -> CILMP:
    backbone: Any = SimpleNamespace(
        text=RealSize(), image=SimpleNamespace(width=768, depth=12), logit_scale=1.0, embed_dim=512
    )
    rows = KnowledgeRows(tuple(torch.zeros(32, 4096) for _ in range(3)))
    return CILMP(CilmpConfig(**settings), Problem(backbone, NAMES, rows=rows))


def test_the_published_configuration_trains_the_published_numbers() -> None:
    method = real_size()
    sizes = {name: p.numel() for name, p in method.trainable().items()}
    assert len(sizes) == 216
    assert sum(sizes.values()) == 3_846_528
    groups = dict.fromkeys(("prefix", "suffix", "projection", "context", "visual_prompt"), 0)
    for name, size in sizes.items():
        groups[next(g for g in groups if g in name)] += size
    assert groups == {
        "prefix": 1_671_360,
        "suffix": 1_671_360,
        "projection": 442_368,
        "context": 24_576,
        "visual_prompt": 36_864,
    }
    assert len(method.prompts()) == 24
    assert sum(sizes[n] for n in method.prompts()) == 24_576 + 36_864
    assert set(method.state_dict()) == set(sizes)


def test_the_published_precision_keeps_the_published_tensors_in_fp16() -> None:
    trained = real_size(precision="published").trainable()
    half = {n for n, p in trained.items() if p.dtype == torch.float16}
    assert sum(trained[n].numel() for n in half) == 2_345_312
    assert sum(p.numel() for n, p in trained.items() if n not in half) == 1_501_216
    assert "stage.0.context" in half
    assert "stage.0.prefix.W" not in half
    assert "stage.11.suffix.b2" in half
    assert "stage.11.suffix.R" not in half


def test_a_published_step_updates_fp16_parameters_in_fp16(
    tiny_models: ModuleType, tmp_path: Path
) -> None:
    backbone = load_backbone(BackboneSpec(folder=str(tiny_models.tiny_clip(tmp_path / "clip"))))
    config = CilmpConfig(**SMALL, precision="published", text_depth=2)
    method = CILMP(config, Problem(backbone, NAMES, rows=ROWS)).train()
    before = {n: p.detach().clone() for n, p in method.trainable().items()}
    optimizer = torch.optim.SGD(method.trainable().values(), lr=0.1, momentum=0.9)
    batch = images()
    assert batch.images is not None
    method.loss(Batch(batch.labels, images=batch.images.float())).backward()
    optimizer.step()
    for name, parameter in method.trainable().items():
        assert parameter.dtype == before[name].dtype
        assert parameter.isfinite().all()
    moved = method.trainable()["stage.1.prefix.U2"]
    assert not torch.equal(moved, before["stage.1.prefix.U2"])


def test_names_of_parameters_say_what_they_are(backbone: Backbone) -> None:
    names = set(build(backbone).trainable())
    assert {"stage.2.prefix.R", "stage.2.projection.A", "stage.2.context"} <= names
    assert {"visual_prompt.0", "visual_prompt.2"} <= names
    assert build(backbone).prompts() == {
        *(f"stage.{k}.context" for k in range(3)),
        *(f"visual_prompt.{k}" for k in range(3)),
    }


def test_without_condition_there_is_no_image_term(backbone: Backbone) -> None:
    method = build(backbone, condition="none", visual_depth=0)
    trained = method.trainable()
    assert trained["stage.0.prefix.W"].shape == (3, WIDTH)
    assert not any(".U" in n or n.endswith((".b1", ".b2")) for n in trained)
    assert method.text_features(torch.randn(5, 24).double()).shape[0] == 1


def test_classes_are_independent_of_their_order(backbone: Backbone) -> None:
    order = [2, 0, 1]
    method = build(backbone)
    rows = KnowledgeRows(tuple(ROWS.values[i] for i in order))
    names = tuple(NAMES[i] for i in order)
    other = CILMP(CilmpConfig(**SMALL), Problem(backbone, names, rows=rows)).double().eval()
    other.load_state_dict(method.state_dict())
    found, true = other.logits(images()), method.logits(images())[:, order]
    assert torch.allclose(found, true, rtol=0, atol=1e-10)


def test_an_image_alone_is_the_image_in_its_batch(backbone: Backbone) -> None:
    method, batch = build(backbone), images()
    together = method.logits(batch)
    assert batch.images is not None
    for i in range(3):
        alone = method.logits(Batch(batch.labels[i : i + 1], images=batch.images[i : i + 1]))
        assert torch.allclose(alone[0], together[i], rtol=0, atol=1e-10)


def test_the_condition_reaches_the_visual_prompts(backbone: Backbone) -> None:
    method, batch = build(backbone), images()
    v = method.image_features(batch)
    text = method.text_features(v)
    (grad,) = torch.autograd.grad(text.sum(), method.trainable()["visual_prompt.2"])
    assert grad.abs().max() > 0


def test_knowledge_and_image_both_matter(backbone: Backbone) -> None:
    method = build(backbone, visual_depth=0)
    v = torch.nn.functional.normalize(torch.randn(2, 24).double(), dim=-1)
    text = method.text_features(v)
    assert (text[0] - text[1]).abs().amax(-1).min() > 1e-6
    other = build(backbone, KnowledgeRows(tuple(-h for h in ROWS.values)), visual_depth=0)
    assert (other.text_features(v) - text).abs().amax(-1).min() > 1e-3


def test_without_rows_one_shallow_stage_is_the_plain_caption(backbone: Backbone) -> None:
    method = build(backbone, None, text_depth=1, visual_depth=0)
    assert set(method.trainable()) == {"stage.0.context"}
    text = method.text_features(torch.randn(2, 24).double())
    true = backbone.text.encode_texts([f"a photo of a {n}." for n in NAMES])
    # The starting context went through float32.
    assert torch.allclose(text[0], true, rtol=0, atol=1e-5)
    deep = build(backbone, None)
    assert set(deep.trainable()) == deep.prompts()
    assert deep.logits(images()).shape == (3, 3)


def test_dropout_is_drawn_in_training_from_the_global_generator(backbone: Backbone) -> None:
    method, batch = build(backbone), images()
    calm = method.logits(batch)
    method.train()
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(method.logits(batch))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], calm)
    still = build(backbone, dropout=0.0).train()
    assert torch.equal(still.logits(batch), still.eval().logits(batch))


def test_cached_features_serve_where_there_are_no_visual_prompts(backbone: Backbone) -> None:
    method, batch = build(backbone, visual_depth=0), images()
    assert not method.reads_images
    assert batch.images is not None
    features = backbone.image.encode(batch.images)
    cached = method.logits(Batch(batch.labels, features=features))
    assert torch.allclose(cached, method.logits(batch), rtol=0, atol=1e-12)


def test_visual_prompts_need_pixels(backbone: Backbone) -> None:
    method = build(backbone)
    assert method.reads_images
    with pytest.raises(ValueError, match="visual prompts need images"):
        method.logits(Batch(torch.tensor([0]), features=torch.randn(1, 24).double()))


def test_the_context_starts_from_its_words(backbone: Backbone) -> None:
    words = backbone.text.embed(backbone.text.tokenize(["a photo of a"])[0][1:-1])
    start = build(backbone).trainable()["stage.0.context"]
    assert torch.allclose(start, words, rtol=0, atol=1e-6)
    longer = build(backbone, n_context=6).trainable()["stage.0.context"]
    assert torch.allclose(longer[:4], words, rtol=0, atol=1e-6)
    assert 0 < longer[4:].abs().max() < 0.1
    free = build(backbone, context=None).trainable()["stage.0.context"]
    assert free.abs().max() < 0.1


def test_every_row_may_be_intervened_on(backbone: Backbone) -> None:
    method = build(backbone, KnowledgeRows((torch.randn(4, WIDTH), torch.randn(4, WIDTH))))
    assert method.rows is not None
    assert len(method.rows.middle) == 0
    assert method.logits(images()).isfinite().all()


@pytest.mark.parametrize("group", ["prefix", "suffix"])
def test_a_group_of_no_rows_has_no_parameters(backbone: Backbone, group: str) -> None:
    method = build(backbone, **{group: 0})
    assert not any(f".{group}." in n for n in method.trainable())
    assert method.train().logits(images()).isfinite().all()


def test_too_few_rows_name_the_class(backbone: Backbone) -> None:
    message = (
        r"class 'red blood cell': too few knowledge rows; found 3, "
        r"wanted at least prefix \+ suffix = 4\. Lower method\.prefix"
    )
    with pytest.raises(RecipeError, match=message):
        build(backbone, KnowledgeRows((torch.randn(4, WIDTH), torch.randn(3, WIDTH))))


def test_rows_of_unequal_width_name_the_class(backbone: Backbone) -> None:
    message = r"class 'red blood cell': knowledge rows differ in width; found \[6, 25\]"
    with pytest.raises(RecipeError, match=message):
        build(backbone, KnowledgeRows((torch.randn(6, WIDTH), torch.randn(6, WIDTH + 1))))


def test_rows_of_other_classes_are_refused(backbone: Backbone) -> None:
    with pytest.raises(RecipeError, match="not those of the classes; found 3 classes, wanted 2"):
        CILMP(CilmpConfig(**SMALL), Problem(backbone, NAMES[:2], rows=ROWS))


def test_a_rank_above_the_width_is_refused(backbone: Backbone) -> None:
    with pytest.raises(RecipeError, match=r"method\.rank: the rank exceeds .* at most 24"):
        build(backbone, rank=25)


@pytest.mark.parametrize("tower", ["text", "visual"])
def test_prompts_deeper_than_the_tower_are_refused(backbone: Backbone, tower: str) -> None:
    message = rf"method\.{tower}_depth: the {tower} prompts are deeper .* found 4, wanted at most 3"
    with pytest.raises(ModelError, match=message):
        build(backbone, **{f"{tower}_depth": 4})


def test_a_context_text_longer_than_the_context_is_refused(backbone: Backbone) -> None:
    message = r"method\.context: .* does not fit; found 4 tokens, wanted at most n_context = 3"
    with pytest.raises(RecipeError, match=message):
        build(backbone, n_context=3)


def test_more_rows_than_the_context_holds_are_refused(backbone: Backbone) -> None:
    with pytest.raises(PromptOverflowError, match=r"class 'basophil'.* 80 knowledge"):
        build(backbone, KnowledgeRows((torch.randn(80, WIDTH),)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "method: dropout: wrong value; found 1.0, wanted < 1"),
        ({"text_depth": 0}, "method: text_depth: "),
        ({"rnak": 8}, "unknown key 'rnak'. Did you mean 'rank'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(CilmpConfig, {"name": "cilmp"} | settings, where="method")
