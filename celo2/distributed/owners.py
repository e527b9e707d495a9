"""Step 8 over several ranks: the owner of a matrix orthogonalizes it, and the result travels.

`celo2.step` calls these instead of `orthogonalized_here` where several ranks share the work.
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
    """Whole matrices under replicas: every rank works on the batches that it owns, then everybody sends its results.

    Vectors cost less than a message: without `shard_state` every rank updates them itself.
    """
    batches, results = list(batched(items)), []
    everywhere = [not replicas.shard_state and isinstance(batch[0].part, Vector) for batch in batches]
    for batch, by_all in zip(batches, everywhere, strict=True):
        if by_all:
            continue
        if batch[0].owner == replicas.rank:
            results.append(direction_of(batch, context).contiguous())
        elif not replicas.shard_state:  # everybody keeps the accumulators, so everybody moves them
            for chunk in chunks(batch, context.passes):
                carry_out([steps_of(chunk, None, context)], no_reduction)
    if context.has_step_sizes:
        share_step_sizes_([batch for batch, by_all in zip(batches, everywhere, strict=True) if not by_all], replicas)
    if not replicas.shard_state:
        owned = [item for batch, by_all in zip(batches, everywhere, strict=True) if not by_all for item in batch]
        share_whiteners_(owned, [item.owner for item in owned], replicas.group)
    mine = iter(results)
    for batch, by_all in zip(batches, everywhere, strict=True):
        is_owner = batch[0].owner == replicas.rank
        if by_all:
            count = context.orthogonalized
            direction = direction_of(batch, context)
            if not is_owner:
                context.orthogonalized = count  # the owner counts for all
        else:
            direction = next(mine) if is_owner else room_for(batch, context)
            broadcast_(direction, batch[0].owner, replicas.group)
        yield batch, direction


def share_step_sizes_(batches: Sequence[Batch], replicas: Replicas) -> None:
    """Every rank gets the step sizes of these batches from their owners, in one message: to an owner's the others add 0."""
    sizes = []
    for batch in batches:
        for item in batch:
            if item.part.step_size is not None:
                sizes.append(item.part.step_size if item.owner == replicas.rank else item.part.step_size.zero_())
    add_up_(sizes, replicas.group)


def share_whiteners_(items: Sequence[Item], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    """Every rank of `group` gets the whiteners of these items from their owners, in one message: the others add 0."""
    for item, owner in zip(items, owners, strict=True):
        if owner != dist.get_rank(group):
            for value in item.whiteners.values():
                value.zero_()
    add_up_([value for item in items for value in item.whiteners.values()], group)


def orthogonalized_over(items: list[Item], context: Context, group: dist.ProcessGroup, reduce: Reduce) -> Sequence[Direction]:
    """Split matrices: the ranks of `group` complete each other's sums, and directions travel to an owner and back."""
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
        share_whiteners_(split, [matrix.owner for matrix in matrices.values()], group)
        for i, result in zip(matrices, results, strict=True):
            directions[i] = result
        context.orthogonalized += sum(matrix.owner == dist.get_rank(group) for matrix in matrices.values())
    return directions
