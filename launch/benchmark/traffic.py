"""Bytes that a rank sends in collectives, counted as they happen, whoever starts them: DDP, FSDP2, DeepSpeed or the optimizer.

Every collective of torch.distributed goes through an operator `c10d::...` of the dispatcher. A dispatch mode sees them all, on
the CPU also those of the backward pass. Bytes are counted as rings send them, with W ranks: an all-reduce of n bytes sends
2 n (W-1)/W, an all-gather or a reduce-scatter of n bytes in all n (W-1)/W, a broadcast n (W-1)/W on average over the ranks, an
all-to-all what leaves the rank.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.private import DispatchMode

SHARE = {  # factor on n (W-1)/W, by the beginning of the operator's name
    "alltoall": 1.0,
    "allreduce": 2.0,
    "allgather": 1.0,
    "reduce_scatter": 1.0,
    "broadcast": 1.0,
    "gather": 1.0,
    "scatter": 1.0,
}
# The argument with the n bytes: the first, which is the output, except where that is only a part of them.
ARGUMENT = {"alltoall": 1, "reduce_scatter": 1}


class Traffic(DispatchMode):
    """Counts the bytes `sent` while it is entered, by kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count `func` if it is a collective, and let it happen."""
        if func.namespace == "c10d":
            self._count(func.name().split("::")[1].split(".")[0].strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: tuple) -> None:
        family = next((name for name in SHARE if kind.startswith(name)), None)
        if family is not None:
            size = sum(leaf.nbytes for leaf in leaves(args[ARGUMENT.get(family, 0)]) if isinstance(leaf, Tensor))
            world = world_size(args)
            self.sent[kind] += size * SHARE[family] * (world - 1) / world


def leaves(value: Any) -> list[Any]:
    """All leaves of nested lists."""
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else [value]


def world_size(args: tuple) -> int:
    """Ranks in the process group among the arguments of a collective, or in the default group."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument).size()
            except RuntimeError:  # an object of another class
                continue
    return dist.get_world_size()
