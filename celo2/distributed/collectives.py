"""Everything that ranks send each other for the rule: sums, directions, and what they must agree on. No mathematics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """`value` of every rank of `group`."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def add_up_(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Replace every tensor (float32, same shapes on all ranks) by its sum over the ranks of `group`, in one all-reduce."""
    if not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view(t.shape))


def swap(outgoing: list[Tensor], incoming: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Send outgoing[r] (vectors of one dtype) to rank r of `group`; -> what every rank sent here, of `incoming` elements.

    Travels as bytes: not every backend knows every dtype.
    """
    size = outgoing[0].element_size()
    send = torch.cat([t.reshape(-1) for t in outgoing])
    received = torch.empty(sum(incoming), dtype=send.dtype, device=send.device)
    dist.all_to_all_single(
        received.view(torch.uint8),
        send.view(torch.uint8),
        [n * size for n in incoming],
        [t.numel() * size for t in outgoing],
        group=group,
    )
    return list(received.split(incoming))


def broadcast_(tensor: Tensor, owner: int, group: dist.ProcessGroup) -> None:
    """Fill `tensor` (contiguous, any dtype) with what rank `owner` of `group` has in it."""
    dist.broadcast(tensor.view(-1).view(torch.uint8), group=group, group_src=owner)
