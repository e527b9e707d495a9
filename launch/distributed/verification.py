"""Proof at the first step that sharding changed nothing: every matrix was orthogonalized, and one is recomputed whole.

ZeRO hands optimizers flat vectors; a rule that takes them for biases trains on, only worse. So the counts of all ranks are
compared with the model's own, and one parameter is gathered before and after the step and compared with `celo2.rule.update`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from celo2 import Celo2, ShardingError
from celo2.distributed.collectives import gather_objects
from celo2.layout import stacked_axes, stacked_shape, to_stack
from celo2.rule import accumulator_shapes, update
from launch.checkpoint.gather import MEANS, REPLICATED, gather, gather_means, kept_here
from launch.distributed.strategy import Shard, Strategy

# RMS of the difference of two directions of RMS 1. Measured over all strategies on 2 and 4 processes: 1.3e-6 in float32 (1.8e-5
# for an embedding under celo2-base), 0.007 with bfloat16 Newton-Schulz. A matrix that was left out differs by about 1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


class Proof:
    """Watches the steps of a strategy's optimizer until one of them has been proved, and raises on every rank if it fails."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.handles = []
        self.before: dict[str, Tensor] = {}
        self.problem: str | None = None
        self.steps = 0
        self.done = strategy.world == 1 or not hasattr(strategy.counter, "orthogonalized")
        if not self.done and isinstance(strategy.optimizer, Celo2):
            self.name, self.options = self.choose()
            self.handles.append(strategy.optimizer.register_step_pre_hook(self.look_before))
            self.handles.append(strategy.optimizer.register_step_post_hook(self.look_after))

    def choose(self) -> tuple[str, dict[str, Any]]:
        """The first parameter of the rule that is split over ranks, or else the first, and its group; on all ranks the same."""
        optimizer = self.strategy.optimizer
        options = {p: group for group in optimizer.param_groups for p in group["params"] if optimizer.takes_rule(p, group)}
        mine = {n: shard for n, shard in self.strategy.shards.items() if shard.weight in options}
        split = [n for n, shard in mine.items() if sum(stop > start for start, stop in shard.runs) > 1]
        name = (split or list(mine))[0]
        return name, options[mine[name].weight]

    def gathered(self) -> dict[str, Tensor]:
        """Weight, gradient and accumulators of the chosen parameter, whole, on the first rank of its group (DDP: on all)."""
        shard = self.strategy.shards[self.name]
        state = self.strategy.optimizer.state.get(shard.weight, {})
        values = {"weight": shard.weight.detach(), "gradient": shard.weight.grad, **state}
        if shard.local_shard.whole:
            return {key: value.clone() for key, value in values.items()} if kept_here(self.strategy, shard) else {}
        cut = {key: value for key, value in values.items() if key not in REPLICATED}
        whole = gather(shard, list(cut.values()))
        means = gather_means(shard, self.options["matrices"], {key: state[key] for key in MEANS if key in state})
        return {key: value.clone() for key, value in values.items()} | dict(zip(cut, whole, strict=True)) | means if whole else {}

    def look_before(self, *_: object) -> None:
        """Remember what the step starts from."""
        if self.strategy.shards[self.name].weight.grad is not None:
            self.before = self.gathered()

    @torch.no_grad()
    def look_after(self, *_: object) -> None:
        """Compare with the rule on the whole parameter."""
        shard = self.strategy.shards[self.name]
        if shard.weight.grad is None:
            return
        after = self.gathered()
        if after:
            self.problem = self.compare(shard, self.before, after)
        self.before = {}

    def compare(self, shard: Shard, before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
        """What is wrong with a step from `before` to `after`, if anything."""
        optimizer, options = self.strategy.optimizer, self.options
        lr, layout, shape = float(options["lr"]), options["matrices"], shard.local_shard.shape
        if lr == 0:
            return None
        stack = lambda value: to_stack(value, shape, layout)  # noqa: E731
        forms = accumulator_shapes(stacked_shape(shape, layout), stacked_axes(stacked_shape(shape, layout), layout))
        state = {key: value.clone() if key in MEANS else stack(value) for key, value in before.items() if key in forms}
        if "count" in after:  # bfloat16 accumulators: this step's number
            state["count"] = after["count"]
        w, g = stack(before["weight"].float()), stack(before["gradient"].float())
        dtype = optimizer.ns_dtype or (torch.float32 if w.device.type == "cpu" else torch.bfloat16)
        orthogonalize = options["orthogonalize"] and optimizer.rule.variant != "celo2-base"
        axes = stacked_axes(stacked_shape(shape, layout), layout)
        rule = optimizer.rule.to(w.device)
        u = update(rule, state, g, w, orthogonalize=orthogonalize, ns_dtype=dtype, axes=axes)
        taken = (w * (1 - lr * options["weight_decay"]) - stack(after["weight"].float())) / lr
        difference = (taken - u).square().mean().sqrt().item()
        tolerance = TOLERANCE[dtype] if orthogonalize else TOLERANCE[torch.float32]
        # The weight's own rounding, seen through a division by lr.
        noise = torch.finfo(after["weight"].dtype).eps * w.abs().max().item() / lr
        if difference < tolerance + noise:
            return None
        return f"the update of {self.name} is {difference:.2g} RMS from the rule on the whole parameter, where an update has 1"

    def check(self) -> None:
        """After a step: raise ShardingError on all ranks if it was not what the rule says; afterwards nothing is watched.

        A step with a learning rate of 0 proves nothing: the next one is watched as well.
        """
        if self.done:
            return
        strategy = self.strategy
        self.steps += 1
        if not any(float(group["lr"]) for group in strategy.optimizer.param_groups):
            return
        for handle in self.handles:
            handle.remove()
        self.done = True
        reports = gather_objects((strategy.counter.orthogonalized, self.problem), dist.group.WORLD)
        counted = sum(count for count, _ in reports)
        expected = strategy.matrices * strategy.copies * self.steps
        problem = next((problem for _, problem in reports if problem), None)
        if counted != expected:
            problem = f"{counted} matrices were orthogonalized over all ranks, but the model has {expected}"
        if problem:
            raise ShardingError(f"distributed.strategy {strategy.config.distributed.strategy}: {problem}")
