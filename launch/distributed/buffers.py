"""Buffers that belong to a model's weights (corrections of a router, running statistics): which they are, and how ranks agree.

Weights that the model itself freezes are buffers here: no optimizer moves them, so that no strategy has to divide them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def persistent_buffers(model: nn.Module) -> Tensors:
    """The buffers of `model` that belong to its weights, by name."""
    persistent = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def frozen_to_buffers(model: nn.Module, value: Callable[[str, Tensor], Tensor]) -> None:
    """Make a persistent buffer of the same name of every parameter that wants no gradient; `value(name, p)` is what it holds."""
    frozen = {p: value(name, p) for name, p in model.named_parameters() if not p.requires_grad}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if p in frozen:
                delattr(module, name)
                module.register_buffer(name, frozen[p])


def copies(buffers: Tensors) -> Tensors:
    """What `settle` needs to know of the buffers before a step."""
    return {name: buffer.clone() for name, buffer in buffers.items()}


@torch.no_grad()
def settle(buffers: Tensors, before: Tensors, refused: Tensor, world: int) -> None:
    """Make the buffers equal on all ranks after a step, in which each rank saw its own tokens. Every rank must call it.

    Floating-point ones move by the mean of the ranks' changes, so that a running mean is that of the global batch; a buffer
    that no rank changed keeps its bits. Others are those of the first rank. A step that is `refused`, a bool () on the device,
    changes none.
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
