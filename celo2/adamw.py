"""AdamW for what the rule does not take: torch's own fused step, which knows neither low precision nor replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from celo2.distributed.collectives import broadcast_by_owner_
from celo2.distributed.plan import Replicas
from celo2.distributed.shard import local


def adamw_(
    params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]], group: Mapping[str, Any], replicas: Replicas | None
) -> None:
    """One step of AdamW, in place; parameters of lower precision are updated in the state's precision and rounded once."""
    mine = [p for p in params if replicas is None or replicas.keeps_state(p)]
    if mine:
        states = [state[p] for p in mine]
        # The fused kernel walks storage: every tensor must be contiguous, as the state is.
        weights = [local(p).to(s["exp_avg"].dtype).contiguous() for p, s in zip(mine, states, strict=True)]
        adamw(
            weights,
            [local(p.grad).to(w.dtype).contiguous() for p, w in zip(mine, weights, strict=True)],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for p, weight in zip(mine, weights, strict=True):
            if weight is not local(p):
                local(p).copy_(weight.view(local(p).shape))
    if params and replicas is not None and replicas.shard_state:
        broadcast_by_owner_(params, replicas.owners, replicas.group)
