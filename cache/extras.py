"""Optional packages: one clear line when one is absent."""

import importlib.util

from cache.errors import MissingExtraError

STAGE_ONE = ("torch", "transformers", "safetensors", "jaxtyping")
STAGE_TWO = ("torch", "open_clip", "datasets", "sklearn", "scipy", "matplotlib", "jaxtyping")


def need(purpose: str, *packages: str, extra: str) -> None:
    """Returns when all `packages` are installed.

    Args:
        purpose: what needs them, the subject of the sentence.
        packages: names they are imported by.
        extra: of this distribution, that installs them.

    Raises:
        MissingExtraError: one is not.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing(purpose, package, extra)


def missing(purpose: str, package: str, extra: str) -> MissingExtraError:
    """The error that says a package is absent and how to get it."""
    what = f"{purpose} needs the package {package!r}, which is not installed"
    return MissingExtraError(what, do=install(extra))


def install(extra: str) -> str:
    """How to get an extra: this project is on no package index, and its name there is free."""
    return f"Install it with: pip install -c constraints.txt -e '.[{extra}]' in the checkout."
