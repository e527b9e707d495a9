"""Bytes that a rank sends in collectives, counted as they happen, whoever starts them: DDP, FSDP2, DeepSpeed or the optimizer.

Every collective of torch.distributed goes through an operator `c10d::...` of the dispatcher; a dispatch mode sees them all,
those of the backward pass on the CPU included. The convention is that of rings: an all-reduce of n bytes sends 2 n (W-1)/W, an
all-gather or a reduce-scatter of n bytes in all n (W-1)/W, a broadcast n (W-1)/W on average over the ranks, an all-to-all what
leaves the rank.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SHARE = {"allreduce": 2.0, "allgather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0, "gather": 1.0, "scatter": 1.0}


class Traffic(TorchDispatchMode):
    """Counts while it is entered: `sent` bytes by kind of collective, and how often each was `called`."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)
        self.called: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count `func` if it is a collective, and let it happen."""
        if func.namespace == "c10d":
            kind = func.name().split("::")[1].split(".")[0].strip("_")
            self._count(kind, args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: tuple) -> None:
        family = next((name for name in ("alltoall", *SHARE) if kind.lstrip("_").startswith(name)), None)
        self.called[kind] += 1
        if family is None:
            return
        tensors = [t for t in flatten(args[0]) if isinstance(t, Tensor)]  # outputs: whole for gathers, a part for scatters
        if family == "reduce_scatter":
            tensors = [t for t in flatten(args[1]) if isinstance(t, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        world = next((dist.get_world_size(unbox(a)) for a in args if is_group(a)), dist.get_world_size())
        if family == "alltoall":
            size = sum(t.numel() * t.element_size() for t in flatten(args[1]) if isinstance(t, Tensor))
        self.sent[kind] += size * SHARE.get(family, 1.0) * (world - 1) / world


def flatten(value: Any) -> list[Any]:
    """All leaves of nested lists."""
    return [leaf for part in value for leaf in flatten(part)] if isinstance(value, (list, tuple)) else [value]


def is_group(value: Any) -> bool:
    """Whether an argument of an operator is a process group."""
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def unbox(value: Any) -> dist.ProcessGroup:
    """The process group of an operator's argument."""
    return dist.ProcessGroup.unbox(value)
