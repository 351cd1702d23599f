"""Names of devices, which both stages take. Whether one is here only torch can tell."""

import re

from cache.errors import RecipeError

_NAME = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")


def check_device(name: str) -> None:
    """Nothing, if `name` is that of a device, here or elsewhere.

    Raises:
        RecipeError: it is not.
    """
    if not _NAME.fullmatch(name):
        what, known = "no such device", "cpu, cuda, cuda:N or auto"
        raise RecipeError(what, where="--device", found=repr(name), wanted=known)
