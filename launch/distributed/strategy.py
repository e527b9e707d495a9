"""The interface of a strategy for the training loop, and the description of a parameter's part on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel

from celo2 import ShardingError
from celo2.distributed.collectives import gather_objects
from celo2.distributed.shard import LocalShard, check_cover, local_shard_of
from celo2.layout import matrix_count, stacked_shape
from configs.schema import Config
from launch.distributed.average import Average
from launch.distributed.birth import move_buffers, whole
from launch.distributed.blocks import compile_blocks
from launch.distributed.buffers import copies, frozen_to_buffers, persistent_buffers, settle
from launch.distributed.host_group import HostGroup
from launch.monitoring.guard import Judged
from launch.optimizers.additions import EmaNesterov
from launch.optimizers.build import Groups, optimizer_groups
from launch.optimizers.table import entry_of
from launch.optimizers.third_party import ThirdParty
from models import ModelError, one_line
from models.initialization import Weights

Judge = Callable[[Tensor], Judged]  # gradient norm -> the verdict, on the device, whether the step may change the weights
MicroBatches = list[tuple[Tensor, Tensor]]  # input tokens and targets (B, T)
OF_STEP = (1 << 32) - 1  # replaces a micro-batch's number in the seed for the optimizer's step


class ShardedParameter(NamedTuple):
    """One parameter of the model as this rank holds it."""

    weight: Tensor  # the whole parameter or its flat local shard; the optimizer updates it, and keys its state by it
    local_shard: LocalShard  # the range of elements in `weight`
    ranges: list[tuple[int, int]] = []  # noqa: RUF012  (start, stop) of every rank of the shard's group; empty: whole everywhere


class Strategy:
    """A model and its optimizer, spread over processes.

    Attributes:
        model: the transformers model. If weights are sharded, its parameters are whole only during a forward pass.
        loss_model: the module that computes the loss, wrapped by the strategy.
        optimizer: updates `shards`.
        shards: every parameter by name, a tied weight once.
        unused: names of parameters that get no gradient from the loss; empty with one process.
        copies: the number of ranks that hold the same shard and each orthogonalize it.
        copies_group: the group of these ranks; None if there are no copies of shards.
        whole: whether a single rank can call its `model`.
        host: the group of all ranks that communicates through CPU memory.
        average: the average of the weights in `shards`, if `train.average` is set.
    """

    loss_model: nn.Module
    optimizer: torch.optim.Optimizer
    shards: dict[str, ShardedParameter]
    copies = 1
    copies_group: dist.ProcessGroup | None = None
    whole = True
    fills_gradients = False  # whether parameters without a gradient get zeros
    before_step: dict[str, Tensor]  # copies of the buffers before the step
    host: HostGroup
    average: Average | None = None

    def __init__(self, config: Config, accelerator: Accelerator, model: PreTrainedModel, weights: Weights) -> None:
        """`model` has no memory for its parameters yet. A subclass fills the part that this rank keeps from `weights`.

        Parameters are routed here, before sharding changes the classes of modules and the shapes of weights.
        """
        self.config, self.accelerator, self.model = config, accelerator, model
        self.world, self.device = accelerator.num_processes, accelerator.device
        move_buffers(model, self.device)
        frozen_to_buffers(model, lambda name, p: whole(p, weights, name, self.device))
        self.buffer_names = list(persistent_buffers(model))
        self.groups = optimizer_groups(config.optimizer, model)
        self.hidden = hidden_matrices(self.groups) if entry_of(config.optimizer).orthogonalizes else {}
        self.unused: set[str] = set()
        if not dist.is_initialized() and config.distributed.strategy != "ddp":  # sharding over one process needs a group too
            backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def __enter__(self) -> Strategy:
        return self

    def __exit__(self, *_: object) -> None:
        """End the training run. A subclass frees what a library keeps of it."""

    def compile(self) -> None:
        """Compile the blocks if `train.compile` is set. Call it after the pass that finds `unused` parameters."""
        if self.config.train.compile:
            compile_blocks(self.model, self.device)

    @property
    def matrices(self) -> int:
        """The number of hidden matrices that the optimizer orthogonalizes in a step, including experts without a token."""
        without = set() if self.fills_gradients else self.unused
        return sum(count for name, count in self.hidden.items() if name not in without or is_expert(name))

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers that a checkpoint holds, by name, whole on every rank. A forward pass may replace them."""
        return {name: self.model.get_buffer(name) for name in self.buffer_names}

    @property
    def counter(self) -> Any:
        """The optimizer of the hidden matrices. Its attribute `orthogonalized`, if it has one, counts orthogonalized matrices."""
        return getattr(self.optimizer, "optimizers", [self.optimizer])[0]

    @property
    def lookahead(self) -> EmaNesterov | None:
        """The lookahead of `optimizer.ema_nesterov`, which moves the weights before the gradient is computed; else None."""
        return getattr(self.optimizer, "lookahead", None)

    def look_ahead(self, progress: float) -> None:
        """Move the weights to the point where the gradient is taken. `progress`: the fraction of all steps that are done.

        `step` ends the lookahead.
        """
        if self.lookahead is not None and self.lookahead.enter(progress):
            self.weights_changed()

    def loss(self, inputs: Tensor, targets: Tensor, **options: bool) -> Tensor:
        """Return the sum of the cross-entropy (nats) over the targets of a micro-batch (B, T), which may be on any device.

        `options`: of `models.CausalLMLoss`. Raises ModelError if the model fails on this number of rows or tokens.
        """
        device = self.accelerator.device
        try:
            return self.loss_model(inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True), **options)
        except (ValueError, TypeError, IndexError) as error:  # some architectures accept only some lengths
            name, (rows, length) = type(self.model).__name__, inputs.shape
            raise ModelError(f"{name}: its forward pass fails on {rows} x {length} tokens: {one_line(error)}") from error

    def backward(self, micro_batches: MicroBatches, n_targets: int, seed_of: Callable[[int], int]) -> Tensor:
        """Accumulate the gradient of the mean loss over the `n_targets` targets of the global batch.

        Every rank sums the losses of its tokens and divides by the global count. Since gradients are averaged over the ranks,
        the loss is multiplied by their number. `seed_of(i)` is the random seed (dropout) of micro-batch i of the global batch.

        Returns:
            This rank's share of the loss.
        """
        self.before_step = copies(self.buffers)
        total = torch.zeros((), device=self.accelerator.device)
        before = self.accelerator.process_index * len(micro_batches)  # number of micro-batches of the ranks before this one
        for i, (inputs, targets) in enumerate(micro_batches):
            torch.manual_seed(seed_of(before + i))
            with self.micro_batch(last=i == len(micro_batches) - 1):
                loss = self.loss(inputs, targets) / n_targets
                self.differentiate(loss * self.world)
            total += loss.detach()
        if isinstance(self.counter, ThirdParty):  # its random numbers must be equal on all ranks and after a resume
            set_seed(seed_of(OF_STEP) % (1 << 32))
        return total

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Return the context of one forward and backward pass. `last`: whether it is the last of its step."""
        return nullcontext()

    def differentiate(self, loss: Tensor) -> None:
        """Compute the gradient of `loss`, and add it to the gradients of the parameters."""
        loss.backward()

    def step(self, judge: Judge) -> None:
        """Clip the gradient, ask `judge`, update unless it refuses, and clear the gradient. Make buffers equal on all ranks."""
        judged = self.update(judge)
        if self.lookahead is not None and self.lookahead.leave():
            self.weights_changed()
        settle(self.buffers, self.before_step, judged.found_inf > 0, self.world)
        if self.average is not None:
            self.average.update(judged.step, judged.found_inf)

    def update(self, judge: Judge) -> Judged:
        """Do the part of `step` that concerns weights and optimizer state. Each strategy implements it."""
        raise NotImplementedError

    def admit(self, judged: Judged) -> bool:
        """Return whether to step the optimizer.

        True for an optimizer that reads the verdict on the device itself. For any other, the host waits for the verdict.
        """
        optimizer: Any = self.optimizer
        if entry_of(self.config.optimizer).asks_device and all(group.get("fused", True) for group in optimizer.param_groups):
            optimizer.found_inf = judged.found_inf
            return True
        if isinstance(self.counter, ThirdParty):
            self.counter.loss = judged.loss
        return not judged.refused

    def weights_changed(self) -> None:
        """Update the model after something has written into the weights of `shards`."""

    def check(self) -> None:
        """Check the shards over all ranks, and store their ranges.

        Raises:
            ShardingError: on every rank, if no rank or two ranks hold an element.
        """
        groups = {shard.local_shard.group for shard in self.shards.values() if shard.local_shard.group is not None}
        for group in sorted(groups, key=dist.get_process_group_ranks):
            mine = {n: (s.local_shard.start, s.local_shard.stop) for n, s in self.shards.items() if s.local_shard.group is group}
            everyone = gather_objects(mine, group)
            if any(other.keys() != mine.keys() for other in everyone):
                raise ShardingError("the ranks do not hold shards of the same parameters")
            for name in mine:
                ranges = [other[name] for other in everyone]
                check_cover(self.shards[name].local_shard.shape, ranges, name)
                self.shards[name] = self.shards[name]._replace(ranges=ranges)


def is_expert(name: str) -> bool:
    """Return whether a parameter belongs to an expert of a mixture of experts. An expert without tokens gets no gradient."""
    return any("expert" in part.lower() for part in name.split("."))


def hidden_matrices(groups: Groups) -> dict[str, int]:
    """Return, by name, the number of matrices in each parameter with the role "hidden"."""
    return {
        name: matrix_count(stacked_shape(tuple(p.shape), group["matrices"]))
        for group in groups
        if group["role"] == "hidden"
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def sharded_parameters(groups: Groups, names: Iterable[str]) -> dict[str, ShardedParameter]:
    """Return the local shards in an optimizer's groups, in the order of the model's `names`."""
    found = {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}
    return {name: ShardedParameter(found[name], local_shard_of(found[name])) for name in names if name in found}
