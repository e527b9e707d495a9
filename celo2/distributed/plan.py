"""The plan of a step: the settings that all ranks must agree on, and the rank that orthogonalizes each matrix."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.distributed.collectives import gather_objects
from celo2.distributed.shard import LocalShard, Ranges, ShardingError, SplitMatrix, check_cover, local_shard_of, refuse_fsdp1
from celo2.layout import Layout, is_factored_over_batch, matrix_count, regions, stacked_shape
from celo2.orthogonalize import newton_schulz_flops
from celo2.rule import Rule
from celo2.stack import Region, is_dtensor


def balance(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Assign each cost to a rank, the highest cost first, each to the rank with the lowest load; returns the ranks.

    `loads` holds the load of every rank so far; the assigned costs are added to it in place.
    """
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    return owners


@dataclass
class Entry:
    """One parameter as this rank sees it, and which of its matrices are split over ranks."""

    name: str
    p: Tensor
    local_shard: LocalShard
    by_rule: bool
    orthogonalize: bool
    layout: Layout | None
    whitened: bool = False  # whether its matrices have whiteners
    group: Mapping[str, Any] = field(default_factory=dict)  # its parameter group, whose options the ranks compare
    split: dict[int, SplitMatrix] = field(default_factory=dict)  # split matrices, by matrix number in the stack
    # For a DTensor with matrices that lie whole on one rank: the matrices whose row and column means come from other ranks.
    others: tuple[slice, ...] | None = None

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The shape of the parameter as the rule sees it."""
        return stacked_shape(self.local_shard.shape, self.layout)

    def cost(self) -> float:
        """The cost of a step for the owner: FLOPs of Newton–Schulz, or without it the number of elements, which is far less."""
        count = matrix_count(self.stacked_shape)
        if not (self.by_rule and self.orthogonalize and count):
            return self.p.numel()
        return count * newton_schulz_flops(*self.stacked_shape[-2:])


class Replicas:
    """Ranks that hold the same whole parameters (DDP) and divide the work on them: every parameter has one owner.

    The owner computes the direction and orthogonalizes it; the other ranks receive it. With `shard_state` only the owner keeps
    the optimizer state, and the owner of an AdamW parameter sends its new weights.
    """

    def __init__(self, group: dist.ProcessGroup, shard_state: bool) -> None:
        self.group, self.shard_state = group, shard_state
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.owners: dict[Tensor, int] = {}
        self.consolidated: dict[Tensor, dict[str, Tensor]] | None = {}  # state of the other ranks; None: this rank lacks it
        self.loads: dict[bool, list[float]] = defaultdict(lambda: [0.0] * self.world)  # by `by_rule`

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        """The same ranks, for copies of the parameters; the copy shares the process group."""
        twin = Replicas(self.group, self.shard_state)
        twin.owners, twin.loads = copy.deepcopy(self.owners, memo), copy.deepcopy(self.loads, memo)
        return twin

    def __getstate__(self) -> Any:
        raise TypeError("an optimizer with replicas cannot be pickled, as its process group cannot; save its state_dict()")

    def add(self, entries: Sequence[Entry]) -> None:
        """Give an owner to each parameter without one; the work of the rule and the work of AdamW are balanced separately."""
        for by_rule in (True, False):
            alike = [entry for entry in entries if entry.by_rule is by_rule and entry.p not in self.owners]
            owners = balance([entry.cost() for entry in alike], self.loads[by_rule])
            self.owners |= {entry.p: owner for entry, owner in zip(alike, owners, strict=True)}

    def keeps_state(self, p: Tensor) -> bool:
        """Whether this rank keeps the optimizer state of `p`."""
        return not self.shard_state or self.owners[p] == self.rank


def check_explained(groups: Sequence[dict[str, Any]], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ShardingError if parameters were flattened or resized; `shapes` are their shapes when they were added.

    Parameters may be replaced by others of the same shapes, as Accelerate does for FSDP2, moved to another group or removed. The
    shapes are those of whole parameters, so that all ranks come to the same result.
    """
    refuse_fsdp1(p for group in groups for p in group["params"])
    left = Counter(shapes)
    for index, group in enumerate(groups):
        for shape in (local_shard_of(p).shape for p in group["params"]):
            left[shape] -= 1
            if left[shape] >= 0:
                continue
            raise ShardingError(
                f"parameter group {index} holds a tensor of shape {shape} that Celo2 was not built with: a parameter was "
                "replaced or resized; add new parameters with add_param_group; for DeepSpeed ZeRO use "
                "celo2.distributed.deepspeed.ZeroClient"
            )


