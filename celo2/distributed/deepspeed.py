"""DeepSpeed ZeRO: find the local shards of parameters in its flat partitions.

ZeRO gives an optimizer one flat vector for each param group and rank; the vector may begin and end inside a matrix. `ZeroClient`
stands in for the optimizer while DeepSpeed flattens the parameters. `bind` then builds the real optimizer over views of the
vectors, each with its `LocalShard`. From then on every optimizer step of DeepSpeed is a step of the real optimizer:

    client = ZeroClient(param_groups(model, lr, adamw_lr, weight_decay))
    engine, *_ = deepspeed.initialize(model=model, optimizer=client, config={..., "zero_allow_untested_optimizer": True})
    optimizer = client.bind(engine.optimizer, lambda groups: Celo2(groups, lr=lr))

Build learning-rate schedulers on the optimizer that `bind` returns. Offloading to CPU or disk is not supported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.distributed.shard import LocalShard, ShardingError


class ZeroClient(torch.optim.Optimizer):
    """The optimizer that DeepSpeed sees: it has the param groups of a model, and updates nothing until it is bound."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """`groups` are those for `Celo2`, with `param_names`, over the parameters as they are before DeepSpeed changes them."""
        self.inner: torch.optim.Optimizer | None = None
        self.gate: Callable[[], bool] = lambda: True  # called before every update, when the gradients exist; False skips it
        self.views: dict[Tensor, list[tuple[Tensor, int]]] = defaultdict(list)  # by flat vector: (view of a shard, its offset)
        self.groups = [{**group, "shapes": [tuple(p.shape) for p in group["params"]]} for group in groups]
        self.originals = [list(group["params"]) for group in groups]
        super().__init__([{"params": group["params"], "lr": group["lr"]} for group in groups], {})

    def bind(self, zero: Any, build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Build the real optimizer: `build` gets the groups over this rank's local shards; `zero` is `engine.optimizer`.

        Raises:
            ShardingError: a ZeRO optimizer of an unknown kind, or a parameter that it does not have.
        """
        held: dict[Tensor, Any] = {p: where for p, *where in find_held(zero)}
        groups = []
        for group, originals in zip(self.groups, self.originals, strict=True):
            views = []
            for name, shape, p in zip(group["param_names"], group.pop("shapes"), originals, strict=True):
                if p not in held:
                    raise ShardingError(f"DeepSpeed's {type(zero).__name__} does not know the parameter {name}")
                flat, offset, start, numel, process_group = held[p]
                view: Any = flat.detach()[offset : offset + numel]
                view.local_shard = LocalShard(shape, start, start + numel, process_group)
                views.append(view)
                self.views[flat].append((view, offset))
            groups.append({**group, "params": views})
        self.inner = build(groups)
        return self.inner

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the flat vectors in the groups: one or several for each call of DeepSpeed, gradients averaged and clipped."""
        flats = [flat for group in self.param_groups for flat in group["params"]]
        for flat in flats:
            if flat not in self.views:
                raise ShardingError(
                    f"DeepSpeed gave the optimizer a flat vector of {flat.numel()} elements without a parameter of bind()"
                )
        if self.inner is None or not self.gate():
            return
        for flat in flats:
            for view, offset in self.views[flat]:
                view.grad = flat.grad[offset : offset + view.numel()]
        self.inner.step()
        for flat in flats:
            for view, _ in self.views[flat]:
                view.grad = None


def find_held(zero: Any) -> Iterator[tuple[Tensor, Tensor, int, int, int, dist.ProcessGroup]]:
    """For each parameter of a ZeRO optimizer, the part that this rank updates; it may be empty.

    Yields (parameter, flat vector, offset of the part in it, start of the part in the flattened parameter, number of elements,
    process group).
    """
    if hasattr(zero, "single_partition_of_fp32_groups"):  # stages 1 and 2
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            for p in zero.bit16_groups[i]:
                mapping, group = getattr(p, "_hp_mapping", None), zero.real_dp_process_group[i]
                if mapping is None:
                    yield p, flat, 0, 0, 0, group
                else:
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield p, flat, here.start, there.start, here.numel, group
    elif hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        rank = dist.get_rank(zero.dp_process_group)
        for i, params in enumerate(zero.fp16_groups):
            offset = 0
            for p in params:
                start = min(rank * p.partition_numel(), p.ds_numel)  # the last partitions are padded
                numel = min(p.partition_numel(), p.ds_numel - start)
                yield p, zero.fp32_partitioned_groups_flat[i], offset, start, numel, zero.dp_process_group
                offset += p.partition_numel()
    else:
        raise ShardingError(f"{type(zero).__name__} is not a ZeRO optimizer of stage 1, 2 or 3")
