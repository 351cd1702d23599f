"""Texts from elsewhere and their embeddings, as a user types it."""

import json

import pytest
from typer.testing import CliRunner

from cache import KnowledgeCache
from cli import app
from prompt_tune.backbone import BackboneSpec, load_backbone


@pytest.fixture
def call():
    def run(*arguments):
        result = CliRunner().invoke(app, ["cache", *map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


def test_from_published_lists_to_what_stage_two_reads(call, tiny_models, tmp_path):
    folder = tiny_models.tiny_clip(tmp_path / "tower", layers=1)
    (tmp_path / "backbone.yaml").write_text(f"folder: {folder}\n")
    (tmp_path / "t.json").write_text(json.dumps({"Cell": ["dark", "round"], "cyst": ["pale"]}))
    (tmp_path / "a.csv").write_text("class,attribute,value\ncell,size,small\ncyst,size,large\n")
    (tmp_path / "names.yaml").write_text("cell: cell\ncyst: a cyst\n")
    told = ("--source", "a paper", "--licence", "MIT")
    made = call(
        *("new-texts", tmp_path / "t.json", "--dataset", "toy", "--block", "descriptions"),
        *(*told, "--classes", tmp_path / "names.yaml", "--modality", "CT", "--out"),
        tmp_path / "a.h5",
    )
    assert made["entries"] == {"cell": 2, "cyst": 1}
    call(
        *("add-texts", tmp_path / "a.h5", tmp_path / "a.csv", "--kind", "attributes", *told),
        *("--block", "attributes", "--out", tmp_path / "b.h5"),
    )
    made = call(
        *("embed", tmp_path / "b.h5", "--backbone", tmp_path / "backbone.yaml", "--device", "cpu")
    )
    tower = load_backbone(BackboneSpec(folder=str(folder))).text_fingerprint
    with KnowledgeCache.open(tmp_path / "b.h5", expect=made["content_id"]) as found:
        assert set(found.blocks) == {"attributes", "descriptions", made["block"]}
        assert found.blocks[made["block"]].spec["text_tower"] == tower
        assert [(c.name, c.modality) for c in found.classes] == [("cell", "CT"), ("a cyst", "CT")]
