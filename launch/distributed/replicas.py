"""Checks that replicas hold the same weights, bit for bit. No other check would notice a flipped bit or a faulty device.

Every `distributed.check_replicas` steps and before each checkpoint, the ranks compare a sum over the bits of every tensor that
they hold in common. These are: all weights under ddp, zero1 and zero2; the copies of a shard under fsdp2 with
`distributed.replicas`; buffers under every strategy; and the averages of these weights (`train.average`), except those that ZeRO
shards. The check reads each tensor once and sends 16 bytes a tensor.
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

NAMED = 4  # the most ranks that a message names
REMEDY = (
    "this step is not saved, and the same command continues from the newest checkpoint; suspect the device or the memory of the "
    "rank (devices of different kinds: distributed.check_replicas=0)"
)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def replicated(strategy: Strategy) -> list[tuple[dict[str, Tensor], Any]]:
    """Return the tensors, by name, that this rank holds in common with all ranks of a process group, for each such group."""
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
    """Return a checksum of each tensor, (n,): the sum of its elements, read as integers. One changed bit changes it."""
    integers = [t.detach().flatten().view(INTEGERS[t.element_size()]) for t in tensors]
    return torch.stack([i.sum(dtype=torch.int64) for i in integers])


@torch.no_grad()
def require_equal_replicas(strategy: Strategy, step: int) -> None:
    """Compare the tensors that ranks hold in common after `step`. Every rank must call it.

    Raises:
        RankError: on every rank, with the first tensor that differs and the ranks whose copy differs from the majority's.
    """
    different: dict[str, dict[int, int]] = {}  # tensors that differ: name -> checksum of each rank in the group
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
    # Under fsdp2, only the ranks with copies of that shard have seen the difference.
    flag = torch.tensor(float(bool(different)), device=strategy.accelerator.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if flag.item():
        reports = gather_objects((socket.gethostname(), in_words(different)), dist.group.WORLD)  # type: ignore[arg-type]
        line = next(words for _, words in reports if words)
        hosts = [host for host, _ in reports]
        raise RankError(f"the replicas differ after step {step}: {line[0]} on {named(line[1], hosts)}; {REMEDY}")


def in_words(different: dict[str, dict[int, int]]) -> tuple[str, list[int]] | None:
    """Return a text on the tensors that differ, and the ranks whose copy of the first one differs from the majority's."""
    if not different:
        return None
    first = next(iter(different.values()))
    values = list(first.values())
    usual = max(values, key=values.count)
    odd = [rank for rank, value in first.items() if value != usual]
    if 2 * len(odd) >= len(values):  # there is no majority: name all ranks
        odd = list(first)
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"{next(iter(different))}{more}", odd


def named(ranks: list[int], hosts: list[str]) -> str:
    """Return ranks and hosts as a text: "rank 3 (node1)"; "ranks 0 (node0), 1 (node1)"."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks[:NAMED]) + more
