"""Tiny random language models with byte-level tokenizers, saved as real ones are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from cache.recipe import validate
from knowledge_extract import crew, engine
from knowledge_extract.recipe import ExtractRecipe

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|bot|>", "<|stop|>"]
BOS, EOS, STOP = 1, 2, 5
CHAT = (
    "<s>{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
VOCABULARY = len(SPECIAL) + 256
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=54,  # three heads of 18: nothing is a power of two
        intermediate_size=70,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.25,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=40,
        n_layer=4,
        n_head=4,
        n_positions=256,
        initializer_range=0.25,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ),
    "gemma2": Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=18,
        sliding_window=12,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
    ),
}


def byte_tokenizer(*, chat: str | None = None, start: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte; `start`: the post-processor puts <s> in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIAL + alphabet)}
    inner = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if start:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[3:],
    )
    outer.chat_template = chat
    return outer


def save_model(folder: Path, family: str, *, chat: str | None = None, seed: int = 0) -> Path:
    """A random model and its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family])
    model.save_pretrained(folder)
    byte_tokenizer(chat=chat).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models, each made once."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(family: str = "llama", *, chat: bool = False) -> Path:
        if (family, chat) not in made:
            path = tmp_path_factory.mktemp("models") / f"tiny-{family}{'-chat' if chat else ''}"
            made[family, chat] = save_model(path, family, chat=CHAT if chat else None)
        return made[family, chat]

    return folder


CLASSES = [
    {
        "id": "basophil",
        "name": "basophil",
        "modality": "microscopy",
        "source": "written here",
        "descriptions": ["dark granules", "rare cell"],
        "attributes": {"size": ["small", "round"], "nucleus": ["lobed"]},
    },
    {
        "id": "monocyte",
        "name": "monocyte of the blood",
        "modality": "microscopy",
        "descriptions": ["a folded nucleus"],
        "attributes": {"size": ["large"]},
    },
    {
        "id": "platelet",
        "name": "platelet",
        "modality": "microscopy",
        "descriptions": ["no nucleus at all", "tiny"],
        "attributes": {"size": ["tiny"]},
    },
]
BLOCKS = {
    "answers": {"kind": "answers", "max_new_tokens": 6},
    "layers": {"kind": "states", "of": "answers", "pooling": "end_token", "layers": "all"},
    "described": {"kind": "states", "of": "descriptions", "pooling": "mean", "layers": [0, 2, -1]},
    "attributed": {
        "kind": "states",
        "of": "attributes",
        "pooling": "last_token",
        "layers": [-1],
    },
    "tokens": {"kind": "states", "of": "descriptions", "pooling": "all_tokens", "layers": [1]},
    "descriptions": {"kind": "texts", "of": "descriptions"},
    "attributes": {"kind": "attributes", "of": "attributes"},
}


@pytest.fixture
def recipe_data(model_folder: Callable[..., Path]) -> dict[str, object]:
    """A recipe as plain data, on the tiny Llama."""
    return {
        "dataset": "tiny",
        "model": {"folder": str(model_folder("llama"))},
        "templates": {"question": "What is {name}?"},
        "store_dtype": "float32",
        "classes": CLASSES,
        "blocks": BLOCKS,
    }


@pytest.fixture
def make_recipe(recipe_data: dict[str, object]) -> Callable[..., ExtractRecipe]:
    """A validated recipe with fields replaced."""

    def make(**fields: object) -> ExtractRecipe:
        return validate(ExtractRecipe, recipe_data | fields, where="recipe.yaml")

    return make


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is impossible from here on."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(crew, "load_model", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.fixture
def interrupt_after(monkeypatch):
    """The user presses Ctrl-C after so many units."""

    def arm(units):
        real, done = engine.Engine.entries, []

        def entries(self, unit):
            if len(done) == units:
                raise KeyboardInterrupt
            done.append(unit)
            return real(self, unit)

        monkeypatch.setattr(engine.Engine, "entries", entries)
        return lambda: monkeypatch.setattr(engine.Engine, "entries", real)

    return arm
