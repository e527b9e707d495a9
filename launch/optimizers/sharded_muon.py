"""torch's Muon on sharded matrices: the momentum stays with the weights, and only updates are sent to be orthogonalized.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. The update is that of `torch.optim.Muon`
with `adjust_lr_fn="match_rms_adamw"`, which takes whole matrices only. The orthogonalization is torch's own function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.distributed.collectives import orthogonalize_split
from celo2.distributed.plan import Entry, make_plan
from celo2.distributed.shard import local_shard_of
from celo2.layout import regions
from celo2.step import batch_elements
from launch.private import muon_orthogonalize


class ShardedMuon(torch.optim.Optimizer):
    """Muon over local shards of matrices (R, C): parameters are this rank's local shards, flat. Equals torch.optim.Muon.

    State, allocated at construction: `momentum_buffer`, as long as the local shard.
    """

    def __init__(self, params: list[dict[str, Any]], momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": weight_decay, "momentum": momentum})
        self.orthogonalized = 0  # matrices that this rank has orthogonalized so far
        self.entries: dict[Tensor, Entry] = {}  # found at the first step
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.entries:
            for group in self.param_groups:
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    self.entries[p] = Entry(name, p, local_shard_of(p), by_rule=True, orthogonalize=True, layout=None)
            make_plan(list(self.entries.values()), lambda: {"optimizer": "muon"})
        split: dict[dist.ProcessGroup, list[tuple]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, split)
        for process_group, items in split.items():
            matrices = [matrix for matrix, *_ in items]
            pieces = [views for _, views, *_ in items]
            empty = torch.empty(0, dtype=torch.bfloat16, device=items[0][2].device)
            results = orthogonalize_split(
                matrices, pieces, empty, process_group, lambda u, _: orthogonalize(u), batch_elements(empty.device)
            )
            me = dist.get_rank(process_group)
            for (matrix, _, p, held, group), parts in zip(items, results, strict=True):
                self.orthogonalized += matrix.owner == me
                for region, u in zip(held, parts, strict=True):
                    apply_(region.of(p), u, (matrix.rows, matrix.cols), group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], split: dict[dist.ProcessGroup, list[tuple]]) -> None:
        """Update the momentum of `p` and its matrices that are whole on this rank; add the other matrices to `split`."""
        local_shard, momentum = local_shard_of(p), group["momentum"]
        rows, cols = local_shard.shape
        assert p.grad is not None
        buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        direction = p.grad.lerp(buffer, momentum).bfloat16()
        for region in regions(local_shard.shape, None, local_shard.start, local_shard.stop):
            if region.is_full(rows, cols):
                u = orthogonalize(region.of(direction))
                apply_(region.of(p), u, (rows, cols), group)
                self.orthogonalized += 1
        for matrix in self.entries[p].split.values():
            assert local_shard.group is not None
            held = matrix.held[dist.get_rank(local_shard.group)]
            views = [region.of(direction) for region in held]
            split.setdefault(local_shard.group, []).append((matrix, views, p, held, group))


def orthogonalize(u: Tensor) -> Tensor:
    """Orthogonalize u (N, R, C) with torch's Newton–Schulz, which takes one matrix at a time."""
    return torch.stack([muon_orthogonalize(m) for m in u])


def apply_(w: Tensor, u: Tensor, shape: tuple[int, int], group: dict[str, Any]) -> None:
    """Apply torch's update in place to w, a part of a weight of shape `shape`."""
    lr = group["lr"]
    w.mul_(1 - lr * group["weight_decay"])
    w.add_(u, alpha=-lr * 0.2 * math.sqrt(max(shape)))
