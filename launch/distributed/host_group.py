"""Communication through CPU memory beside the training: for checkpoints, and for the verification of the first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A rank that writes slowly is not dead. A rank that dies closes its connections, and the heartbeat detects a rank that hangs.
PATIENCE = timedelta(days=7)


class HostGroup:
    """A gloo group of all ranks, separate from the groups of the training, so that a thread can use it at any time.

    Every rank must construct it at the same point. A single process makes no group.

    Attributes:
        rank, world: as in the default process group.
        divided_over: the ranks of each group over which parameters are sharded; with replicas there are several groups.
        waits: a context that is entered for every wait for other ranks; the heartbeat sets it.
    """

    def __init__(self, rank: int = 0, world: int = 1, shard_group: dist.ProcessGroup | None = None) -> None:
        """`shard_group`: the group over which this rank's parameters are sharded; None: they are whole."""
        self.rank, self.world, self.divided_over = rank, world, [[0]]
        self.waits: Callable[[], AbstractContextManager[None]] = nullcontext
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
        own = [rank] if shard_group is None else dist.get_process_group_ranks(shard_group)
        self.divided_over = [list(ranks) for ranks in sorted({tuple(ranks) for ranks in self.gather(own)})]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        with self.waits():
            dist.all_gather_object(values, value, self._group)
        return values

    def from_first(self, value: Any) -> Any:
        """Return the value of the first rank, on every rank."""
        values = [value]
        if self._group is not None:
            with self.waits():
                dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def send(self, tensor: Tensor, to: int, tag: int) -> dist.Work:
        """Start to send a contiguous CPU tensor. The tensor must live until the returned work has been waited for."""
        return dist.isend(as_bytes(tensor), to, self._group, tag)  # type: ignore[return-value]

    def receive(self, tensor: Tensor, source: int, tag: int) -> dist.Work:
        """Start to fill a contiguous CPU tensor with what `source` sends."""
        return dist.irecv(as_bytes(tensor), source, self._group, tag)  # type: ignore[return-value]


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a view of a contiguous tensor as a vector of bytes, since not every backend supports every dtype."""
    return tensor.detach().view(-1).view(torch.uint8)
