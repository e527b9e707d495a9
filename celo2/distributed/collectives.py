"""Everything that ranks send each other for the rule: sums, directions, weights, and what they must agree on. No mathematics."""

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
    """`value` of every rank of `group`."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def add_up_(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Replace every tensor (one float dtype, same shapes on all ranks) by its sum over the ranks of `group`: one all-reduce."""
    if not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view(t.shape))


def share_means_(means: Sequence[tuple[Tensor, Sequence[slice]]], group: dist.ProcessGroup) -> None:
    """Fill row or column means (K, N, ·) with those of the ranks of `group` that have moved them, in one all-reduce.

    Beside each stand the matrices whose means come from other ranks.
    """
    if others := [mean[:, n] for mean, slices in means for n in slices]:
        torch._foreach_zero_(others)
    add_up_([mean for mean, _ in means], group)


def all_to_all(
    outgoing: list[list[Tensor]], expected: list[list[Region]], empty: Tensor, group: dist.ProcessGroup
) -> list[Iterator[Tensor]]:
    """Send the tensors outgoing[r] to rank r of `group`; -> of every rank the vectors that it sent here, those of `expected`.

    Tensors, all of the dtype of `empty`, are sent as bytes: not every backend knows every dtype.
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
    """Fill `tensor` (contiguous, any dtype) with what rank `owner` of `group` has in it."""
    dist.broadcast(tensor.view(-1).view(torch.uint8), group=group, group_src=owner)


def send(tensor: Tensor, to: int, group: dist.ProcessGroup) -> None:
    """Send `tensor`, of any dtype, to rank `to` of `group`, which calls `receive`."""
    dist.send(tensor.contiguous().view(-1).view(torch.uint8), group=group, group_dst=to)


def receive(shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int, group: dist.ProcessGroup) -> Tensor:
    """The tensor that rank `source` of `group` sends with `send`."""
    data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device)
    dist.recv(data, group=group, group_src=source)
    return data.view(dtype).view(shape)


def broadcast_by_owner_(tensors: Sequence[Tensor], owners: Mapping[Tensor, int], group: dist.ProcessGroup) -> None:
    """Fill every tensor with what its owner among the ranks has in it, in one broadcast for each owner and dtype."""
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
    """`orthogonalize` on matrices of which every rank of `group` holds `pieces`; every matrix is worked on once, by its owner.

    Args:
        matrices: the same ones in the same order on all ranks.
        pieces: of each matrix, what is here, in the order of its regions.
        empty: (0,), of the dtype and on the device of the pieces, of which a rank may have none.
        orthogonalize: takes matrices of one shape (N, R, C), and which of `matrices` they are.
        most_elements: limit of elements for one call; a larger matrix goes alone.

    Returns:
        Pieces of the results, like those that came in.
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
    del arrived  # as large as what is owned
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
    """A matrix (R, C) from the next parts of it that arrived from every rank."""
    u = empty.new_empty(matrix.rows, matrix.cols)
    for rank, regions in enumerate(matrix.held):
        for region in regions:
            u[region.rows, region.cols] = next(arrived[rank]).view(region.size[1:])
    return u
