"""Replicas hold the same weights, bit for bit. A flipped bit or a faulty device makes one differ, and nothing else would tell.

Every so many steps and before each checkpoint the ranks compare a sum over the bits of every weight that they hold in common: all
of them under ddp, zero1 and zero2, the copies of a shard under fsdp2 with `distributed.replicas`, and buffers everywhere; and the
averages of these weights (`train.average`), but those that ZeRO divides. It reads them once and sends 16 bytes a parameter.
"""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.distributed.collectives import gather_objects
from launch.distributed.heartbeat import RankError
from launch.distributed.strategy import Strategy

NAMED = 4  # parameters or ranks that a message names
REMEDY = (
    "this step is not saved, and the same command continues from the newest checkpoint; suspect the device or the memory of the "
    "rank (devices of different kinds: distributed.check_replicas=0)"
)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def replicated(strategy: Strategy) -> list[tuple[dict[str, Tensor], Any]]:
    """What this rank holds in common with the others of a process group, by name, and the group."""
    if strategy.world == 1:
        return []
    world, name = dist.group.WORLD, strategy.config.distributed.strategy
    found: list[tuple[dict[str, Tensor], Any]] = [(strategy.buffers, world)]
    if name in ("zero1", "zero2"):
        found.append((dict(strategy.model.named_parameters()), world))
    elif name == "ddp" or strategy.copies > 1:
        group = strategy.copies_group or world
        means = strategy.average.means if strategy.average is not None else {}
        averages = {f"the average of {name}": mean for name, mean in means.items()}
        found.append(({name: shard.weight for name, shard in strategy.shards.items()} | averages, group))
    return [(tensors, group) for tensors, group in found if tensors]


def bit_sums(tensors: list[Tensor]) -> Tensor:
    """The sum (n,) over the bits of each tensor, in elements read as integers: one changed bit changes it."""
    integers = [t.detach().flatten().view(INTEGERS[t.element_size()]) for t in tensors]
    return torch.stack([i.sum(dtype=torch.int64) for i in integers])


@torch.no_grad()
def require_equal_replicas(strategy: Strategy, step: int) -> None:
    """Compare what the ranks hold in common after `step`. Every rank must call it.

    Raises:
        RankError: on every rank, naming the first tensor that differs and the ranks whose copy is not that of most.
    """
    different: dict[str, dict[int, int]] = {}  # the sum of each rank of this group, by tensor
    for tensors, group in replicated(strategy):
        sums = bit_sums(list(tensors.values())).to(strategy.device)  # offloaded weights are in the memory of the host
        extremes = torch.cat([sums, -sums])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        highest, lowest = extremes[: len(sums)], -extremes[len(sums) :]
        if not torch.equal(highest, lowest):  # the host waits for the device
            everyone = gather_objects((dist.get_rank(), sums.tolist()), group)
            for i, name in enumerate(tensors):
                of_rank = {rank: values[i] for rank, values in everyone}
                if len(set(of_rank.values())) > 1:
                    different[name] = of_rank
    if strategy.world == 1:
        return
    # Under fsdp2 only the copies of one shard know of it.
    flag = torch.tensor(float(bool(different)), device=strategy.accelerator.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if flag.item():
        reports = gather_objects((socket.gethostname(), in_words(different)), dist.group.WORLD)  # type: ignore[arg-type]
        line = next(words for _, words in reports if words)
        hosts = [host for host, _ in reports]
        raise RankError(f"the replicas differ after step {step}: {line[0]} on {named(line[1], hosts)}; {REMEDY}")


def in_words(different: dict[str, dict[int, int]]) -> tuple[str, list[int]] | None:
    """The tensors that differ, and the ranks of the first one whose copy is not that of most."""
    if not different:
        return None
    first = next(iter(different.values()))
    values = list(first.values())
    usual = max(values, key=values.count)
    odd = [rank for rank, value in first.items() if value != usual]
    if 2 * len(odd) >= len(values):  # nobody can tell who is right
        odd = list(first)
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"{next(iter(different))}{more}", odd


def named(ranks: list[int], hosts: list[str]) -> str:
    """ "rank 3 (node1)"; "ranks 0 (node0), 1 (node1)"."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks[:NAMED]) + more
