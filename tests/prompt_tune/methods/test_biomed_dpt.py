"""Biomed-DPT against its equations, and zeroed patches against open_clip's blocks with hooks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cache.errors import ModelError, RecipeError
from cache.recipe import validate
from prompt_tune.backbone import Backbone
from prompt_tune.method import Batch
from prompt_tune.methods.biomed_dpt import TEMPLATES, WEIGHTS
from prompt_tune.published import averaged_backbone
from prompt_tune.recipe import TuneRecipe
from prompt_tune.setup import prepare
from prompt_tune.towers import image_tower

TEMPLATE = "a chest X-ray photo of a {} in the lung."


@pytest.fixture(scope="module")
def plain(load: Callable[[Path], ModuleType]) -> Any:
    return load(Path(__file__).with_name("plain.py"))


def with_zeros(
    model: Any, images: Tensor, count: int, prompts: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """open_clip's `encode_image` with the first patches overwritten before every block, and prompts
    behind the last patch; and the last block's output."""
    visual = model.visual
    timm = hasattr(visual, "trunk")
    blocks = list(visual.trunk.blocks if timm else visual.transformer.resblocks)
    norm = visual.trunk.norm_pre if timm else visual.ln_pre

    def overwrite(block: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, k = inputs[0].clone(), blocks.index(block)
        x[:, 1 : 1 + count] = 0
        if k < len(prompts):
            own = prompts[k] if k else norm(prompts[k])
            kept = x[:, : -len(own)] if k else x
            x = torch.cat([kept, own.expand(len(x), -1, -1)], dim=1)
        return (x, *inputs[1:])

    last: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(overwrite) for b in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _m, _i, out: last.append(out)))
    try:
        return model.encode_image(images), last[0]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("count", [1, 4])
def test_zeroed_patches_are_those_of_hooks_on_the_blocks(
    plain: Any, double_backbone: Backbone, count: int
) -> None:
    size = double_backbone.image.image_size
    images = plain.normal(2, 3, size, size).requires_grad_()
    expected, _ = with_zeros(double_backbone.model, images, count)
    found = double_backbone.image.zeroing(count).encode(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - double_backbone.image.encode(images)).abs().max() > 1e-6
    wanted, got = (torch.autograd.grad(x.square().sum(), images)[0] for x in (expected, found))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_zeroed_patches_stand_beside_prompts(plain: Any, double_backbone: Backbone) -> None:
    tower = double_backbone.image.zeroing(4)
    images = plain.normal(2, 3, tower.image_size, tower.image_size)
    prompts = [plain.normal(3, tower.width, seed=k) for k in range(2)]
    expected, _ = with_zeros(double_backbone.model, images, 4, prompts)
    torch.testing.assert_close(tower.encode(images, prompts), expected, rtol=0, atol=1e-12)


def test_an_averaging_tower_leaves_zeroed_patches_out(plain: Any) -> None:
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4}
    text = {"context_length": 16, "vocab_size": 99, "width": 16, "heads": 2, "layers": 2}
    model = open_clip.model.CustomTextCLIP(8, {**vision, "pool_type": "avg"}, text)
    model = model.double().eval()
    images = plain.normal(2, 3, 16, 16)
    with torch.no_grad():
        _, last = with_zeros(model, images, 4)
        expected = model.visual.ln_post(last[:, 5:]).mean(dim=1) @ model.visual.proj
    tower = image_tower(model)
    torch.testing.assert_close(tower.zeroing(4).encode(images), expected, rtol=0, atol=1e-12)
    with pytest.raises(ModelError, match=r"too few patches .* found 16, wanted more than 16"):
        tower.zeroing(16).encode(images)


@pytest.mark.parametrize("n_context", [None, 2])
def test_loss_and_gradient_are_those_of_the_equations(
    plain: Any, double_backbone: Backbone, n_context: int | None
) -> None:
    texts = plain.texts(double_backbone, [5, 3, 4, 5])
    problem = plain.problem(double_backbone, texts=texts, template=TEMPLATE)
    method = plain.build("biomed-dpt", problem, l1=12.5, kl=3.0, n_context=n_context)
    assert method.context.shape[0] == (n_context or 6)  # 6 words, 8 tokens
    size = double_backbone.image.image_size
    images = plain.normal(5, 3, size, size)
    with torch.no_grad():
        v = F.normalize(with_zeros(double_backbone.model, images, 4)[0], dim=-1)
    sentences = [TEMPLATE.format(name) for name in plain.NAMES]
    text = F.normalize(plain.sentence_features(double_backbone, sentences, method.context), dim=-1)
    mean = [F.normalize(F.normalize(e, dim=-1).mean(0), dim=0) for e in texts.embeddings]
    teacher, scale = torch.stack(mean), double_backbone.logit_scale
    logits = scale * v @ text.T
    labels = torch.arange(5) % 4
    expected = (
        F.cross_entropy(logits, labels)
        + 12.5 * (text - teacher).abs().mean()
        + 3 * plain.divergence(scale * v @ teacher.T, logits)
    )
    plain.assert_same(method, Batch(labels, images=images), expected)


