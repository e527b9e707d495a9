"""Step 8 over several ranks: the owner of a matrix orthogonalizes it, and the result travels.

`celo2.step` calls these instead of `orthogonalized_here` where several ranks share the work.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.distributed.collectives import broadcast_, orthogonalize_split
from celo2.distributed.plan import Replicas
from celo2.layout import Direction
from celo2.step import (
    Batch,
    Context,
    Item,
    Reduce,
    accumulate_,
    batch_elements,
    batched,
    chunks,
    direction_of,
    directions_,
    nothing,
    passes_over,
    room_for,
)
from celo2.vectors import Vector


def orthogonalized_by_owners(items: list[Item], context: Context, replicas: Replicas) -> Iterator[tuple[Batch, Direction]]:
    """Whole matrices under replicas: every rank works on the batches that it owns, then everybody sends its results.

    Vectors cost less than a message: without `shard_state` every rank updates them itself.
    """
    batches, mine = list(batched(items)), []
    everywhere = [not replicas.shard_state and isinstance(batch[0].part, Vector) for batch in batches]
    for batch, by_all in zip(batches, everywhere, strict=True):
        if by_all:
            continue
        if batch[0].owner == replicas.rank:
            mine.append(direction_of(batch, context).contiguous())
        elif not replicas.shard_state:  # everybody keeps the accumulators, so everybody moves them
            for chunk in chunks(batch, context.passes):
                accumulate_([passes_over(chunk, context)], context.rule, nothing)
    results = iter(mine)
    for batch, by_all in zip(batches, everywhere, strict=True):
        if by_all:
            count = context.orthogonalized
            direction = direction_of(batch, context)
            if batch[0].owner != replicas.rank:
                context.orthogonalized = count  # the owner counts for all
            yield batch, direction
            continue
        direction = next(results) if batch[0].owner == replicas.rank else room_for(batch, context)
        broadcast_(direction, batch[0].owner, replicas.group)
        yield batch, direction


def orthogonalized_over(items: list[Item], context: Context, group: dist.ProcessGroup, reduce: Reduce) -> list[Direction]:
    """Split matrices: the ranks of `group` complete each other's sums, and directions travel to an owner and back."""
    directions: list[list[Tensor]] = []
    for item in items:
        dtype = context.ns_dtype if item.orthogonalize else torch.float32
        directions.append([torch.empty(piece.w.shape, dtype=dtype, device=piece.w.device) for piece in item.part.pieces])
    directions_([passes_over([item], context) for item in items], directions, context.rule, reduce)
    matrices = {i: item.split for i, item in enumerate(items) if item.orthogonalize and item.split is not None}
    if matrices:
        empty = torch.empty(0, dtype=context.ns_dtype, device=context.rule.weights["b0"].device)
        results = orthogonalize_split(
            list(matrices.values()),
            [directions[i] for i in matrices],
            empty,
            group,
            context.passes.newton_schulz,
            batch_elements(empty.device),
        )
        for i, result in zip(matrices, results, strict=True):
            directions[i] = result
        context.orthogonalized += sum(matrix.owner == dist.get_rank(group) for matrix in matrices.values())
    return list(directions)
