"""One file per tuning method; its name with dashes is its name in a recipe."""

from pathlib import Path

from cache.registry import Registry

METHODS = Registry("prompt_tune.methods", Path(__file__).parent, "METHOD", "tuning method")
