"""Step 8 over several ranks: the owner of a matrix orthogonalizes it and sends the result to the others.

`celo2.step` calls these functions instead of `orthogonalized_here` if several ranks share the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.distributed.collectives import add_up_, broadcast_, orthogonalize_split
from celo2.distributed.plan import Replicas
from celo2.stack import Direction
from celo2.step import (
    Batch,
    Context,
    Item,
    Reduce,
    batch_elements,
    batched,
    carry_out,
    chunks,
    direction_of,
    no_reduction,
    orthogonalized,
    room_for,
    steps_of,
)
from celo2.vectors import Vector


def orthogonalized_by_owners(items: list[Item], context: Context, replicas: Replicas) -> Iterator[tuple[Batch, Direction]]:
    """Whole matrices under replicas: every rank computes the directions of the batches that it owns, then sends them to all.

    A vector costs less than a message: without `shard_state` every rank computes its direction itself.
    """
    batches, results = list(batched(items)), []
    everywhere = [not replicas.shard_state and isinstance(batch[0].part, Vector) for batch in batches]
    for batch, by_all in zip(batches, everywhere, strict=True):
        if by_all:
            continue
        if batch[0].owner == replicas.rank:
            results.append(direction_of(batch, context).contiguous())
        elif not replicas.shard_state:  # all ranks keep the accumulators, so all ranks update them
            for chunk in chunks(batch, context.passes):
                carry_out([steps_of(chunk, None, context)], no_reduction)
    owned = [item for batch, by_all in zip(batches, everywhere, strict=True) if not by_all for item in batch]
    if context.has_step_sizes:
        sizes = [(item.part.step_size, item.owner) for item in owned if item.part.step_size is not None]
        share_by_owner_(sizes, replicas.group)
    if context.rule.whitening and not replicas.shard_state:
        share_by_owner_([(value, item.owner) for item in owned for value in item.whiteners.values()], replicas.group)
    mine = iter(results)
    for batch, by_all in zip(batches, everywhere, strict=True):
        is_owner = batch[0].owner == replicas.rank
        if by_all:
            count = context.orthogonalized
            direction = direction_of(batch, context)
            if not is_owner:
                context.orthogonalized = count  # only the owner counts
        else:
            direction = next(mine) if is_owner else room_for(batch, context)
            broadcast_(direction, batch[0].owner, replicas.group)
        yield batch, direction


def share_by_owner_(tensors: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup) -> None:
    """Send every float32 tensor from its owner to all ranks of `group`, in place, in one all-reduce: the others add zeros."""
    me = dist.get_rank(group)
    add_up_([tensor if owner == me else tensor.zero_() for tensor, owner in tensors], group)


def orthogonalized_over(items: list[Item], context: Context, group: dist.ProcessGroup, reduce: Reduce) -> Sequence[Direction]:
    """Split matrices: the ranks of `group` add up their sums, send directions to the owner of a matrix, and get results back."""
    directions: list[list[Tensor]] = []
    for item in items:
        dtype = context.ns_dtype if item.orthogonalize else torch.float32
        directions.append([torch.empty(piece.w.shape, dtype=dtype, device=piece.w.device) for piece in item.part.pieces])
    carry_out([steps_of([item], out, context) for item, out in zip(items, directions, strict=True)], reduce)
    matrices = {i: item.split for i, item in enumerate(items) if item.orthogonalize and item.split is not None}
    if matrices:
        empty = torch.empty(0, dtype=context.ns_dtype, device=context.rule.weights["b0"].device)
        split = [items[i] for i in matrices]
        results = orthogonalize_split(
            list(matrices.values()),
            [directions[i] for i in matrices],
            empty,
            group,
            lambda u, numbers: orthogonalized(u, [split[n] for n in numbers], context),
            batch_elements(empty.device),
        )
        if context.rule.whitening:
            owned = [(item, matrix.owner) for item, matrix in zip(split, matrices.values(), strict=True)]
            share_by_owner_([(value, owner) for item, owner in owned for value in item.whiteners.values()], group)
        for i, result in zip(matrices, results, strict=True):
            directions[i] = result
        context.orthogonalized += sum(matrix.owner == dist.get_rank(group) for matrix in matrices.values())
    return directions
