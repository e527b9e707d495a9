"""Memory of a rank while a run starts, makes a step and saves: bytes on its device and in its host's memory, by purpose.

At the start, a rank makes its own shards block by block. In a save, it copies its own shards to host memory, and writes the copy
tensor by tensor while training continues. A GPU has a memory of its own. On a CPU the two memories are one: their sum counts.

Letters: N weights, of which H in hidden matrices; W ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from celo2.step import BATCH_ELEMENTS as ON_DEVICE
from celo2.step import DEFAULT_BATCH_ELEMENTS
from launch.distributed.birth import PIECE
from launch.distributed.zero import BUCKET
from launch.planning.cost import BF16, FP32, Setup, Workload, split_matrices, whitener_bytes
from launch.run.diagnostics import DIRECTIONS

BATCH_ELEMENTS, CPU_BATCH_ELEMENTS = DEFAULT_BATCH_ELEMENTS, ON_DEVICE["cpu"]  # that Newton–Schulz takes at once
IMPORTS = 0.5e9  # bytes of host memory of a process that has imported everything: measured 0.45 to 0.48 GB on a CPU
LATE_IMPORTS = 0.05e9  # what DeepSpeed loads only when it divides a model: measured 0.04 to 0.05 GB
MAX_LIVE = 1_000_000_000  # weights that zero3 keeps gathered if they are used again soon (stage3_max_live_parameters)
SYNCHRONIZED = 250 << 20  # bytes of weights that DistributedDataParallel sends at once when it starts; two are in flight
PHASES = ("start", "step", "save")
OFFLOADED = ("weights", "gradients", "optimizer state")  # what `distributed.offload` keeps in host memory
Bytes = dict[str, float]


@dataclass(frozen=True)
class Phase:
    """What one rank holds at the peak of a phase."""

    device: Bytes
    host: Bytes

    @property
    def on_device(self) -> float:
        """Bytes in all."""
        return sum(self.device.values())

    @property
    def on_host(self) -> float:
        """Bytes in all."""
        return sum(self.host.values())


def phases(workload: Workload, setup: Setup) -> dict[str, Phase]:
    """The three phases of a run. Training continues during a save: the device then holds what it holds in a step."""
    step = memory_per_rank(workload, setup)
    making = {"imports": IMPORTS, "weights on their way": weights_on_their_way(workload)}
    if setup.strategy == "zero3":  # DeepSpeed makes its vector on the host
        making["flat copies"] = FP32 * workload.parameters / setup.shards
    found = {
        "start": Phase(start_memory(workload, setup), making),
        "step": Phase(step, {"imports": IMPORTS}),
        "save": Phase(step, {"imports": IMPORTS, **save_memory(workload, setup)}),
    }
    return {name: offloaded(phase) for name, phase in found.items()} if setup.offload else found


def offloaded(phase: Phase) -> Phase:
    """`phase`, with weights, gradients and optimizer state moved to host memory."""
    moved = {name: count for name, count in phase.device.items() if name in OFFLOADED}
    return Phase({name: count for name, count in phase.device.items() if name not in moved}, phase.host | moved)


def peaks(workload: Workload, setup: Setup) -> tuple[float, float]:
    """The most bytes of a rank on its device, and in its host's memory, over the whole run."""
    found = phases(workload, setup).values()
    return max(phase.on_device for phase in found), max(phase.on_host for phase in found)


def divided_by(setup: Setup) -> tuple[int, int]:
    """Over how many ranks the weights are divided, and over how many the optimizer state."""
    weights = setup.shards if setup.strategy in ("zero3", "fsdp2") else 1
    if setup.strategy == "ddp":
        return weights, setup.world if setup.shard_state else 1
    return weights, setup.shards


def updated_over(setup: Setup) -> int:
    """Over how many ranks those weights are divided that the optimizer updates."""
    return 1 if setup.strategy == "ddp" else setup.shards


