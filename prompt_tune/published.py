"""The side effect of the published averaging on the frozen backbone.

The published loop copies the whole state dict after each epoch, weights it and sums it up, so the
half-precision frozen weights are averaged with themselves in half precision, which is not the
identity. `average: published` repeats that, so that its numbers can be compared.
"""

import copy
import dataclasses

import torch
from torch import nn

from prompt_tune.schedule import averaged_constant, epoch_weights
from prompt_tune.setup import Setup


def _half_precision_tensors(model: nn.Module) -> list[torch.Tensor]:
    """What OpenAI's `convert_weights` makes fp16: convolutions, linears, attention, projections."""
    tensors: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            tensors += [p.data for p in module.parameters(recurse=False)]
        for name in ("text_projection", "proj"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Parameter):
                tensors.append(value.data)
    return tensors


def averaged_backbone(setup: Setup) -> Setup:
    """`setup` with a backbone whose half-precision weights went through the published average."""
    model = copy.deepcopy(setup.backbone.model)
    weights = epoch_weights(setup.recipe.train)
    with torch.no_grad():
        for tensor in _half_precision_tensors(model):
            tensor.copy_(averaged_constant(tensor, weights))
    backbone = setup.backbone.with_model(model, note="published averaging")
    method = copy.copy(setup.method)
    method.backbone = backbone
    return dataclasses.replace(setup, backbone=backbone, method=method)
