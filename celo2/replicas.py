"""Ranks that hold the same whole parameters (DDP) and divide the work on them: every parameter has one owner.

The owner computes the direction and orthogonalizes it; everybody else receives it. On request the owner alone keeps the
optimizer state, and an AdamW parameter's owner sends its new weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.distributed.collectives import broadcast_


class Replicas:
    """Owners of parameters among the ranks of a process group, balanced by what their updates cost."""

    def __init__(self, group: dist.ProcessGroup, shard_state: bool) -> None:
        self.group, self.shard_state = group, shard_state
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.owners: dict[Tensor, int] = {}
        self.loads: dict[str, list[float]] = defaultdict(lambda: [0.0] * self.world)  # by update

    def add(self, params: Sequence[Tensor], costs: Sequence[float], update: str) -> None:
        """Give each of `params` an owner, the dearest first, each to the rank with the least to do for `update`."""
        loads = self.loads[update]
        for p, cost in sorted(zip(params, costs, strict=True), key=lambda item: -item[1]):
            self.owners[p] = min(range(self.world), key=loads.__getitem__)
            loads[self.owners[p]] += cost

    def keeps_state(self, p: Tensor) -> bool:
        """Whether this rank keeps the optimizer state of `p`."""
        return not self.shard_state or self.owners[p] == self.rank

    def share_weights_(self, params: Sequence[Tensor]) -> None:
        """Give all ranks the owners' weights, one broadcast for each owner and dtype."""
        by_owner: dict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)
        for p in params:
            by_owner[self.owners[p], p.dtype].append(p)
        for (owner, _), tensors in sorted(by_owner.items(), key=lambda item: (item[0][0], str(item[0][1]))):
            flat = torch.cat([t.detach().flatten() for t in tensors])
            broadcast_(flat, owner, self.group)
            for t, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(values.view(t.shape))
