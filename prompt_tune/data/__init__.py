"""Images of any layout behind one small interface: `load_data`, `DataSource`, `ImageSplit`."""

from prompt_tune.data.few_shot import SampleList, few_shot, stored_or_drawn, stratified_part
from prompt_tune.data.images import DataClass, ImageSplit, image_digest
from prompt_tune.data.source import DataSource, load_data, presets

__all__ = [
    "DataClass",
    "DataSource",
    "ImageSplit",
    "SampleList",
    "few_shot",
    "image_digest",
    "load_data",
    "presets",
    "stored_or_drawn",
    "stratified_part",
]