def test_it_starts_as_the_sentence_of_the_template(plain: Any, double_backbone: Backbone) -> None:
    for template, settings in (
        (TEMPLATE, {}),
        (TEMPLATES["covid-19"], {"tuned_for": "covid-19"}),
        ("a photo of a {}", {"template": "a photo of a {}"}),
    ):
        method = plain.build(
            "biomed-dpt", plain.problem(double_backbone, template=TEMPLATE), **settings
        )
        ids = double_backbone.text.tokenize([template.split("{}")[0]])[0][1:-1]
        with torch.no_grad():
            method.context.copy_(double_backbone.text.embed(ids)[: len(method.context)])
            found = F.normalize(method.text_features()[0], dim=-1)
        expected = plain.template_features(double_backbone, template)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # words kept in float32


def test_templates_that_make_no_context_are_refused(plain: Any, double_backbone: Backbone) -> None:
    for settings, message in (
        ({"template": "{} tissue."}, r"found 0 tokens in '', wanted at least 1"),
        ({"n_context": 5}, r"method\.n_context: .* found 4 tokens .*, wanted at least 5"),
    ):
        with pytest.raises(RecipeError, match=message):
            plain.build("biomed-dpt", plain.problem(double_backbone), **settings)
    message = r"method\.template: not a template; found 'lung', wanted exactly one \{\}"
    with pytest.raises(RecipeError, match=message):
        plain.build("biomed-dpt", plain.problem(double_backbone), template="lung")


def test_weights_and_templates(plain: Any, double_backbone: Backbone) -> None:
    def weights(**settings: Any) -> tuple[float, float]:
        method = plain.build("biomed-dpt", plain.problem(double_backbone), **settings)
        return method.l1, method.kl

    assert weights() == (1, 1)
    assert weights(tuned_for="dermamnist") == (25, 20)
    assert weights(tuned_for="octmnist", protocol="base-to-novel", l1=0.0) == (0, 0.5)
    assert [len(table) for table in WEIGHTS.values()] == [11, 10]
    counts = {name: len(t.split("{}")[0].split()) for name, t in TEMPLATES.items()}
    assert {n for n, k in counts.items() if k == 6} == {"covid-19", "kneexray"}
    assert {n for n, k in counts.items() if k != 5} == {"covid-19", "kneexray", "retina"}
    assert counts["retina"] == 4


def test_its_image_features_are_a_set_of_their_own(
    tiny_models: ModuleType, toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    toy.cache(tmp_path / "toy.h5")
    data = str(toy.images(tmp_path / "images", train=2, val=1, test=1))
    folder = str(tiny_models.tiny_clip(tmp_path / "backbone", layers=2))
    found = {}
    for name in ("coop", "biomed-dpt"):
        recipe = validate(
            TuneRecipe, {"backbone": {"folder": folder}, "method": {"name": name}}, where="test"
        )
        setup = prepare(recipe, data=data, knowledge=tmp_path / "toy.h5", samples=None)
        cases = setup.cases(setup.train).batch(torch.arange(len(setup.train)))
        assert cases.images is None
        found[name] = cases.features
        pixels = [
            setup.backbone.preprocess.view(setup.train.image(i), 0, 1, setup.train.digests[i])
            for i in range(len(setup.train))
        ]
        with torch.no_grad():
            live = setup.method.backbone.image.encode(torch.stack(pixels))
        torch.testing.assert_close(cases.features, live, rtol=0, atol=1e-5)
    assert (found["coop"] - found["biomed-dpt"]).abs().max() > 1e-3
    averaged = averaged_backbone(setup).method.backbone
    assert averaged.image.zeroed == 4
    assert averaged.image_fingerprint != averaged_backbone(setup).backbone.image_fingerprint