def copied(workload: Workload, setup: Setup, updating: bool) -> Bytes:
    """Copies of the weights that a rank updates, and the whole matrices that `log.layers` gathers. `log.layers` and EMA-Nesterov
    copy the weights before the forward pass, cautious weight decay for the update alone."""
    taken = {
        "for log.layers": setup.layers,
        "for EMA-Nesterov": setup.lookahead,
        "for cautious decay": setup.cautious and updating,
    }
    copies = {f"weights {name}": FP32 * workload.parameters / updated_over(setup) for name, asked in taken.items() if asked}
    if setup.layers and updating and setup.entry.takes_rule and setup.entry.orthogonalizes and workload.hidden:
        last = len(workload.hidden) - 1
        looked_at = {i * last // (DIRECTIONS - 1) for i in range(DIRECTIONS)}
        size = sum(rows * cols for rows, cols in map(workload.hidden.__getitem__, looked_at))
        copies["matrices for log.layers"] = FP32 * (2 + setup.state_per_weight) * size  # weight, gradient, state
    return copies


def held(workload: Workload, setup: Setup) -> Bytes:
    """What a rank holds on its device from the start to the end."""
    n = workload.parameters
    over, state_over = divided_by(setup)
    means = sum(3 * (rows + cols) for rows, cols in workload.hidden) if setup.entry.takes_rule else 0  # three decays
    memory = {
        "weights": FP32 * n / over,
        "optimizer state": state_bytes(workload, setup) / state_over,
        # Every rank that holds a part of a matrix has all of these.
        "row and column means": FP32 * means / (state_over if over == 1 else 1),
        # DeepSpeed's vector that the optimizer updates, beside the model's own weights. Under zero3 the two are one.
        "flat copies": FP32 * n / setup.shards if setup.strategy in ("zero1", "zero2") else 0.0,
    }
    if setup.whitens:
        memory["whiteners"] = whitener_bytes(workload.hidden, setup) / (state_over if setup.shard_state else 1)
    averages = {"average of the weights": setup.average, "average of the changes": setup.lookahead}
    return memory | {name: FP32 * n / updated_over(setup) for name, asked in averages.items() if asked}


def gradients_kept(workload: Workload, setup: Setup) -> float:
    """Bytes of gradients that stay between steps: the buckets of ddp, the vector of zero3."""
    if setup.strategy == "zero3":
        return FP32 * workload.parameters / setup.shards
    return FP32 * workload.parameters if setup.strategy == "ddp" and setup.world > 1 else 0.0


def start_memory(workload: Workload, setup: Setup, cpu: bool = False) -> Bytes:
    """The peak on the device before the first step.

    If it is not known which parameters get no gradient, several ranks compute the gradients of a few tokens to find out, and free
    them before they make the state. zero1 and zero2 allocate all weights twice, and fill one copy. On a CPU (`cpu`), memory
    counts once it is written: neither the other copy nor the buckets of ddp are. Only Celo2 makes its state before the first step
    of a new run.
    """
    n, (over, _) = workload.parameters, divided_by(setup)
    stays = held(workload, setup) | {"gradients": gradients_kept(workload, setup)}
    making = {"weights": FP32 * n / over}
    if setup.strategy == "ddp" and setup.world > 1:
        making["buckets"] = min(2 * SYNCHRONIZED, FP32 * n)
    if setup.strategy in ("zero1", "zero2"):
        making["flat copies"] = FP32 * n / setup.shards + (0.0 if cpu else FP32 * n)
        making["gradients"] = FP32 * n / setup.shards  # zeros, which DeepSpeed makes so that an optimizer allocates its state
    elif setup.world > 1 and not workload.known:
        if setup.strategy == "ddp":
            making["gradients"] = FP32 * n
        elif setup.strategy == "fsdp2":
            making["gathered (estimate)"] = gathered_by_blocks(workload, setup)
    if setup.strategy == "zero3" and not cpu:
        stays["buckets"] = FP32 * BUCKET
    if cpu and setup.strategy == "ddp":
        stays["gradients"] = 0.0
    if cpu and not setup.entry.takes_rule:
        stays |= {"optimizer state": 0.0, "average of the changes": 0.0}
    return max(making, stays, key=lambda bytes_by_purpose: sum(bytes_by_purpose.values()))


def weights_on_their_way(workload: Workload) -> float:
    """Host memory while weights are made or read: a piece and its copy; or, if more, a block and what is outside the blocks of a
    model whose loss is first compared with its own logits."""
    compared = 0.0 if workload.known else workload.outside + workload.block_parameters / max(workload.blocks, 1)
    return FP32 * max(2 * PIECE, compared)


def save_memory(workload: Workload, setup: Setup) -> Bytes:
    """Host memory of a save: a copy of what the rank owns, and one whole tensor that it gathers."""
    total = FP32 * workload.parameters * (1 + setup.average + setup.lookahead) + state_bytes(workload, setup)
    total += whitener_bytes(workload.hidden, setup)
    largest = max((FP32 * rows * cols for rows, cols in workload.hidden), default=0.0)
    tensor = 3 * largest if setup.entry.takes_rule else largest  # the momenta of a matrix with three decays
    return {"copy of its shards": total / setup.shards, "a tensor": max(tensor, FP32 * workload.largest)}


def peaks_on_cpu(workload: Workload, setup: Setup) -> dict[str, float]:
    """The peak of a rank in each phase on a CPU, beyond its imports; in a save, without a step at the same time.

    `python -m launch.benchmark memory` measures the same.
    """
    late = {"late imports": LATE_IMPORTS if setup.strategy.startswith("zero") else 0.0}
    passes = passes_memory(workload, setup, cpu=True)
    kept = held(workload, setup) | {"gradients": gradients_kept(workload, setup), "buckets": passes["buckets"]}
    if setup.shards > 1:  # what an evaluation leaves gathered until the next step ends
        kept["gathered (estimate)"] = FP32 * workload.outside if setup.strategy == "fsdp2" else passes["gathered (estimate)"]
    found = {
        "start": start_memory(workload, setup, cpu=True) | {"on their way": weights_on_their_way(workload)},
        "step": memory_per_rank(workload, setup, cpu=True),
        "save": kept | save_memory(workload, setup),
    }
    return {phase: sum((bytes_by_purpose | late).values()) for phase, bytes_by_purpose in found.items()}


def memory_per_rank(workload: Workload, setup: Setup, cpu: bool = False) -> Bytes:
    """Bytes on the device of a rank at the peak of a step: of its passes, or of its update, whichever holds more.

    `cpu`: pages of a buffer that are never written do not count there, and Newton–Schulz takes smaller batches.
    """
    moments = passes_memory(workload, setup, cpu), update_memory(workload, setup, cpu)
    return max(moments, key=lambda bytes_by_purpose: sum(bytes_by_purpose.values()))


def passes_memory(workload: Workload, setup: Setup, cpu: bool = False) -> Bytes:
    """Bytes in forward and backward pass; activations and what is gathered are estimates.

    Gradients that do not stay between steps grow while activations are freed; at the end, the largest one is held beside all
    others. With a second micro-batch they are held beside all of its activations. DDP adds up the gradients of several
    micro-batches outside of the buckets in which it sends them.
    """
    n, (over, _) = workload.parameters, divided_by(setup)
    memory = held(workload, setup) | copied(workload, setup, updating=False)
    memory |= {
        "gradients": FP32 * n / (setup.shards if setup.strategy == "zero2" else over),
        "buckets": 0.0,
        "gathered (estimate)": 0.0,
        "bf16 copies": BF16 * n if setup.bf16 and over == 1 else 0.0,  # autocast keeps them through a pass
        "activations (estimate)": setup.micro_batch * workload.activations * (BF16 if setup.bf16 else FP32),
        "loss (estimate)": FP32 * workload.loss,
    }
    going = memory["activations (estimate)"] + memory["loss (estimate)"]
    tied = workload.outside < 2 * workload.largest  # the embedding gets two gradients, which are added up
    on_its_way = FP32 * workload.largest * (2 if tied else 1) if setup.strategy == "ddp" else 0.0
    apart = setup.offload and not cpu  # gradients are in another memory than activations
    if setup.accumulation == 1 and not apart and not gradients_kept(workload, setup):
        memory["gradients"] = max(0.0, memory["gradients"] + on_its_way - going)
    else:
        memory["a gradient on its way"] = max(0.0, on_its_way - going)
    if setup.strategy == "ddp" and setup.world > 1 and setup.accumulation > 1:
        memory["gradients that have not travelled"] = FP32 * n
    if setup.strategy.startswith("zero"):
        memory["buckets"] = FP32 * (min(n, BUCKET) if cpu else BUCKET)
    if setup.strategy == "zero3" and setup.shards > 1:  # DeepSpeed keeps this many from the forward to the backward pass
        memory["gathered (estimate)"] = FP32 * min(n, MAX_LIVE)
    elif setup.strategy == "fsdp2":
        memory["gathered (estimate)"] = gathered_by_blocks(workload, setup)
    return memory


def gathered_by_blocks(workload: Workload, setup: Setup) -> float:
    """Bytes that fsdp2 gathers at once: this block and the next, the gradient of one, and what is outside the blocks."""
    block = workload.block_parameters / max(workload.blocks, 1)
    return (2 * (BF16 if setup.bf16 else FP32) + FP32) * block + 2 * FP32 * workload.outside


def update_memory(workload: Workload, setup: Setup, cpu: bool = False) -> Bytes:
    """Bytes in the update. DeepSpeed copies its gradients once more, and under zero1 and zero2 gathers the new weights."""
    n, (over, _) = workload.parameters, divided_by(setup)
    zero = setup.strategy.startswith("zero")
    memory = held(workload, setup) | copied(workload, setup, updating=True)
    return memory | {
        "gradients": FP32 * n * (2 if zero else 1) / (setup.shards if zero else over),
        "buckets": FP32 * BUCKET if zero and not cpu else 0.0,
        "directions": directions_held(workload, setup, CPU_BATCH_ELEMENTS if cpu else BATCH_ELEMENTS),
    }


def state_bytes(workload: Workload, setup: Setup) -> float:
    """Bytes of optimizer state beside row and column means. The other parameters have AdamW's two numbers for each weight."""
    of_hidden = setup.state_per_weight * (setup.state_bytes if setup.entry.takes_rule else FP32)
    of_others = FP32 * (setup.state_per_weight if setup.entry.all_hidden else 2)
    return of_hidden * workload.hidden_parameters + of_others * (workload.parameters - workload.hidden_parameters)


def directions_held(workload: Workload, setup: Setup, batch_elements: int = BATCH_ELEMENTS) -> float:
    """Bytes of directions in memory at once.

    Newton–Schulz takes a batch of matrices of one shape (`batch_elements`, or one matrix). It holds the batch three times, and
    two products of the shorter side. Replicas also keep the results of the matrices that they own. Under sharding, a rank holds
    its share of all directions, what it received from the others, and the matrices that it owns; later it holds the results that
    it sends back, and its share again.
    """
    if not setup.entry.orthogonalizes or not workload.hidden:
        return 0.0
    split = sum(rows * cols for rows, cols in split_matrices(workload, setup))
    counts = Counter(workload.hidden)
    owners = setup.shards if split or (setup.strategy == "ddp" and setup.entry.takes_rule) else 1
    batch = max(
        min(-(-count // owners), max(1, batch_elements // (rows * cols))) * (3 * rows * cols + 2 * min(rows, cols) ** 2)
        for (rows, cols), count in counts.items()
    )
    if setup.strategy == "ddp":
        results = workload.hidden_parameters / setup.world if setup.world > 1 and setup.entry.takes_rule else 0.0
        return setup.direction_bytes * (results + batch)
    largest = max(rows * cols for rows, cols in workload.hidden) if split else 0
    share, owned = split / setup.shards, max(split / setup.shards, largest)
    return setup.direction_bytes * max(share + 2 * owned + batch, 2 * (share + owned))
