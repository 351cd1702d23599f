"""Stage two never loads a language model, and the guard that says so catches one."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

GUARD = """
import importlib.abc, sys

for name in ("accelerate", "bitsandbytes", "gguf", "knowledge_extract"):
    sys.modules[name] = None  # looks like a package that is not installed

class NoLanguageModel(importlib.abc.MetaPathFinder):
    allowed = {"auto", "bert"}  # the declared text tower, and what open_clip imports by itself

    def find_spec(self, fullname, path, target=None):
        parts = fullname.split(".")
        if parts[:2] == ["transformers", "models"] and len(parts) == 4:
            if parts[3].startswith("modeling_") and parts[2] not in self.allowed:
                raise RuntimeError("a language model: " + fullname)
        return None

sys.meta_path.insert(0, NoLanguageModel())
import prompt_tune
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

causal = {n for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
          for n in ([v] if isinstance(v, str) else v)}
create = transformers.PreTrainedModel.__init__

def refuse(self, *args, **kwargs):
    if type(self).__name__ in causal:
        raise RuntimeError("a language model: " + type(self).__name__)
    create(self, *args, **kwargs)

transformers.PreTrainedModel.__init__ = refuse

def blocked(*args, **kwargs):
    raise RuntimeError("a language model: AutoModelForCausalLM")

transformers.AutoModelForCausalLM.from_pretrained = blocked
transformers.AutoModelForCausalLM.from_config = blocked
"""
# `cli.main` would refuse to run without its own stage one, so the app is called itself.
TUNE = GUARD + "import sys, cli\ncli.app(sys.argv[1:])\n"


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory, toy: ModuleType, tiny_models: ModuleType
) -> list[str]:
    folder = tmp_path_factory.mktemp("no-llm")
    toy.cache(folder / "toy.h5")
    tiny_models.tiny_assembled(folder / "backbone")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"backbone: {{folder: '{folder / 'backbone'}'}}\n"
        "method: {name: cilmp, text_depth: full, visual_depth: 0, prefix: 2, suffix: 2, rank: 2}\n"
        "samples: {shots: 2}\n"
        "train: {epochs: 1, batch_size: 4}\n"
    )
    return [
        "tune", str(recipe), "--data", str(toy.images(folder / "images")),
        "--knowledge", str(folder / "toy.h5"), "--out", str(folder / "run"), "--device", "cpu",
    ]  # fmt: skip


def _python(code: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, VADEMECUM_HOME=str(home), HF_HUB_OFFLINE="1")
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip


def test_a_whole_tune_loads_no_language_model(command: list[str], tmp_path: Path) -> None:
    result = _python(TUNE, *command, home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "method     cilmp" in result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import LlamaForCausalLM",
        "from transformers import BertConfig, BertLMHeadModel; BertLMHeadModel(BertConfig())",
        "transformers.AutoModelForCausalLM.from_pretrained('x')",
        "import knowledge_extract.extraction",
        "import accelerate",
        "import bitsandbytes",
    ],
)
def test_the_guard_catches_a_language_model(code: str, tmp_path: Path) -> None:
    result = _python(GUARD + code, home=tmp_path)
    assert result.returncode != 0
    assert "a language model" in result.stderr or "ModuleNotFoundError" in result.stderr
