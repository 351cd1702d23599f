"""Embeddings of texts in a cache: what stage two would compute, and it takes them."""

import pytest
import torch

from cache import KnowledgeCache, verify
from cache.errors import CacheMismatchError, MissingKnowledgeError, RecipeError
from prompt_tune.backbone import BackboneSpec, load_backbone
from prompt_tune.embed import backbone_spec, embed
from prompt_tune.recipe import KnowledgeSpec
from prompt_tune.texts import load_texts


@pytest.fixture(scope="module")
def folder(tiny_models, tmp_path_factory):
    return tiny_models.tiny_biomedclip(tmp_path_factory.mktemp("tower") / "tiny")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(BackboneSpec(folder=str(folder)))


@pytest.fixture
def knowledge(toy, tmp_path):
    toy.cache(tmp_path / "k.h5")
    return tmp_path / "k.h5"


def loaded(path, backbone, toy, keep=None):
    with KnowledgeCache.open(path) as opened:
        needs = frozenset({"texts"})
        spec = KnowledgeSpec(keep=keep)
        return load_texts(
            opened, spec, needs, class_ids=toy.CLASSES, backbone=backbone, seed=1
        ).texts


def test_stage_two_takes_the_stored_embeddings(knowledge, backbone, toy, tmp_path, monkeypatch):
    live = loaded(knowledge, backbone, toy)
    report = embed(knowledge, backbone, licence="MIT", out=tmp_path / "e.h5")
    assert report.block == f"descriptions_{backbone.text_fingerprint[:8]}"
    assert (report.texts, report.width) == (15, backbone.embed_dim)
    with KnowledgeCache.open(tmp_path / "e.h5", expect=report.content_id) as found:
        block = found.blocks[report.block]
        assert [block.items(c) for c in toy.CLASSES] == [5, 5, 5]
        norms = [float(torch.tensor(block.array(c, 2)).norm()) for c in toy.CLASSES]
        assert max(abs(norm - 1) for norm in norms) > 0.01
        assert block.spec["of"] == found.blocks["descriptions"].id
        assert found.provenance[f"{report.block}_licence"] == "MIT"
        assert str(tmp_path) not in str(dict(block.spec)) + str(found.recipe)

    def refuse(*_args, **_kwargs):
        raise AssertionError("the tower was asked")

    monkeypatch.setattr(type(backbone.text), "encode_texts", refuse)
    with pytest.raises(AssertionError, match="the tower was asked"):
        loaded(knowledge, backbone, toy)
    stored = loaded(tmp_path / "e.h5", backbone, toy)
    assert stored.strings == live.strings
    assert all(torch.equal(a, b) for a, b in zip(stored.embeddings, live.embeddings, strict=True))


def test_fewer_texts_take_the_first_stored_embeddings(knowledge, backbone, toy, tmp_path):
    embed(knowledge, backbone, out=tmp_path / "e.h5")
    whole = loaded(tmp_path / "e.h5", backbone, toy)
    fewer = loaded(tmp_path / "e.h5", backbone, toy, keep=2)
    assert fewer.strings == tuple(own[:2] for own in whole.strings)
    for a, b in zip(fewer.embeddings, whole.embeddings, strict=True):
        assert torch.equal(a, b[:2])


def test_another_tower_does_not_take_them(knowledge, backbone, toy, tiny_models, tmp_path):
    embed(knowledge, backbone, out=tmp_path / "e.h5")
    other = tiny_models.tiny_biomedclip(tmp_path / "other", seed=5)
    second = load_backbone(BackboneSpec(folder=str(other)))
    own, live = loaded(tmp_path / "e.h5", second, toy), loaded(knowledge, second, toy)
    assert torch.equal(own.embeddings[0], live.embeddings[0])
    embed(tmp_path / "e.h5", second)  # in its place, beside the first
    with KnowledgeCache.open(tmp_path / "e.h5") as found:
        assert sum(block.kind == "embeddings" for block in found.blocks.values()) == 2
    before = verify(tmp_path / "e.h5").content_id
    assert embed(tmp_path / "e.h5", second).content_id == before


def test_refusals(knowledge, backbone, tmp_path):
    with pytest.raises(MissingKnowledgeError, match=r"no block 'layers' of texts.*symptoms"):
        embed(knowledge, backbone, block="layers")
    with pytest.raises(CacheMismatchError, match="the cache has another block 'symptoms'"):
        embed(knowledge, backbone, name="symptoms", out=tmp_path / "e.h5")


def test_a_backbone_comes_from_a_recipe_a_preset_or_a_file_of_its_own(tmp_path):
    (tmp_path / "b.yaml").write_text("folder: models/tiny\n")
    (tmp_path / "r.yaml").write_text("backbone: {folder: models/tiny}\nmethod: {name: coop}\n")
    for name in ("b.yaml", "r.yaml"):
        assert backbone_spec(str(tmp_path / name)).folder == "models/tiny"
    assert "BiomedCLIP" in str(backbone_spec("cilmp").hub)
    with pytest.raises(RecipeError, match="no such recipe file or preset"):
        backbone_spec("nothing")
    (tmp_path / "n.yaml").write_text("folders: x\n")
    with pytest.raises(RecipeError, match="unknown key 'folders'"):
        backbone_spec(str(tmp_path / "n.yaml"))
