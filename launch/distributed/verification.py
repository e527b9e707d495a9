"""Verifies, in the first step, that sharding changes nothing: all matrices were orthogonalized, and one update is recomputed.

ZeRO gives flat vectors to optimizers. A rule that mistakes them for biases would train on, but worse. So the number of
orthogonalized matrices over all ranks is compared with the model's number. And one parameter is gathered before and after the
step, and its update is compared with `celo2.rule.update`.
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
from launch.distributed.gather import MEANS, gather_whole, keeps_state
from launch.distributed.strategy import Strategy, is_expert
from launch.optimizers.additions import CAUTIOUS
from launch.optimizers.table import entry_of

# Largest RMS of the difference of two directions of RMS 1. Measured over all strategies on 2 and 4 processes: 1.3e-6 in float32
# (1.8e-5 for an embedding under celo2-base), 0.007 with bfloat16 Newton-Schulz. A matrix that was left out differs by about 1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


class Verification:
    """Observes the steps of a strategy's optimizer until one is verified. Raises ShardingError on every rank if it is wrong."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.handles = []
        self.before: dict[str, Tensor] = {}
        self.problem: str | None = None
        self.counted = 0  # matrices that were orthogonalized before this step
        self.without_gradient: set[str] = set()  # experts that got no token of this rank in this step
        self.done = strategy.world == 1 or not hasattr(strategy.counter, "orthogonalized")
        if not self.done:
            self.handles.append(strategy.counter.register_step_pre_hook(self.look_at_experts))
        if not self.done and isinstance(strategy.optimizer, Celo2):
            self.name, self.options = self.choose()
            self.handles.append(strategy.optimizer.register_step_pre_hook(self.look_before))
            self.handles.append(strategy.optimizer.register_step_post_hook(self.look_after))

    def choose(self) -> tuple[str, dict[str, Any]]:
        """Choose the first parameter of the rule that is split over ranks, or else the first one; the same on all ranks.

        Returns its name and its group.
        """
        optimizer: Any = self.strategy.optimizer
        options = {p: group for group in optimizer.param_groups for p in group["params"] if optimizer.takes_rule(p, group)}
        mine = {name: shard for name, shard in self.strategy.shards.items() if shard.weight in options}
        always = [name for name in mine if not is_expert(name)] or list(mine)
        split = [name for name in always if sum(stop > start for start, stop in mine[name].ranges) > 1]
        name = (split or always)[0]
        return name, options[mine[name].weight]

    def gathered(self) -> dict[str, Tensor]:
        """Return whole copies of weight, gradient and accumulators of the chosen parameter on the first rank of its group.

        Under DDP, every rank that keeps its state returns them. All other ranks return nothing.
        """
        shard = self.strategy.shards[self.name]
        if not keeps_state(self.strategy, shard):
            return {}
        state = self.strategy.optimizer.state.get(shard.weight, {})
        values = {"weight": shard.weight.detach(), "gradient": shard.weight.grad, **state}
        return {key: value.clone() for key, value in gather_whole(self.strategy, shard, values, self.options["matrices"]).items()}

    def look_at_experts(self, *_: object) -> None:
        """Store which experts have no gradient in the coming update, because they got no token of this rank."""
        shards = self.strategy.shards.items()
        self.without_gradient = {name for name, shard in shards if is_expert(name) and shard.weight.grad is None}

    def look_before(self, *_: object) -> None:
        """Store the chosen parameter before the step."""
        if self.strategy.shards[self.name].weight.grad is not None:
            self.before = self.gathered()

    @torch.no_grad()
    def look_after(self, *_: object) -> None:
        """Compare the step with the rule on the whole parameter."""
        if self.strategy.shards[self.name].weight.grad is None:
            return
        after = self.gathered()
        if after:
            self.problem = self.compare(self.before, after)
        self.before = {}

    def compare(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
        """Return what is wrong with the step from `before` to `after`; None if nothing is."""
        strategy, options, shape = self.strategy, self.options, self.strategy.shards[self.name].local_shard.shape
        optimizer: Any = strategy.optimizer
        lr, layout = float(options["lr"]), options["matrices"]
        if lr == 0:
            return None
        w = to_stack(before["weight"].float(), shape, layout)
        dtype = newton_schulz_dtype(optimizer, w.device)
        orthogonalize = options["orthogonalize"] and entry_of(strategy.config.optimizer).orthogonalizes
        u = whole_direction(optimizer, options, shape, before, after.get("count"), orthogonalize)
        new = to_stack(after["weight"].float(), shape, layout)
        decay = options["weight_decay"] + options.get(CAUTIOUS, 0.0) * (u * w >= 0)
        taken = (w * (1 - lr * decay) - new) / lr
        difference = (taken - u).square().mean().sqrt().item()
        size = (u.square().mean().sqrt().item() or 1.0) if optimizer.rule.has_step_sizes else 1.0
        tolerance = size * (TOLERANCE[dtype] if orthogonalize else TOLERANCE[torch.float32])
        # The rounding of the weight, which the division by lr above magnifies.
        noise = torch.finfo(after["weight"].dtype).eps * w.abs().max().item() / lr
        if difference < tolerance + noise:
            return None
        of_rule = f"from the rule on the whole parameter, where an update has {size:.2g}"
        return f"the update of {self.name} is {difference:.2g} RMS {of_rule}"

    def check(self, healthy: bool) -> None:
        """After a step, raise ShardingError on all ranks if the step was wrong. Only one step is verified.

        A refused step, or one with a learning rate of 0, proves nothing: then the next step is observed as well.
        """
        if self.done:
            return
        strategy = self.strategy
        count = strategy.counter.orthogonalized - self.counted
        self.counted += count
        if not healthy:
            self.problem = None
        if not healthy or not any(float(group["lr"]) for group in strategy.optimizer.param_groups):
            return
        for handle in self.handles:
            handle.remove()
        self.done = True
        own = (count, self.problem, self.without_gradient)
        counts, problems, idle = zip(*gather_objects(own, dist.group.WORLD), strict=True)  # type: ignore[arg-type]
        counted = sum(counts)
        skipped = sum(strategy.hidden.get(name, 0) for name in set.intersection(*idle))  # experts without a token on any rank
        expected = strategy.copies * (strategy.matrices - skipped)
        problem = next(filter(None, problems), None)
        if counted != expected:
            problem = f"{counted} matrices were orthogonalized over all ranks, but the model has {expected}"
        if problem:
            raise ShardingError(f"distributed.strategy {strategy.config.distributed.strategy}: {problem}")


def newton_schulz_dtype(optimizer: Any, device: torch.device) -> torch.dtype:
    """Return the dtype in which Celo2 orthogonalizes on `device`."""
    return optimizer.ns_dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def whole_direction(
    optimizer: Any,
    options: dict[str, Any],
    shape: tuple[int, ...],
    before: dict[str, Tensor],
    count: Tensor | None,
    orthogonalize: bool,
) -> Tensor:
    """Return the rule's direction for a whole parameter, as a stack of its matrices. Its RMS is 1 or the rule's step size.

    Args:
        optimizer: the Celo2 optimizer.
        options: the parameter's group.
        shape: the parameter's shape.
        before: its weight, gradient and accumulators before the step; missing accumulators are 0.
        count: with bfloat16 accumulators, the number of this step.
        orthogonalize: whether to do step 8 of the algorithm.
    """
    layout = options["matrices"]
    stack = stacked_shape(shape, layout)
    axes = stacked_axes(stack, layout)
    w, g = (to_stack(before[key].float(), shape, layout) for key in ("weight", "gradient"))
    state = {}
    for key, of_key in accumulator_shapes(stack, axes, orthogonalize and optimizer.rule.whitening > 0).items():
        if key not in before:
            state[key] = torch.zeros(of_key, device=w.device)
        else:
            state[key] = before[key].clone() if key in MEANS else to_stack(before[key], shape, layout)
    if count is not None:
        state["count"] = count
    rule = optimizer.rule.to(w.device)
    return update(rule, state, g, w, orthogonalize=orthogonalize, ns_dtype=newton_schulz_dtype(optimizer, w.device), axes=axes)
