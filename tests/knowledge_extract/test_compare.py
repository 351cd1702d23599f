"""Two blocks of states, layer by layer."""

import numpy as np
import pytest

from cache.errors import CacheMismatchError, MissingKnowledgeError
from cache.store import KnowledgeCache
from knowledge_extract import extract
from knowledge_extract.compare import compare_blocks, describe_comparison
from knowledge_extract.settings import RunSettings


@pytest.fixture
def sealed(make_recipe, recipe_data, tmp_path):
    blocks = recipe_data["blocks"]
    first = blocks["layers"]
    more = {
        "long": {"kind": "answers", "max_new_tokens": 9},
        "layers_long": first | {"of": "long"},
        "top": first | {"layers": [3]},
    }
    recipe = make_recipe(blocks=blocks | more)
    extract(recipe, tmp_path / "k.h5", RunSettings(device="cpu"))
    return tmp_path / "k.h5"


def test_rows_per_layer(sealed):
    with KnowledgeCache.open(sealed) as found:
        x, y = (
            np.concatenate([found.blocks[name].array(c.id) for c in found.classes]).astype(float)
            for name in ("layers", "layers_long")
        )
    rows = compare_blocks(sealed, "layers", "layers_long")
    assert [row["layer"] for row in rows] == [1, 2, 3]
    for at, row in enumerate(rows):
        a, b = x[:, at], y[:, at]
        cosine = [u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(a, b, strict=True)]
        assert row["cosine_mean"] == pytest.approx(np.mean(cosine))
        assert row["cosine_min"] == pytest.approx(np.min(cosine))
        assert row["max_abs"] == pytest.approx(np.abs(a - b).max())
    assert len(describe_comparison(rows).splitlines()) == 4
    same = compare_blocks(sealed, "layers", "layers")
    assert all(row["cosine_min"] == pytest.approx(1) and row["max_abs"] == 0 for row in same)


def test_blocks_that_cannot_be_compared(sealed):
    with pytest.raises(CacheMismatchError, match="'layers' and 'top' differ in layers"):
        compare_blocks(sealed, "layers", "top")
    with pytest.raises(MissingKnowledgeError, match="layer_long"):
        compare_blocks(sealed, "layers", "layer_long")
