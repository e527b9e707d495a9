"""Between whole tensors by name, which checkpoints hold, and the shards of them that are on each rank."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from celo2.distributed.collectives import gather_objects
from celo2.distributed.shard import LocalShard
from celo2.layout import Layout, matrix_count, regions, stacked_shape
from launch.distributed.strategy import Shard, Strategy

MEANS = ("row", "col")  # means over a matrix: every rank moves them where the matrix is split, else the rank that has it whole
REPLICATED = (*MEANS, "step", "count")  # optimizer state that is not divided like the weights
Tensors = dict[str, Tensor]


def collect(strategy: Strategy) -> tuple[Tensors, Tensors]:
    """Whole weights and buffers, and whole optimizer state as `<parameter>/<key>`, copied to the CPU of the first rank.

    Every rank must call it; the others get nothing. One parameter at a time travels.
    """
    weights: Tensors = {}
    moments: Tensors = {}
    first = strategy.accelerator.is_main_process
    layouts = {p: group.get("matrices") for group in strategy.optimizer.param_groups for p in group["params"]}
    for name, shard in strategy.shards.items():
        state = dict(strategy.optimizer.state.get(shard.weight, {}))
        if shard.local_shard.whole:
            whole, entries = shard.weight.detach(), state
        else:
            cut = {key: value for key, value in state.items() if key not in REPLICATED}
            gathered = gather(shard, [shard.weight.detach(), *cut.values()])
            means = gather_means(shard, layouts.get(shard.weight), {key: state[key] for key in MEANS if key in state})
            if not first:
                continue
            whole, *values = gathered
            entries = state | dict(zip(cut, values, strict=True)) | means
        if first:
            weights[name] = to_cpu(whole)
            moments |= {f"{name}/{key}": to_cpu(value) for key, value in entries.items()}
    moments |= collect_owned(strategy)
    if first:
        weights |= {name: to_cpu(buffer) for name, buffer in strategy.buffers.items()}
    return weights, moments


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy that training does not touch."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def gather(shard: Shard, values: list[Tensor]) -> list[Tensor]:
    """The whole (..., *shape) of `values` (..., n), which lie over the ranks like the shard, on the first rank of its group."""
    group, shape = shard.local_shard.group, shard.local_shard.shape
    width = sum(math.prod(v.shape[:-1]) * v.element_size() for v in values)  # bytes of an element of the parameter
    longest = max(stop - start for start, stop in shard.runs)
    mine = torch.zeros(longest * width, dtype=torch.uint8, device=shard.weight.device)
    packed = torch.cat([v.contiguous().view(-1).view(torch.uint8) for v in values])
    mine[: len(packed)] = packed
    first = dist.get_rank(group) == 0
    received = [torch.empty_like(mine) for _ in shard.runs] if first else None
    dist.gather(mine, received, group=group, group_dst=0)
    if not first:
        return []
    whole = [v.new_empty(*v.shape[:-1], math.prod(shape)) for v in values]
    for (start, stop), data in zip(shard.runs, received, strict=True):
        at = 0
        for target, value in zip(whole, values, strict=True):
            lead = value.shape[:-1]
            size = math.prod(lead) * (stop - start) * value.element_size()
            target[..., start:stop] = data[at : at + size].clone().view(value.dtype).view(*lead, stop - start)
            at += size
    return [v.view(*v.shape[:-1], *shape) for v in whole]


def gather_means(shard: Shard, layout: Layout | None, means: Tensors) -> Tensors:
    """Row and column means (K, N, ·) of all N matrices of a parameter, on the first rank of its group."""
    group, shape = shard.local_shard.group, shard.local_shard.shape
    stack = stacked_shape(shape, layout)
    if not means or len(stack) < 2:
        return {}
    holders = {}  # rank by matrix, of those that lie whole on a rank
    for rank, (start, stop) in enumerate(shard.runs):
        for region in regions(shape, layout, start, stop):
            if region.is_full(*stack[-2:]):
                holders |= dict.fromkeys(range(region.matrices.start, region.matrices.stop), rank)
    if not any(holders.values()):
        return {}
    first = dist.get_rank(group) == 0
    newest: Tensors = {}
    for key, own in means.items():
        received = [torch.empty_like(own) for _ in shard.runs] if first else None
        dist.gather(own.contiguous(), received, group=group, group_dst=0)
        if first:
            newest[key] = own.clone()
            matrices = newest[key].view(own.shape[0], matrix_count(stack), -1)
            for n, rank in holders.items():
                matrices[:, n] = received[rank].view_as(matrices)[:, n]
    return newest


def kept_here(strategy: Strategy, shard: Shard) -> bool:
    """Whether this rank keeps optimizer state of the shard, if there is any."""
    replicas = getattr(strategy.optimizer, "replicas", None)
    return replicas is None or shard.weight not in replicas.owners or replicas.keeps_state(shard.weight)


def collect_owned(strategy: Strategy) -> Tensors:
    """Optimizer state that only its owner among replicas keeps, on the first rank."""
    replicas = getattr(strategy.optimizer, "replicas", None)
    if replicas is None or not replicas.shard_state:
        return {}
    state = strategy.optimizer.state
    owned = {name: replicas.owners[shard.weight] for name, shard in strategy.shards.items() if shard.weight in replicas.owners}
    forms = {
        n: {k: (tuple(v.shape), v.dtype) for k, v in state[strategy.shards[n].weight].items()}
        for n in owned
        if owned[n] == replicas.rank
    }
    everyone: list[dict[str, Any]] = gather_objects(forms, replicas.group)
    moments: Tensors = {}
    for name, owner in owned.items():
        for key, (shape, dtype) in everyone[owner][name].items() if owner else ():
            size = math.prod(shape) * dtype.itemsize
            if replicas.rank == owner:
                value = state[strategy.shards[name].weight][key].contiguous().view(-1).view(torch.uint8)
                dist.send(value, group=replicas.group, group_dst=0)
            elif replicas.rank == 0:
                value = torch.empty(size, dtype=torch.uint8, device=strategy.accelerator.device)
                dist.recv(value, group=replicas.group, group_src=owner)
                moments[f"{name}/{key}"] = to_cpu(value.view(dtype).view(shape))
    return moments


def read_run(file: safe_open, entry: str, local_shard: LocalShard) -> Tensor:
    """What of the tensor `entry` (..., *shape) in a safetensors file belongs to a local shard (..., n), which may be all."""
    if local_shard.whole:
        return file.get_tensor(entry)
    part, shape = file.get_slice(entry), local_shard.shape
    row = math.prod(shape[1:])
    first, last = local_shard.start // row, -(-local_shard.stop // row)
    leading = len(part.get_shape()) - len(shape)
    rows = part[(*[slice(None)] * leading, slice(first, max(first, last)))]
    flat = rows.reshape(*rows.shape[:leading], -1)
    return flat[..., local_shard.start - first * row : local_shard.stop - first * row]
