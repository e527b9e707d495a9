"""Buffers that belong to a model's weights (corrections of a router, running statistics), and how they stay equal on all ranks.

Weights that the model itself freezes become buffers here: no optimizer updates them, so no strategy needs to shard them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def persistent_buffers(model: nn.Module) -> Tensors:
    """Return the buffers of `model` that belong to its weights, by name."""
    persistent = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def frozen_to_buffers(model: nn.Module, value: Callable[[str, Tensor], Tensor]) -> None:
    """Replace every parameter that needs no gradient by a persistent buffer of the same name, with the value `value(name, p)`."""
    frozen = {p: value(name, p) for name, p in model.named_parameters() if not p.requires_grad}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if p in frozen:
                delattr(module, name)
                module.register_buffer(name, frozen[p])


def copies(buffers: Tensors) -> Tensors:
    """Return copies of the buffers before a step, which `settle` needs."""
    return {name: buffer.clone() for name, buffer in buffers.items()}


@torch.no_grad()
def settle(buffers: Tensors, before: Tensors, refused: Tensor, world: int) -> None:
    """Make the buffers equal on all ranks after a step, in which each rank saw its own tokens. Every rank must call it.

    Floating-point buffers change by the mean of the ranks' changes, so that a running mean is that of the global batch. A buffer
    that no rank changed keeps its bits. Other buffers get the first rank's value. If `refused`, a bool () on the device, is True,
    all buffers keep their values from `before` the step.
    """
    if world > 1 and buffers:
        moving = {name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()}
        for name in buffers.keys() - moving.keys() if len(moving) < len(buffers) else ():
            dist.broadcast(buffers[name], 0)
        changes = [torch.where(b == before[name], 0, b - before[name]).float().flatten() for name, b in moving.items()]
        if changes:
            total = torch.cat(changes)  # one vector: there is one small buffer for each layer
            dist.all_reduce(total)
            for (name, buffer), change in zip(moving.items(), total.split([len(c) for c in changes]), strict=True):
                buffer.copy_(before[name] + (change / world).view_as(buffer).to(buffer.dtype))
    for name, buffer in buffers.items():
        buffer.copy_(torch.where(refused, before[name], buffer))
