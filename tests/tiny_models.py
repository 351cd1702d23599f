"""Tiny random models with the exact structure of real ones, saved as open_clip saves its own.

Import by path (tests have no packages), for instance from a conftest:

    spec = importlib.util.spec_from_file_location("tiny_models", TESTS / "tiny_models.py")

`local-dir:FOLDER` loads every folder made here. Same arguments, same bytes.
"""

import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import prompt_tune  # noqa: F401 - makes torchvision importable beside CPU torch

WORDS = """
a an and are as at by can describe distinctive features for from has how image in is it kind look
like near of on or photo picture scan show shows slide stain stained that the there this to type
under view visual what which with without microscopy histology pathology radiology ultrasound
dermatoscopy fundus endoscopy tomography magnetic resonance mri ct xray chest brain skin breast
kidney liver lung colon retina cell cells blood tissue nucleus nuclei cytoplasm granule granules
granular shape size large small round oval lobed bilobed segmented irregular dark pale pink blue
purple red white benign malignant normal tumor tumour lesion cancer carcinoma adenocarcinoma
melanoma nevus basal squamous keratosis basophil eosinophil erythroblast immature granulocytes
myelocytes metamyelocytes promyelocytes lymphocyte monocyte neutrophil platelet stroma mucus muscle
polyp polyps ulcer colitis esophagitis cecum pylorus pneumonia covid glaucoma diabetic retinopathy
cataract cyst stone meningioma glioma pituitary disease healthy patient attribute value
""".split()
SUFFIXES = "s es ed ing ic al ous oma itis osis phil cyte blast oid ary tic".split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
OPENAI_STATISTICS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}


def wordpiece_vocabulary(words: Iterable[str] = WORDS) -> dict[str, int]:
    """Special tokens, every character alone and as a continuation, suffixes, whole words."""
    characters = string.ascii_lowercase + string.digits + ".,:;-()/'\"?!%+&_"
    pieces = [
        *SPECIAL,
        *characters,
        *("##" + c for c in string.ascii_lowercase + string.digits),
        *("##" + s for s in SUFFIXES),
        *words,
    ]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def save_tokenizer(folder: Path, words: Iterable[str] = WORDS, max_length: int = 512) -> int:
    """A BERT WordPiece tokenizer in `folder`; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = wordpiece_vocabulary(words)
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[SEP]", "[CLS]")]
    inner.post_processor = processors.BertProcessing(*ends)
    inner.decoder = decoders.WordPiece()
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=max_length, **named)
    outer.save_pretrained(folder)
    return len(vocabulary)


def save_bert_config(folder: Path, vocabulary: int, *, width: int, layers: int, heads: int) -> None:
    """The `config.json` of a small BERT; dropout is on, as in real ones, so eval mode matters."""
    from transformers import BertConfig

    BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=512,
        pad_token_id=0,
        architectures=["BertModel"],
    ).save_pretrained(folder)


def _save(folder: Path, model_cfg: dict[str, Any], image_size: int, seed: int) -> Path:
    import open_clip

    config = {
        "model_cfg": model_cfg,
        "preprocess_cfg": {"size": image_size, **OPENAI_STATISTICS, "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if "hf_model_name" in model_cfg["text_cfg"]:
        # Random weights are drawn below; asking open_clip for the BERT's own would fail.
        model_cfg["text_cfg"]["hf_model_pretrained"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(
            f"local-dir:{folder}", load_weights=False, pretrained_text=False
        )
        with torch.no_grad():  # distinct norms and biases, so that a swapped one shows
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
                elif "proj" in name or "embed" in name:
                    parameter *= 2
    state = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def tiny_clip(
    folder: Path,
    *,
    layers: int = 4,
    width: int = 32,
    text_layers: int | None = None,
    text_width: int | None = None,
    embed: int = 24,
    image_size: int = 32,
    patch: int = 8,
    seed: int = 0,
) -> Path:
    """An OpenAI-style CLIP: causal text tower, 77 tokens, the real byte-pair vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = {
        "embed_dim": embed,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": image_size,
            "layers": layers,
            "width": width,
            "head_width": 16,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": text_width or width,
            "heads": 4,
            "layers": text_layers or layers,
        },
    }
    return _save(folder, model_cfg, image_size, seed)


def tiny_biomedclip(
    folder: Path,
    *,
    text_layers: int = 4,
    text_width: int = 48,
    embed: int = 24,
    seed: int = 0,
) -> Path:
    """BiomedCLIP's structure: timm ViT, BERT, CLS of the last hidden state, MLP, context 256."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder)
    save_bert_config(folder, vocabulary, width=text_width, layers=text_layers, heads=4)
    model_cfg = {
        "embed_dim": embed,
        "vision_cfg": {
            "timm_model_name": "test_vit",  # timm's own 64-wide, 6-layer, 160-pixel ViT
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 160,
        },
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(folder),
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    }
    return _save(folder, model_cfg, 160, seed)


def tiny_assembled(
    folder: Path,
    *,
    layers: int = 3,
    width: int = 32,
    text_layers: int = 3,
    text_width: int = 48,
    embed: int = 24,
    image_size: int = 32,
    seed: int = 0,
) -> Path:
    """The embedded backbone's structure: CLIP's ViT, a mean-pooled BERT, a linear projection."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder)
    save_bert_config(folder, vocabulary, width=text_width, layers=text_layers, heads=4)
    model_cfg = {
        "embed_dim": embed,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": image_size,
            "layers": layers,
            "width": width,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(folder),
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": 128,
        },
    }
    return _save(folder, model_cfg, image_size, seed)


def tiny_sentence_encoder(
    folder: Path, *, layers: int = 2, width: int = 32, heads: int = 4, seed: int = 0
) -> Path:
    """A sentence encoder's folder as sentence-transformers ship it: BERT, mean pooling."""
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    save_bert_config(folder, save_tokenizer(folder), width=width, layers=layers, heads=heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder
