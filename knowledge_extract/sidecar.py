"""Volatile facts about a run: beside the cache, never in it."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("accelerate", "bitsandbytes", "h5py", "numpy", "tokenizers", "torch", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that had a hand in the values."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
