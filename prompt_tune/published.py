"""The side effect of the published averaging on the frozen backbone.

The published loop copies the whole state dict after each epoch, weights it and sums it up, each
tensor in its own precision. Contexts and visual prompts are averaged so by the training loop. The
frozen weights that OpenAI's CLIP holds in fp16 (convolutions, linear maps, attention, projections)
are averaged with themselves, which in fp16 is not the identity; `average: published` repeats that
once training is over, so that its numbers can be compared. Here the backbone is in fp32, so the
same step also rounds these weights to fp16.

Differs: training itself sees the weights as they are, in fp32, where the published one sees them
rounded to fp16.
Differs: frozen fp32 tensors (embeddings, norms) are left as they are; the published average moves
them by a relative 1e-7. So are the token embeddings of start, name and end, which the published
code copies into fp16 buffers and averages with the rest.
"""

import copy
import dataclasses

import torch
from torch import nn

from prompt_tune.execution import executing
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
    usual = setup.method.backbone.image
    method.backbone = executing(backbone.zeroing(usual.zeroed), usual.execution)
    return dataclasses.replace(setup, backbone=backbone, method=method)
