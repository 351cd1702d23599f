"""Frozen towers of a vision-language backbone, with learnable prompts computed only where read.

text = text_tower(model, tokenizer)      # model and tokenizer from open_clip
image = image_tower(model)
layout = PromptLayout.build(text, ["basophil", "monocyte"], n_context=4)
text.encode(layout, [Stage(context)])    # [1, classes, embed], un-normalised
image.encode(images, visual_prompts)     # [batch, embed], un-normalised
"""

from typing import Any

import open_clip
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer

from cache.errors import ModelError
from prompt_tune.towers.bert_text import BertTextTower
from prompt_tune.towers.clip_text import ClipTextTower
from prompt_tune.towers.image import ImageTower
from prompt_tune.towers.layout import PromptLayout, Stage
from prompt_tune.towers.text import TextTower
from prompt_tune.towers.timm_image import TimmImageTower
from prompt_tune.towers.vit_image import VitImageTower

__all__ = ["ImageTower", "PromptLayout", "Stage", "TextTower", "image_tower", "text_tower"]


def text_tower(model: Any, tokenizer: Any) -> TextTower:
    """The text tower of an open_clip model; freezes it.

    Raises:
        ModelError: the tower is of a class that is not supported.
    """
    text = getattr(model, "text", None)
    if isinstance(text, HFTextEncoder):
        return BertTextTower(text, tokenizer)
    if isinstance(text, TextTransformer):
        return ClipTextTower(text, tokenizer, model.encode_text)
    if isinstance(model, open_clip.CLIP):
        return ClipTextTower(model, tokenizer, model.encode_text)
    raise ModelError(
        "this backbone's text tower is not supported",
        found=type(model if text is None else text).__name__,
        wanted="CLIP's causal tower, or a BERT encoder",
    )


def image_tower(model: Any) -> ImageTower:
    """The image tower of an open_clip model; freezes it.

    Raises:
        ModelError: the tower is of a class that is not supported.
    """
    visual = getattr(model, "visual", None)
    if isinstance(visual, TimmModel):
        return TimmImageTower(visual)
    if isinstance(visual, VisionTransformer):
        return VitImageTower(visual)
    raise ModelError(
        "this backbone's image tower is not supported",
        found=type(visual).__name__,
        wanted="a vision transformer of open_clip or timm",
    )
