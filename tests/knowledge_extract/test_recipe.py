"""What a recipe may say, and the one line for what it may not."""

import pytest

from cache.errors import RecipeError, UnknownNameError
from cache.recipe import validate
from knowledge_extract.recipe import ExtractRecipe, load_extract_recipe, resolve_layers


def refused(data, match):
    with pytest.raises(RecipeError, match=match) as caught:
        validate(ExtractRecipe, data, where="recipe.yaml")
    assert "\n" not in str(caught.value)


def with_block(data, **block):
    return data | {"blocks": data["blocks"] | {"more": block}}


def test_a_sound_recipe(make_recipe):
    recipe = make_recipe()
    assert recipe.quantisation == "none"
    assert list(recipe.blocks) == [
        "answers", "layers", "described", "attributed", "tokens", "descriptions", "attributes",
    ]  # fmt: skip


def test_one_source_of_a_model_replaces_the_others_and_their_licence():
    def model(*overrides):
        recipe = load_extract_recipe("biomistral-7b-bloodmnist", [f"model.{o}" for o in overrides])
        return recipe.model.model_dump(exclude_defaults=True)

    assert model("folder=F", "licence=MIT") == {"folder": "F", "licence": "MIT"}
    assert model("asset=A", "hub=null") == {"asset": "A"}
    assert model("revision=v2")["licence"] == "Apache-2.0"
    with pytest.raises(RecipeError, match=r"exactly one of.*'folder', 'gguf'"):
        model("folder=F", "gguf=G")


def test_an_unknown_key_names_the_nearest(recipe_data):
    refused(recipe_data | {"quantization": "nf4"}, "unknown key 'quantization'.*'quantisation'")
    block = {"kind": "states", "of": "answers", "poling": "mean"}
    refused(with_block(recipe_data, **block), "poling'.*Did you mean 'pooling'")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"quantisation": "int4"}, "quantisation: .*'none', 'nf4', 'fp4' or 'int8'"),
        ({"model": {}}, "exactly one of hub, folder, gguf, asset"),
        ({"model": {"hub": "a/b", "folder": "c"}}, "exactly one of.*'hub', 'folder'"),
        ({"model": {"folder": "c", "revision": "x"}}, "revision belongs to a hub model"),
        ({"templates": {"question": "What?"}}, "the question template must use {name}"),
        ({"templates": {"question": "{nam}"}}, "placeholder {nam}. Did you mean 'name'"),
        ({"templates": {"question": "{name.x}"}}, "unknown placeholder {name.x}"),
        ({"classes": []}, "classes: "),
        ({"classes": [{"id": "A b", "name": "x"}]}, "a class id is lower-case"),
        ({"classes": [{"id": "a", "name": "x"}] * 2}, "class id 'a' stands twice"),
        ({"classes": [{"id": "a", "name": "x", "descriptions": [" "]}]}, "'a' has an empty text"),
        ({"classes": [{"id": "a", "name": "x"}]}, "reads descriptions, and class 'a' has none"),
        ({"dataset": "my data"}, "a data set id is letters"),
        ({"blocks": {"Bad-Name": {"kind": "texts", "of": "descriptions"}}}, "not a name for"),
    ],
)
def test_refusals(recipe_data, fields, match):
    refused(recipe_data | fields, match)


@pytest.mark.parametrize(
    ("block", "match"),
    [
        ({"kind": "state"}, "'kind'.*'answers', 'states', 'texts', 'attributes'"),
        ({"kind": "states", "of": "answer", "pooling": "end_token"}, "Did you mean 'answers'"),
        ({"kind": "states", "of": "answers", "pooling": "mean"}, "takes pooling end_token"),
        ({"kind": "states", "of": "attributes", "pooling": "end_token"}, "takes pooling last_tok"),
        (
            {"kind": "states", "of": "descriptions", "pooling": "mean", "layers": [1, 1]},
            "names a layer twice",
        ),
        (
            {"kind": "states", "of": "descriptions", "pooling": "mean", "layers": []},
            "names no layer",
        ),
        (
            {"kind": "states", "of": "answers", "pooling": "end_token", "quantisation": "none"},
            "blocks 'layers' and 'more' are the same",
        ),
        ({"kind": "answers", "max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_refused_blocks(recipe_data, block, match):
    refused(with_block(recipe_data, **block), match)


def test_layers_are_counted_from_either_end():
    assert resolve_layers("all", 3, "x") == (1, 2, 3)
    assert resolve_layers((-1, 0, 1), 3, "x") == (0, 1, 3)
    for layers, match in (((4,), "does not have; found 4, wanted -3..3"), ((3, -1), "twice")):
        with pytest.raises(RecipeError, match=match):
            resolve_layers(layers, 3, "x")


def test_overrides_and_presets(tmp_path):
    recipe = load_extract_recipe("bloodmnist-demo", ["blocks.answers.max_new_tokens=3"])
    assert recipe.blocks["answers"].max_new_tokens == 3
    with pytest.raises(UnknownNameError, match=r"'bloodmnist-dem'. Did you mean 'bloodmnist-demo'"):
        load_extract_recipe("bloodmnist-dem")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_extract_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", ["bloodmnist-demo", "biomistral-7b-bloodmnist"])
def test_presets_hold_the_official_classes(name):
    recipe = load_extract_recipe(name)
    assert [c.name for c in recipe.classes] == [
        "basophil",
        "eosinophil",
        "erythroblast",
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
        "lymphocyte",
        "monocyte",
        "neutrophil",
        "platelet",
    ]
    for one in recipe.classes:
        assert len(one.descriptions) in {2, 3}
        assert set(one.attributes) == {"nucleus shape", "cytoplasm and granules", "size"}
