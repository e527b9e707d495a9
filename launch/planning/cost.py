"""What a step costs on N GPUs: bytes that a rank sends, and seconds, from shapes and data sheets alone.

`--plan` prints it. "Sent" are the bytes that one rank sends in one optimizer step, with ring algorithms, averaged over the
ranks, without the padding that libraries add. Seconds assume that all communication overlaps with computing where it can. They
rest on the numbers of `Machine` and serve to choose a strategy; they are estimates.

Letters: N weights, of which H in hidden matrices (which Newton–Schulz orthogonalizes); W ranks; M micro-batches in a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from celo2.distributed.plan import balance
from celo2.layout import matrix_count, stacked_shape
from celo2.orthogonalize import newton_schulz_flops
from celo2.whitening import whitener_shapes, whitening_flops
from configs.schema import Config
from configs.schema import Optimizer as OptimizerConfig
from data.batches import fit_micro_batch
from launch.distributed.blocks import blocks_of
from launch.optimizers.build import Groups, normalizes_gradient, whitens
from launch.optimizers.table import OptimizerEntry, entry_of
from launch.planning.machines import Machine
from models.loss import uses_all_parameters

FP32, BF16 = 4, 2  # bytes

ASSUMED_STATE = 2  # numbers for each weight of an unknown optimizer: as many as AdamW's


@dataclass(frozen=True)
class Workload:
    """The properties of a model that determine its cost."""

    parameters: int  # N
    hidden: tuple[tuple[int, int], ...]  # (R, C) of every hidden matrix, in the order of the parameters
    block_parameters: int  # of all transformer blocks together
    blocks: int
    context: int  # tokens of a sequence
    flops_per_token: float  # forward and backward
    activations: float  # elements that the forward pass of one sequence keeps
    loss: float  # float32 elements that the loss holds
    recompute: float = 0.0  # gradient checkpointing: the part of the forward pass that is done twice
    largest: int = 0  # weights of the largest parameter
    known: bool = True  # a GPT-3 of models/: no pass at the start has to find its kind of loss, and what gets a gradient

    @property
    def hidden_parameters(self) -> int:
        """H."""
        return sum(rows * cols for rows, cols in self.hidden)

    @property
    def outside(self) -> int:
        """Weights outside the blocks: embeddings, the last norm, the output projection."""
        return self.parameters - self.block_parameters


@dataclass(frozen=True)
class Setup:
    """The strategy and the optimizer; names as in the configuration."""

    strategy: str = "ddp"
    world: int = 8  # W
    accumulation: int = 1  # M
    micro_batch: int = 1  # sequences
    optimizer: str = "celo2"
    bf16: bool = True
    shard_state: bool = False
    replicas: int = 1  # fsdp2
    state_bf16: bool = False  # for optimizers that take a rule
    normalize_gradient: bool = False  # as the rule says
    offload: bool = False  # fsdp2
    average: bool = False  # train.average
    cautious: bool = False  # optimizer.cautious_weight_decay
    lookahead: bool = False  # optimizer.ema_nesterov
    layers: bool = False  # log.layers
    orthogonalize: bool = True  # false: optimizer.arguments turns it off
    whitens: bool = False  # as the rule says
    cpu: bool = False  # on a CPU: Newton–Schulz is in float32

    @property
    def entry(self) -> OptimizerEntry:
        """What the optimizer can do."""
        arguments = None if self.orthogonalize else {"orthogonalize": False}
        return entry_of(OptimizerConfig(name=self.optimizer, arguments=arguments))

    @property
    def state_per_weight(self) -> int:
        """Numbers of optimizer state for each weight that the optimizer updates."""
        return ASSUMED_STATE if self.entry.state_per_weight is None else self.entry.state_per_weight

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the optimizer state, and under zero3 and fsdp2 of the weights."""
        return self.world // self.replicas if self.strategy == "fsdp2" else self.world

    @property
    def state_bytes(self) -> int:
        """Bytes of each of the rule's four numbers for a weight of a matrix."""
        return BF16 if self.state_bf16 else FP32

    @property
    def direction_bytes(self) -> int:
        """Bytes of an element of a direction: bfloat16 where GPUs orthogonalize it; Muon's is bfloat16 everywhere."""
        return BF16 if self.entry.orthogonalizes and not (self.cpu and self.entry.takes_rule) else FP32


def setup_of(config: Config, world: int) -> Setup:
    """The setup of `config` on `world` ranks."""
    micro = fit_micro_batch(config.train.batch_size, world, config.train.micro_batch_size)
    return Setup(
        config.distributed.strategy,
        world,
        config.train.batch_size // (world * micro),
        micro,
        config.optimizer.name,
        config.train.precision == "bf16",
        config.distributed.shard_state,
        config.distributed.replicas,
        config.optimizer.state_dtype == "bf16",
        normalizes_gradient(config.optimizer),
        config.distributed.offload,
        config.train.average is not None,
        config.optimizer.cautious_weight_decay,
        bool(config.optimizer.ema_nesterov),
        bool(config.log.layers),
        (config.optimizer.arguments or {}).get("orthogonalize") is not False,
        whitens(config.optimizer),
    )


