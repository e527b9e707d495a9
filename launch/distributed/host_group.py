"""What ranks send each other through CPU memory beside the training: checkpoints, and the verification of the first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A rank that writes slowly is not dead. One that dies closes its connections, and one that hangs is the heartbeat's business.
PATIENCE = timedelta(days=7)


class HostGroup:
    """All ranks over gloo, apart from the groups of the training, so that a thread may use it at any time.

    Every rank must make it at the same place. One process alone needs no group.

    Attributes:
        rank, world: as in the default process group.
        divided_over: the ranks of every group that parameters are divided over; under replicas there are several groups.
        waits: a context around every wait for other ranks, for who watches over them.
    """

    def __init__(self, rank: int = 0, world: int = 1, shard_group: dist.ProcessGroup | None = None) -> None:
        """`shard_group`: the group that this rank's parameters are divided over; None: they are whole."""
        self.rank, self.world, self.divided_over = rank, world, [[0]]
        self.waits: Callable[[], AbstractContextManager[None]] = nullcontext
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
        own = [rank] if shard_group is None else dist.get_process_group_ranks(shard_group)
        self.divided_over = [list(ranks) for ranks in sorted({tuple(ranks) for ranks in self.gather(own)})]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        with self.waits():
            dist.all_gather_object(values, value, self._group)
        return values

    def from_first(self, value: Any) -> Any:
        """`value` of the first rank, on every rank."""
        values = [value]
        if self._group is not None:
            with self.waits():
                dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def send(self, tensor: Tensor, to: int, tag: int) -> dist.Work:
        """Begin to send a contiguous CPU tensor. It must live until the work is waited for."""
        return dist.isend(as_bytes(tensor), to, self._group, tag)  # type: ignore[return-value]

    def receive(self, tensor: Tensor, source: int, tag: int) -> dist.Work:
        """Begin to fill a contiguous CPU tensor."""
        return dist.irecv(as_bytes(tensor), source, self._group, tag)  # type: ignore[return-value]


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as a vector of bytes: not every backend knows every dtype."""
    return tensor.detach().view(-1).view(torch.uint8)
