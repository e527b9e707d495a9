"""What every strategy does for the training loop, and how it says what of each parameter is on this rank."""

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

Judge = Callable[[Tensor], Judged]  # gradient norm -> whether the step may reach the weights, which the device knows
MicroBatches = list[tuple[Tensor, Tensor]]  # input tokens and targets (B, T)
OF_STEP = (1 << 32) - 1  # in place of a micro-batch's number: the random numbers of the optimizer's step


class ShardedParameter(NamedTuple):
    """One parameter of the model as this rank holds it."""

    weight: Tensor  # what the optimizer updates, and keys its state by: the whole parameter, or the flat local shard
    local_shard: LocalShard  # which elements those are
    ranges: list[tuple[int, int]] = []  # noqa: RUF012  (start, stop) of every rank of the shard's group; empty: whole everywhere


class Strategy:
    """A model, its optimizer, and the processes they are spread over.

    Attributes:
        model: the transformers model. Under sharding its parameters are whole only while a forward pass runs.
        loss_model: the module that computes the loss, as the strategy has wrapped it.
        optimizer: updates `shards`.
        shards: every parameter by name, a tied weight once.
        unused: names of parameters that get no gradient from the loss; looked for over several processes.
        copies: how many ranks hold the same shard and orthogonalize it each for itself.
        copies_group: these ranks; None where there are no copies of shards.
        whole: whether one rank alone can call its `model`.
        host: all ranks, through CPU memory.
        average: of the weights in `shards`, where `train.average` asks for one.
    """

    loss_model: nn.Module
    optimizer: torch.optim.Optimizer
    shards: dict[str, ShardedParameter]
    copies = 1
    copies_group: dist.ProcessGroup | None = None
    whole = True
    fills_gradients = False  # with zeros, where a parameter gets none
    before_step: dict[str, Tensor]  # the buffers
    host: HostGroup
    average: Average | None = None

    def __init__(self, config: Config, accelerator: Accelerator, model: PreTrainedModel, weights: Weights) -> None:
        """`model` has no memory for its parameters yet: a subclass gives it what this rank keeps, from `weights`.

        Parameters are routed here, before anything is sharded, while modules have their own classes and weights their shapes.
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
        """The training run ends, and with it what a library keeps of it."""

    def compile(self) -> None:
        """Compile the blocks, if the configuration says so. To be called after `unused` is found, which is no step."""
        if self.config.train.compile:
            compile_blocks(self.model, self.device)

    @property
    def matrices(self) -> int:
        """How many hidden matrices of the model its optimizer orthogonalizes in a step, experts without a token included."""
        without = set() if self.fills_gradients else self.unused
        return sum(count for name, count in self.hidden.items() if name not in without or is_expert(name))

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers that a checkpoint holds, by name, whole on every rank. A forward pass may replace them."""
        return {name: self.model.get_buffer(name) for name in self.buffer_names}

    @property
    def counter(self) -> Any:
        """The optimizer of the hidden matrices, which may count those that it has orthogonalized as `orthogonalized`."""
        return getattr(self.optimizer, "optimizers", [self.optimizer])[0]

    @property
    def lookahead(self) -> EmaNesterov | None:
        """What moves the weights ahead for the gradient, with `optimizer.ema_nesterov`."""
        return getattr(self.optimizer, "lookahead", None)

    def look_ahead(self, progress: float) -> None:
        """Move the weights to where the gradient is to be taken, after a fraction `progress` of all steps; `step` ends it."""
        if self.lookahead is not None and self.lookahead.enter(progress):
            self.weights_changed()

    def loss(self, inputs: Tensor, targets: Tensor, **options: bool) -> Tensor:
        """Sum of the cross-entropy (nats) over the targets of a micro-batch (B, T), both on any device. `options`: of
        `models.CausalLMLoss`."""
        device = self.accelerator.device
        try:
            return self.loss_model(inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True), **options)
        except (ValueError, TypeError, IndexError) as error:  # some architectures accept only some lengths
            name, (rows, length) = type(self.model).__name__, inputs.shape
            raise ModelError(f"{name}: its forward pass fails on {rows} x {length} tokens: {one_line(error)}") from error

    def backward(self, micro_batches: MicroBatches, n_targets: int, seed_of: Callable[[int], int]) -> Tensor:
        """Accumulate the gradient of the mean loss over the `n_targets` of the global batch.

        Every rank sums the losses of its tokens and divides by the global count; gradients are averaged over the ranks, hence
        the factor. `seed_of` says with which seed the i-th micro-batch of the global batch draws random numbers (dropout).

        Returns:
            This rank's share of the loss.
        """
        self.before_step = copies(self.buffers)
        total = torch.zeros((), device=self.accelerator.device)
        before = self.accelerator.process_index * len(micro_batches)  # those of the ranks before this one
        for i, (inputs, targets) in enumerate(micro_batches):
            torch.manual_seed(seed_of(before + i))
            with self.micro_batch(last=i == len(micro_batches) - 1):
                loss = self.loss(inputs, targets) / n_targets
                self.differentiate(loss * self.world)
            total += loss.detach()
        if isinstance(self.counter, ThirdParty):  # it may draw random numbers: the same on every rank, and after every start
            set_seed(seed_of(OF_STEP) % (1 << 32))
        return total

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """The context of one forward and backward pass; `last` of its step."""
        return nullcontext()

    def differentiate(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        loss.backward()

    def step(self, judge: Judge) -> None:
        """Clip the gradient, ask `judge`, update if it agrees, and forget the gradient. Buffers become equal on all ranks."""
        judged = self.update(judge)
        if self.lookahead is not None and self.lookahead.leave():
            self.weights_changed()
        settle(self.buffers, self.before_step, judged.found_inf > 0, self.world)
        if self.average is not None:
            self.average.update(judged.step, judged.found_inf)

    def update(self, judge: Judge) -> Judged:
        """What `step` does to weights and optimizer state."""
        raise NotImplementedError

    def admit(self, judged: Judged) -> bool:
        """Whether to step the optimizer. One that asks the device itself is stepped always; for another the host waits."""
        optimizer: Any = self.optimizer
        if entry_of(self.config.optimizer).asks_device and all(group.get("fused", True) for group in optimizer.param_groups):
            optimizer.found_inf = judged.found_inf
            return True
        if isinstance(self.counter, ThirdParty):
            self.counter.loss = judged.loss
        return not judged.refused

    def weights_changed(self) -> None:
        """Bring the model in line with the weights of `shards`, after something has written into them."""

    def check(self) -> None:
        """Compare the shards over all ranks, and remember their ranges.

        Raises:
            ShardingError: on every rank alike, for an element that no rank or two ranks hold.
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
    """Whether a parameter belongs to an expert of a mixture, which gets no gradient where no token is given to it."""
    return any("expert" in part.lower() for part in name.split("."))


def hidden_matrices(groups: Groups) -> dict[str, int]:
    """How many matrices each parameter with the role "hidden" stands for, by its name."""
    return {
        name: matrix_count(stacked_shape(tuple(p.shape), group["matrices"]))
        for group in groups
        if group["role"] == "hidden"
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def sharded_parameters(groups: Groups, names: Iterable[str]) -> dict[str, ShardedParameter]:
    """The local shards in an optimizer's groups, in the order of the model's `names`."""
    found = {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}
    return {name: ShardedParameter(found[name], local_shard_of(found[name])) for name in names if name in found}