def make_plan(entries: Sequence[Entry], recipe: Callable[[], Mapping[str, Any]], replicas: Replicas | None = None) -> None:
    """Check that ranks agree on `entries` and on `recipe()`, the optimizer's settings by name. Fill in `split` and `others` of
    each entry and the owners of split matrices. The ranks are those of `replicas` and of the process groups of local shards.

    Raises:
        ShardingError: on every rank, if ranks disagree, if no rank or two ranks hold an element, or if the second moment of
            matrices that are split over ranks is factored over a batch axis.
    """
    if replicas is not None:
        gather_ranges(entries, replicas.group, recipe)
    groups: dict[dist.ProcessGroup, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.local_shard.group is not None:
            groups[entry.local_shard.group].append(entry)
    for group, members in groups.items():
        ranges = gather_ranges(members, group, recipe)
        loads = [0.0] * dist.get_world_size(group)
        orthogonalized: list[SplitMatrix] = []
        for entry, of_ranks in zip(members, ranges, strict=True):
            check_cover(entry.local_shard.shape, of_ranks, entry.name)
            shape = entry.stacked_shape
            if not entry.by_rule or len(shape) < 2 or 0 in shape:
                continue
            if is_factored_over_batch(shape, entry.layout):
                raise ShardingError(
                    f"{entry.name}, shape {shape}, is split over ranks, but its second moment is factored over a batch axis; "
                    "give its param group `matrices`"
                )
            entry.split, holders = split_matrices(entry.local_shard.shape, entry.layout, of_ranks)
            if holders and is_dtensor(entry.p):
                me = dist.get_rank(group)
                others = [n for n in range(matrix_count(shape)) if holders.get(n, 0) != me]  # rank 0 sends those of split ones
                entry.others = tuple(slices_of(others))
            if entry.orthogonalize:
                orthogonalized += entry.split.values()
                for holder in holders.values():
                    loads[holder] += newton_schulz_flops(*shape[-2:])
        owners = balance([newton_schulz_flops(matrix.rows, matrix.cols) for matrix in orthogonalized], loads)
        for matrix, owner in zip(orthogonalized, owners, strict=True):
            matrix.owner = owner


def slices_of(numbers: Sequence[int]) -> Iterator[slice]:
    """The fewest slices that cover exactly the ascending `numbers`."""
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [n for _, n in run]
        yield slice(members[0], members[-1] + 1)


def split_matrices(
    shape: tuple[int, ...], layout: Layout | None, ranges: Ranges
) -> tuple[dict[int, SplitMatrix], dict[int, int]]:
    """The split matrices of a parameter of `shape`, and the ranks that hold the others whole, both by matrix number."""
    stacked = stacked_shape(shape, layout)
    rows, cols = stacked[-2:]
    held: dict[int, list[list[Region]]] = {n: [[] for _ in ranges] for n in range(matrix_count(stacked))}
    holders: dict[int, int] = {}
    for rank, (start, stop) in enumerate(ranges):
        for region in regions(shape, layout, start, stop):
            for n in range(region.matrices.start, region.matrices.stop):
                if region.is_full(rows, cols):
                    del held[n]
                    holders[n] = rank
                else:
                    held[n][rank].append(region.of_matrix(n))
    return {n: SplitMatrix(rows, cols, by_rank) for n, by_rank in held.items()}, holders


def gather_ranges(members: Sequence[Entry], group: dist.ProcessGroup, recipe: Callable[[], Mapping[str, Any]]) -> list[Ranges]:
    """For every parameter, the ranges (start, stop) of its local shards on all ranks of `group`.

    Raises:
        ShardingError: on all ranks, if they disagree about the parameters or the settings of the optimizer.
    """
    facts = [facts_of(entry) for entry in members]
    ranges = [(e.local_shard.start, e.local_shard.stop) for e in members]
    everyone: list[Any] = gather_objects((recipe(), facts, ranges), group)
    ranks = dist.get_process_group_ranks(group)
    first_recipe, first_facts, _ = everyone[0]
    for rank, (other_recipe, other_facts, _) in zip(ranks, everyone, strict=True):
        if unlike := differences(first_recipe, other_recipe):
            raise ShardingError(f"ranks {ranks[0]} and {rank} run different optimizers: {unlike}; give every rank the same")
        if len(other_facts) != len(first_facts):
            raise ShardingError(
                f"rank {ranks[0]} has {len(first_facts)} parameters, rank {rank} has {len(other_facts)}; give every rank the "
                "same model and groups"
            )
        for mine, theirs in zip(first_facts, other_facts, strict=True):
            if unlike := differences(mine, theirs):
                raise ShardingError(
                    f"ranks {ranks[0]} and {rank} disagree about the parameter '{mine['name']}': {unlike}; give every rank the "
                    "same model and groups"
                )
    return [[tuple(theirs[i]) for _, _, theirs in everyone] for i in range(len(members))]


def facts_of(entry: Entry) -> dict[str, Any]:
    """Properties of a parameter that must be equal on all ranks. A tensor on an accelerator, as lr may be, is not read."""
    options = {name: entry.group[name] for name in ("lr", "weight_decay", "betas", "eps") if name in entry.group}
    for name, value in options.items():
        if isinstance(value, Tensor):
            options[name] = value.item() if value.device.type == "cpu" else f"a tensor on {value.device.type}"
    return {
        "name": entry.name,
        "shape": entry.local_shard.shape,
        "update": "celo2" if entry.by_rule else "adamw",
        "orthogonalize": entry.orthogonalize,
        "matrices": entry.layout,
        **options,
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The properties in which two ranks differ, as text with both values; empty if they agree."""
    return ", ".join(
        f"{name} {one.get(name)} and {other.get(name)}" for name in {**one, **other} if one.get(name) != other.get(name)
    )


def fingerprint(rule: Rule, ns_dtype: torch.dtype | None) -> str:
    """A hash of everything that determines the rule's updates: weights, settings and `ns_dtype`."""
    digest = hashlib.sha256(repr((rule.settings(), ns_dtype)).encode())
    for name, weight in sorted(rule.weights.items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
