"""From the local shards on each rank to whole tensors by name, which checkpoints hold and the verification compares."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from celo2 import Celo2
from celo2.distributed.consolidate import collect_divided
from celo2.layout import Layout, matrix_count, regions, stacked_shape
from launch.distributed.strategy import ShardedParameter, Strategy

MEANS = ("row", "col")  # means over a matrix: every rank moves them where the matrix is split, else the rank that has it whole
REPLICATED = (*MEANS, "step", "count")  # optimizer state that is not divided like the weights
Tensors = dict[str, Tensor]


def collect(strategy: Strategy) -> tuple[Tensors, Tensors]:
    """Whole weights and buffers, and whole optimizer state as `<parameter>/<key>`, copied to the CPU of the first rank.

    Every rank must call it; the others get nothing. One parameter at a time is gathered.
    """
    weights: Tensors = {}
    moments: Tensors = {}
    first = strategy.accelerator.is_main_process
    layouts = {p: group.get("matrices") for group in strategy.optimizer.param_groups for p in group["params"]}
    for name, shard in strategy.shards.items():
        values = {"": shard.weight.detach(), **strategy.optimizer.state.get(shard.weight, {})}
        whole = gather_whole(shard, values, layouts.get(shard.weight))
        if first:
            weights[name] = to_cpu(whole.pop(""))
            moments |= {f"{name}/{key}": to_cpu(value) for key, value in whole.items()}
    moments |= collect_divided_state(strategy)
    if first:
        weights |= {name: to_cpu(buffer) for name, buffer in strategy.buffers.items()}
    return weights, moments


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy that training does not touch."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def gather_whole(shard: ShardedParameter, values: Tensors, layout: Layout | None) -> Tensors:
    """`values` of one parameter, whole, on the first rank of its group; on the other ranks nothing.

    Args:
        shard: the parameter. Without a group everything is whole already, on every rank.
        values: the weight and the optimizer state by key. Those in REPLICATED are not divided over the ranks.
        layout: the matrices that the parameter stands for.
    """
    if shard.local_shard.whole:
        return values
    divided = {key: value for key, value in values.items() if key not in REPLICATED}
    whole = gather_divided(shard, list(divided.values()))
    means = gather_means(shard, layout, {key: values[key] for key in MEANS if key in values})
    return values | dict(zip(divided, whole, strict=True)) | means if whole else {}


def gather_to_first(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """`tensor` of every rank of `group`, of one size on all of them, on the first rank; on the others nothing."""
    received = None
    if dist.get_rank(group) == 0:
        received = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.gather(tensor, received, group=group, group_dst=0)
    return received or []


def gather_divided(shard: ShardedParameter, values: list[Tensor]) -> list[Tensor]:
    """The whole (..., *shape) of `values` (..., n), which are divided like the shard, on the first rank of its group.

    All values travel in one gather, as bytes, since they may have different dtypes.
    """
    shape = shard.local_shard.shape
    width = sum(math.prod(v.shape[:-1]) * v.element_size() for v in values)  # bytes for each element of the parameter
    longest = max(stop - start for start, stop in shard.ranges)
    packed = torch.cat([v.contiguous().view(-1).view(torch.uint8) for v in values])
    padded = torch.zeros(longest * width, dtype=torch.uint8, device=shard.weight.device)
    padded[: len(packed)] = packed
    received = gather_to_first(padded, shard.local_shard.group)
    if not received:
        return []
    whole = [v.new_empty(*v.shape[:-1], math.prod(shape)) for v in values]
    for (start, stop), data in zip(shard.ranges, received, strict=True):
        at = 0
        for target in whole:
            leading = target.shape[:-1]
            size = math.prod(leading) * (stop - start) * target.element_size()
            piece = data[at : at + size].clone()  # a copy is aligned, as a view in another dtype must be
            target[..., start:stop] = piece.view(target.dtype).view(*leading, stop - start)
            at += size
    return [v.view(*v.shape[:-1], *shape) for v in whole]


def gather_means(shard: ShardedParameter, layout: Layout | None, means: Tensors) -> Tensors:
    """Row and column means (K, N, ·) of all N matrices of a parameter, on the first rank of its group.

    Nothing where the first rank has the newest of all matrices itself.
    """
    shape = shard.local_shard.shape
    stack = stacked_shape(shape, layout)
    if not means or len(stack) < 2:
        return {}
    holders: dict[int, int] = {}  # the rank that has a matrix whole, by matrix
    for rank, (start, stop) in enumerate(shard.ranges):
        for region in regions(shape, layout, start, stop):
            if region.is_full(*stack[-2:]):
                holders |= dict.fromkeys(range(region.matrices.start, region.matrices.stop), rank)
    if not any(holders.values()):
        return {}
    newest: Tensors = {}
    for key, own in means.items():
        received = gather_to_first(own.contiguous(), shard.local_shard.group)
        if received:
            newest[key] = own.clone()
            matrices = newest[key].view(own.shape[0], matrix_count(stack), -1)
            for n, rank in holders.items():
                matrices[:, n] = received[rank].view_as(matrices)[:, n]
    return newest


def keeps_state(strategy: Strategy, shard: ShardedParameter) -> bool:
    """Whether this rank keeps optimizer state of the parameter, if there is any."""
    replicas = getattr(strategy.optimizer, "replicas", None)
    return replicas is None or shard.weight not in replicas.owners or replicas.keeps_state(shard.weight)


def collect_divided_state(strategy: Strategy) -> Tensors:
    """Optimizer state that replicas have divided among each other (`distributed.shard_state`), on the first rank.

    Without what the first rank keeps itself. Every rank must call it.
    """
    if not isinstance(strategy.optimizer, Celo2):
        return {}
    found = collect_divided(strategy.optimizer, to=0)
    state = {name: found.get(shard.weight, {}) for name, shard in strategy.shards.items()}
    return {f"{name}/{key}": value for name, of_weight in state.items() for key, value in of_weight.items()}
