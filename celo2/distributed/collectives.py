"""All communication between ranks for the rule: sums, directions, weights, and settings to compare. No mathematics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.distributed.shard import SplitMatrix
from celo2.stack import Region


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """The `value` of every rank of `group`, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def add_up_(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each tensor (one float dtype, same shapes on all ranks) by its sum over the ranks of `group`: one all-reduce."""
    if not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view(t.shape))


def share_means_(means: Sequence[tuple[Tensor, Sequence[slice]]], group: dist.ProcessGroup) -> None:
    """Bring row and column means (K, N, ·) up to date from the ranks of `group` that updated them, in one all-reduce.

    The slices beside each tensor name the matrices whose means come from other ranks.
    """
    if others := [mean[:, n] for mean, slices in means for n in slices]:
        torch._foreach_zero_(others)
    add_up_([mean for mean, _ in means], group)


def all_to_all(
    outgoing: list[list[Tensor]], expected: list[list[Region]], empty: Tensor, group: dist.ProcessGroup
) -> list[Iterator[Tensor]]:
    """Send the tensors outgoing[r] to rank r of `group`. Returns for each rank r the flat tensors of its regions expected[r].

    All tensors have the dtype of `empty`. They are sent as bytes, because not every backend supports every dtype.
    """
    send = torch.cat([empty, *(t.reshape(-1) for tensors in outgoing for t in tensors)])
    sizes = [[math.prod(region.size) for region in regions] for regions in expected]
    received = empty.new_empty(sum(map(sum, sizes)))
    arriving = [sum(of_rank) * empty.element_size() for of_rank in sizes]
    leaving = [sum(t.numel() for t in tensors) * empty.element_size() for tensors in outgoing]
    dist.all_to_all_single(received.view(torch.uint8), send.view(torch.uint8), arriving, leaving, group=group)
    by_rank = received.split([sum(of_rank) for of_rank in sizes])
    return [iter(values.split(of_rank)) for values, of_rank in zip(by_rank, sizes, strict=True)]


def broadcast_(tensor: Tensor, owner: int, group: dist.ProcessGroup) -> None:
    """Broadcast `tensor` (contiguous, any dtype) from rank `owner` of `group`, in place."""
    dist.broadcast(tensor.view(-1).view(torch.uint8), group=group, group_src=owner)


def send(tensor: Tensor, to: int, group: dist.ProcessGroup) -> None:
    """Send `tensor` of any dtype to rank `to` of `group`, which must call `receive`."""
    dist.send(tensor.contiguous().view(-1).view(torch.uint8), group=group, group_dst=to)


def receive(shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int, group: dist.ProcessGroup) -> Tensor:
    """Receive the tensor that rank `source` of `group` sends with `send`."""
    data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device)
    dist.recv(data, group=group, group_src=source)
    return data.view(dtype).view(shape)


def broadcast_by_owner_(tensors: Sequence[Tensor], owners: Mapping[Tensor, int], group: dist.ProcessGroup) -> None:
    """Broadcast every tensor from its owner among the ranks, in place: one broadcast for each owner and dtype."""
    by_owner: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_owner[owners[tensor], str(tensor.dtype)].append(tensor)
    for (owner, _), owned in sorted(by_owner.items(), key=lambda item: item[0]):
        flat = torch.cat([t.detach().flatten() for t in owned])
        broadcast_(flat, owner, group)
        for t, values in zip(owned, flat.split([t.numel() for t in owned]), strict=True):
            t.copy_(values.view(t.shape))


def orthogonalize_split(
    matrices: Sequence[SplitMatrix],
    pieces: Sequence[Sequence[Tensor]],
    empty: Tensor,
    group: dist.ProcessGroup,
    orthogonalize: Callable[[Tensor, Sequence[int]], Tensor],
    most_elements: int,
) -> list[list[Tensor]]:
    """Apply `orthogonalize` to matrices that are split over the ranks of `group`, each one on its owner alone.

    Args:
        matrices: the same ones in the same order on all ranks.
        pieces: for each matrix the parts on this rank, in the order of its regions.
        empty: a tensor (0,) with the dtype and device of the pieces, needed because a rank may have no pieces.
        orthogonalize: a function of matrices of one shape (N, R, C) and of their indices in `matrices`.
        most_elements: the most elements for one call; a larger matrix gets a call of its own.

    Returns:
        The pieces of the results, with the structure and shapes of `pieces`.
    """
    me, world = dist.get_rank(group), dist.get_world_size(group)
    numbers = [i for i, m in enumerate(matrices) if m.owner == me]
    owned = [matrices[i] for i in numbers]
    outgoing: list[list[Tensor]] = [[] for _ in range(world)]
    for matrix, parts in zip(matrices, pieces, strict=True):
        outgoing[matrix.owner] += parts
    expected = [[region for m in owned for region in m.held[rank]] for rank in range(world)]
    arrived = all_to_all(outgoing, expected, empty, group)
    whole = [put_together(m, arrived, empty) for m in owned]
    del arrived  # it takes as much memory as all owned matrices
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, u in enumerate(whole):
        by_shape[u.shape].append(i)
    for shape, indices in by_shape.items():
        at_once = max(1, most_elements // max(1, shape.numel()))
        for start in range(0, len(indices), at_once):
            batch = indices[start : start + at_once]
            done = orthogonalize(torch.stack([whole[i] for i in batch]), [numbers[i] for i in batch])
            for i, u in zip(batch, done, strict=True):
                whole[i] = u

    outgoing = [[] for _ in range(world)]
    for matrix, u in zip(owned, whole, strict=True):
        for rank, regions in enumerate(matrix.held):
            outgoing[rank] += [u[region.rows, region.cols] for region in regions]
    expected = [[region for m in matrices if m.owner == rank for region in m.held[me]] for rank in range(world)]
    returned = all_to_all(outgoing, expected, empty, group)
    return [[next(returned[m.owner]).view(part.shape) for part in parts] for m, parts in zip(matrices, pieces, strict=True)]


def put_together(matrix: SplitMatrix, arrived: Sequence[Iterator[Tensor]], empty: Tensor) -> Tensor:
    """Assemble a matrix (R, C) from the next parts in the iterators `arrived`, one iterator for each rank."""
    u = empty.new_empty(matrix.rows, matrix.cols)
    for rank, regions in enumerate(matrix.held):
        for region in regions:
            u[region.rows, region.cols] = next(arrived[rank]).view(region.size[1:])
    return u