def all_reduce(size: float, world: int) -> float:
    """Bytes that a rank sends in an all-reduce of `size` bytes, which is a reduce-scatter and an all-gather."""
    return 2 * size * (world - 1) / world


def all_but_own_share(size: float, world: int) -> float:
    """Bytes that a rank sends, on average, in each of the other collectives over `size` bytes.

    Reduce-scatter: each rank has `size` bytes, and gets its share of the sum over the ranks. All-gather: each rank holds a share
    of `size` bytes, and gets all of them. Broadcast: all ranks but one receive `size` bytes. All-to-all: a rank has `size` bytes
    for all ranks, and keeps its own share of them.
    """
    return size * (world - 1) / world


reduce_scatter = all_gather = broadcast = all_to_all = all_but_own_share


def split_matrices(workload: Workload, setup: Setup) -> list[tuple[int, int]]:
    """Hidden matrices that no rank holds whole.

    fsdp2 and zero3 divide every parameter. zero1 and zero2 divide the parameters, one after the other, into W equal ranges, so
    that a matrix is split only if a range ends in it.
    """
    if setup.strategy == "ddp" or setup.shards == 1:
        return []
    if setup.strategy in ("zero3", "fsdp2"):
        return list(workload.hidden)
    length = math.ceil(workload.hidden_parameters / setup.world)
    split, start = [], 0
    for rows, cols in workload.hidden:
        stop = start + rows * cols
        if start // length != (stop - 1) // length:
            split.append((rows, cols))
        start = stop
    return split


def whitener_bytes(matrices: Sequence[tuple[int, int]], setup: Setup) -> int:
    """Bytes of the whiteners of these matrices."""
    if not (setup.whitens and setup.entry.orthogonalizes):
        return 0
    return FP32 * sum(math.prod(shape) for matrix in matrices for shape in whitener_shapes(matrix).values())


def sent_bytes(workload: Workload, setup: Setup) -> dict[str, float]:
    """Bytes that a rank sends in one optimizer step, by purpose, averaged over the ranks."""
    world, shards, micro = setup.world, setup.shards, setup.accumulation
    sent = {"gradients": 0.0, "weights": 0.0, "directions": 0.0, "whiteners": 0.0, "sums": 0.0, "agreement": 0.0}
    if world == 1:
        return sent
    n, outside, block = workload.parameters, workload.outside, workload.block_parameters
    if setup.strategy == "ddp":
        sent["gradients"] = all_reduce(FP32 * n, world)
        if setup.entry.takes_rule:
            sent["directions"] = broadcast(setup.direction_bytes * workload.hidden_parameters, world)
        if setup.shard_state:
            sent["weights"] = broadcast(FP32 * (n - workload.hidden_parameters), world)
        else:
            sent["whiteners"] = all_reduce(whitener_bytes(workload.hidden, setup), world)
    elif setup.strategy in ("zero1", "zero2"):
        # DeepSpeed 0.19 fills buckets that several ranks own and all-reduces them (its use_multi_rank_bucket_allreduce).
        sent["gradients"] = all_reduce(FP32 * n, world) * (1 if setup.strategy == "zero1" else micro)
        sent["weights"] = all_gather(FP32 * n, world)
    elif setup.strategy == "zero3":
        sent["gradients"] = micro * reduce_scatter(FP32 * n, world)
        sent["weights"] = 2 * micro * all_gather(FP32 * n, world)
    else:  # fsdp2 keeps what is outside the blocks gathered from the forward to the backward pass
        travelling = (BF16 if setup.bf16 else FP32) * block
        sent["gradients"] = micro * (reduce_scatter(FP32 * n, shards) + all_reduce(FP32 * n / shards, setup.replicas))
        sent["weights"] = micro * (2 * all_gather(travelling, shards) + all_gather(FP32 * outside, shards))

    split = split_matrices(workload, setup)
    if setup.entry.orthogonalizes:
        held = setup.direction_bytes * sum(rows * cols for rows, cols in split) / shards
        sent["directions"] += 2 * all_to_all(held, shards)  # to the owner and back
        sent["whiteners"] += all_reduce(whitener_bytes(split, setup), shards)
    if setup.entry.takes_rule:
        # Rows, columns and 12 channels; 6 channels; the norm of the direction, and of the gradient where the rule asks for it.
        numbers = 12 + 6 + 1 + setup.normalize_gradient
        sent["sums"] = all_reduce(FP32 * sum(rows + cols + numbers for rows, cols in split), shards)
    sent["agreement"] = all_reduce(5 * 8, world)  # float64: what `launch.monitoring.guard.Guard.judge` sends
    return sent


