"""Optional packages: one clear line when one is absent."""

import importlib.util

from cache.errors import MissingExtraError

INSTALL = "Install it with: pip install 'vademecum[extract]'."
STAGE = ("torch", "transformers", "safetensors", "jaxtyping")


def need(purpose: str, *packages: str) -> None:
    """Returns when all `packages` are installed.

    Raises:
        MissingExtraError: one is not.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            what = f"{purpose} needs the package {package!r}, which is not installed"
            raise MissingExtraError(what, do=INSTALL)
