"""Libraries that would write between our lines."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings, log lines and progress bars of the libraries while it is entered."""
    from transformers.utils import logging as hf

    level, bar = hf.get_verbosity(), hf.is_progress_bar_enabled()
    names = ("accelerate", "bitsandbytes", "gguf", "huggingface_hub")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        hf.set_verbosity_error()
        hf.disable_progress_bar()
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf.set_verbosity(level)
        if bar:
            hf.enable_progress_bar()
        for name, old in levels.items():
            logging.getLogger(name).setLevel(old)
