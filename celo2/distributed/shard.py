"""Local shards: which part of a parameter is on this rank.

Every supported sharding scheme gives a rank a contiguous range of the elements of a flattened parameter: all of them (DDP),
whole rows (FSDP2, a DTensor with `Shard(0)`), or any range (the flat partitions of DeepSpeed ZeRO). This range is the rank's
local shard. `celo2.distributed.collectives` exchanges what a rank cannot compute from its local shard alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from celo2.stack import Region, is_dtensor

Ranges = list[tuple[int, int]]  # (start, stop) of the local shard of every rank of a process group


class ShardingError(RuntimeError):
    """Shards that the optimizer cannot use: an element on no rank or on two, ranks that disagree, an unknown scheme."""


@dataclass(frozen=True)
class LocalShard:
    """The elements [start, stop) of a flattened parameter of `shape`; the ranks of `group` hold the others.

    Without a group the parameter is whole on this rank. A rank may hold nothing (start == stop).
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalShard:
        """The same object: it is immutable, and copies share its process group anyway."""
        return self

    @property
    def whole(self) -> bool:
        """Whether the parameter is not sharded: this rank holds every element."""
        return self.group is None


def local_shard_of(p: Any) -> LocalShard:
    """The local shard of parameter `p`: its attribute `local_shard` if it has one, the shard given by its placements if it is a
    DTensor, otherwise the whole parameter.

    Raises:
        ShardingError: a DTensor that is sharded in another way than along its first axis over one axis of its mesh.
    """
    given = getattr(p, "local_shard", None)
    if given is not None:
        return given
    shape = tuple(p.shape)
    sharded = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()] if is_dtensor(p) else []
    if not sharded:
        return LocalShard(shape, 0, p.numel())
    placement = p.placements[sharded[0]]
    if len(sharded) > 1 or type(placement).__name__ != "Shard" or placement.dim != 0:
        raise ShardingError(
            f"a parameter of shape {shape} is placed as {p.placements}; only Shard(0) over one mesh axis is supported"
        )
    mesh, axis = p.device_mesh, sharded[0]
    chunk = -(-shape[0] // mesh.size(axis))
    first = min(mesh.get_local_rank(axis) * chunk, shape[0])
    last = min(first + chunk, shape[0])
    if p.to_local().numel() and tuple(p.to_local().shape) != (last - first, *shape[1:]):
        raise ShardingError(
            f"a parameter of shape {shape} has a local shard of {tuple(p.to_local().shape)}, not {last - first} rows"
        )
    row = math.prod(shape[1:])
    return LocalShard(shape, first * row, last * row, mesh.get_group(axis))


def refuse_fsdp1(params: Iterable[Tensor]) -> None:
    """Raise ShardingError if FSDP1 has flattened the parameters of a model; all ranks come to the same result."""
    flattened = [p for p in params if getattr(p, "_fsdp_flattened", False)]
    if flattened and all(p.ndim < 2 for p in flattened):  # with the strategy NO_SHARD they are whole and have their axes
        raise ShardingError(
            "FSDP1 (FullyShardedDataParallel) has flattened the parameters, and no matrix is left for the rule; "
            "use FSDP2 (torch.distributed.fsdp.fully_shard)"
        )


@dataclass
class SplitMatrix:
    """One matrix (R, C) that no rank holds whole, and the regions of it on each rank, in the order in which ranks send them."""

    rows: int
    cols: int
    held: list[list[Region]]  # by rank in the group
    owner: int = 0  # the rank that orthogonalizes it


def check_cover(shape: tuple[int, ...], ranges: Ranges, name: str) -> None:
    """Raise ShardingError unless the local shards of all ranks together hold every element of a parameter exactly once."""
    numel, at = math.prod(shape), 0
    for start, stop in sorted(held for held in ranges if held[0] < held[1]):
        if start != at:
            what = "no rank updates" if start > at else "two ranks update"
            raise ShardingError(f"{what} elements {min(at, start)} to {max(at, start) - 1} of {name}, shape {shape}")
        at = stop
    if at != numel:
        what = f"no rank updates elements {at} to {numel - 1}" if at < numel else f"there are more than {numel} elements"
        raise ShardingError(f"{what} of {name}, shape {shape}")
