"""What all ranks of a process group must agree on before the first step: who holds what, and who orthogonalizes what."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from celo2 import layout as matrices
from celo2.distributed.collectives import gather_objects
from celo2.distributed.shard import LocalShard, ShardingError, check_cover
from celo2.orthogonalize import newton_schulz_flops
from celo2.rule import Rule
from celo2.rule_files import describe
from celo2.sharded import SplitMatrix, assign_owners, split_matrices


@dataclass
class Entry:
    """One parameter as a rank sees it."""

    name: str
    p: Tensor
    local_shard: LocalShard
    by_rule: bool
    orthogonalize: bool
    layout: matrices.Layout | None


Plan = dict[Tensor, dict[int, SplitMatrix]]  # the split matrices of a parameter, by their number in its stack


def make_plan(entries: list[Entry], recipe: str) -> Plan:
    """Compare `entries` and `recipe`, what the optimizer computes, over the ranks of every process group among the local shards,
    and divide the split matrices.

    Raises:
        ShardingError: on every rank alike, for ranks that disagree, elements that no rank or two ranks hold, or a batch of
            matrices that is split although its second moment is factored over the batch.
    """
    plan: Plan = {}
    groups: dict[dist.ProcessGroup, list[Entry]] = {}
    for entry in entries:
        if entry.local_shard.group is not None:
            groups.setdefault(entry.local_shard.group, []).append(entry)
    for group, members in groups.items():
        runs = agree(members, group, recipe)
        loads = [0.0] * dist.get_world_size(group)
        split: list[SplitMatrix] = []
        for i, entry in enumerate(members):
            shape = matrices.stacked_shape(entry.local_shard.shape, entry.layout)
            if not entry.by_rule or len(shape) < 2:
                continue
            stack = (matrices.matrix_count(shape), *shape[-2:])
            of_parameter, whole = split_matrices(entry.local_shard.shape, stack, entry.layout, runs[i])
            if of_parameter and min(matrices.stacked_axes(shape, entry.layout)) < len(shape) - 2:
                raise ShardingError(
                    f"{entry.name}, shape {shape}, is split over ranks, but its second moment is factored over a batch axis; "
                    "give its param group `matrices`"
                )
            plan[entry.p] = of_parameter
            if entry.orthogonalize:
                split += of_parameter.values()
                cost = newton_schulz_flops(*shape[-2:])
                loads = [load + count * cost for load, count in zip(loads, whole, strict=True)]
        assign_owners(split, loads)
    return plan


def agree(members: list[Entry], group: dist.ProcessGroup, recipe: str) -> list[list[tuple[int, int]]]:
    """The runs (start, stop) of every parameter on every rank of `group`, once all say the same of everything else and the
    runs hold every element once."""
    by_parameter = gather_runs(members, group, recipe)
    for entry, of_ranks in zip(members, by_parameter, strict=True):
        check_cover(entry.local_shard.shape, of_ranks, entry.name)
    return by_parameter


def gather_runs(members: list[Entry], group: dist.ProcessGroup, recipe: str) -> list[list[tuple[int, int]]]:
    """The runs (start, stop) of every parameter on every rank of `group`; ShardingError on all ranks if they disagree about what
    the parameters are or what is computed."""
    facts = [(e.name, e.local_shard.shape, e.by_rule, e.orthogonalize, e.layout) for e in members]
    runs = [(e.local_shard.start, e.local_shard.stop) for e in members]
    everyone: list[Any] = gather_objects((recipe, facts, runs), group)
    ranks = dist.get_process_group_ranks(group)
    first_recipe, first_facts, _ = everyone[0]
    for rank, (other_recipe, other_facts, _) in zip(ranks, everyone, strict=True):
        if other_recipe != first_recipe:
            raise ShardingError(f"ranks {ranks[0]} and {rank} run different rules: {first_recipe}, {other_recipe}")
        if len(other_facts) != len(first_facts):
            raise ShardingError(f"rank {ranks[0]} has {len(first_facts)} parameters, rank {rank} has {len(other_facts)}")
        for mine, theirs in zip(first_facts, other_facts, strict=True):
            if mine != theirs:
                raise ShardingError(f"ranks {ranks[0]} and {rank} disagree about a parameter: {mine}, {theirs}")
    return [[tuple(their_runs[i]) for _, _, their_runs in everyone] for i in range(len(members))]


def fingerprint(rule: Rule, ns_dtype: torch.dtype | None) -> str:
    """A hash of what the rule computes."""
    digest = hashlib.sha256(repr((describe(rule) | {"description": None}, ns_dtype)).encode())
    for name, weight in sorted(rule.weights.items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
