"""Linear maps of frozen weights, whose copies in another precision are made once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_COPIES: Any = WeakTensorKeyDictionary()
"""Of a weight, its version when it was copied, and the copy."""


def low(weight: Tensor) -> Tensor:
    """The weight in the precision of autocast where that is on; else itself.

    Autocast copies a weight that is not trained at every use, and the backward keeps every copy.
    """
    device = weight.device.type
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return weight
    if weight.dtype == torch.get_autocast_dtype(device):
        return weight
    known = _COPIES.get(weight)
    if known is None or known[0] != weight._version:
        copy = weight.detach().to(torch.get_autocast_dtype(device))
        known = _COPIES[weight] = (weight._version, copy)
    found: Tensor = known[1]
    return found


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    """What a frozen linear module gives."""
    bias: Tensor | None = module.bias
    return F.linear(x, low(module.weight), None if bias is None else low(bias))