def optimizer_seconds(workload: Workload, setup: Setup, machine: Machine) -> float:
    """Seconds of the update on the busiest rank: Newton–Schulz on its matrices, and passes over memory."""
    entry = setup.entry
    owners = setup.shards if setup.strategy != "ddp" or entry.takes_rule else 1
    seconds = 0.0
    if entry.orthogonalizes:
        loads = [0.0] * owners
        balance([newton_schulz_flops(rows, cols) for rows, cols in workload.hidden], loads)
        peak = machine.peak(setup.direction_bytes == BF16)
        seconds += max(loads) / (peak * machine.newton_schulz_efficiency)
        if setup.whitens:
            loads = [0.0] * owners
            balance([whitening_flops(rows, cols) for rows, cols in workload.hidden], loads)
            seconds += max(loads) / (machine.peak(False) * machine.newton_schulz_efficiency)
    # Bytes moved for a weight. AdamW reads w, g, m, v and writes w, m, v. The rule makes four passes: reads g, w, three m and v,
    # writes three m and v; reads g and three m; reads g, w, three m and v, writes a direction; reads that and w, writes w.
    adamw, muon = 7 * FP32, 6 * FP32 + 2 * setup.direction_bytes
    accumulate, direct = 2 * FP32 + 8 * setup.state_bytes, 3 * FP32 + 7 * setup.state_bytes + setup.direction_bytes
    if setup.normalize_gradient:  # reads g once more, for its norm
        accumulate += FP32
    apply = 2 * FP32 + setup.direction_bytes
    hidden, others = workload.hidden_parameters, workload.parameters - workload.hidden_parameters
    own = 1 / setup.shards  # share of the weights whose state is here, or whose direction is computed here
    kept = own if setup.shard_state or setup.strategy != "ddp" else 1
    held = 1 if setup.strategy == "ddp" else own  # share of the weights that are updated here
    if entry.takes_rule:
        moved = hidden * (kept * accumulate + own * direct + held * apply)
    else:
        moved = hidden * kept * (muon if entry.orthogonalizes else adamw)
    moved += others * kept * adamw
    if setup.offload:  # the ranks of a node share its memory
        return seconds + moved * min(setup.world, machine.gpus_per_node) / machine.host_bandwidth
    return seconds + moved / machine.memory_bandwidth


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float  # forward and backward
    hidden: float  # communication that overlaps with computing
    exposed: float  # communication that computing waits for
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.exposed + self.optimizer


def step_time(workload: Workload, setup: Setup, machine: Machine) -> StepTime:
    """Seconds of one optimizer step.

    Gradients are sent during the backward pass (two thirds of computing; under DDP and zero1 that of the last micro-batch alone),
    and weights of zero3 and fsdp2 during all of computing. The step waits for what takes longer, and for everything else.
    """
    tokens = setup.accumulation * setup.micro_batch * workload.context
    flops = tokens * workload.flops_per_token * (1 + workload.recompute / 3)
    compute = flops / (machine.peak(setup.bf16) * machine.efficiency)
    sent, ring = sent_bytes(workload, setup), machine.ring(setup.world)
    hop = machine.latency * math.log2(setup.world) if setup.world > 1 else 0.0
    once = setup.strategy in ("ddp", "zero1")  # gradients are sent once a step
    streamed = setup.strategy in ("zero3", "fsdp2")
    collectives = workload.blocks * (1 if once else setup.accumulation) * (3 if streamed else 1)
    overlappable = sent["gradients"] / ring + collectives * hop
    hops = 6 + setup.normalize_gradient + setup.whitens  # three sums or four, whiteners, two all-to-alls, one agreement
    waited = (sent["sums"] + sent["whiteners"] + sent["agreement"]) / ring + hops * hop
    waited += sent["directions"] / (ring if setup.strategy == "ddp" else machine.all_to_all(setup.shards))
    if streamed:
        overlappable += sent["weights"] / ring
    else:
        waited += sent["weights"] / ring
    window = compute if streamed else compute * 2 / 3 / (setup.accumulation if once else 1)
    if setup.offload:  # weights to the GPU for both passes, gradients back
        overlappable += setup.accumulation * 3 * FP32 * workload.parameters / setup.shards / machine.host_link
    exposed = max(0.0, overlappable - window)
    return StepTime(compute, overlappable - exposed, exposed + waited, optimizer_seconds(workload, setup, machine))


def workload_of(
    model: PreTrainedModel,
    groups: Groups,
    context: int,
    flops_per_token: float,
    activations: float,
    loss: float,
    recompute: float,
) -> Workload:
    """The workload of `model`, which may be on the meta device, with the groups of `optimizer_groups`."""
    hidden: list[tuple[int, int]] = []
    for group in groups:
        for p in group["params"] if group["role"] == "hidden" else ():
            shape = stacked_shape(p.shape, group["matrices"])
            if len(shape) >= 2:
                hidden += [(shape[-2], shape[-1])] * matrix_count(shape)
    blocks = blocks_of(model)
    return Workload(
        parameters=sum(p.numel() for p in model.parameters()),
        hidden=tuple(hidden),
        largest=max(p.numel() for p in model.parameters()),
        block_parameters=sum(p.numel() for block in blocks for p in block.parameters()),
        blocks=len(blocks),
        context=context,
        flops_per_token=flops_per_token,
        activations=activations,
        loss=loss,
        recompute=recompute,
        known=uses_all_parameters(model),
    )
