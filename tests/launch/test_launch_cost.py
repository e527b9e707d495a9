"""The cost model against numbers worked out by hand, on a toy model and on GPT-3's shapes."""

from dataclasses import replace

import pytest
from torch import nn

from celo2.orthogonalize import newton_schulz_flops
from launch.distributed.birth import PIECE
from launch.planning.cost import (
    Machine,
    Setup,
    StepTime,
    Workload,
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    optimizer_seconds,
    reduce_scatter,
    sent_bytes,
    split_matrices,
    step_time,
    workload_of,
)
from launch.planning.memory import (
    directions_held,
    held,
    memory_per_rank,
    passes_memory,
    peaks,
    peaks_on_cpu,
    phases,
    save_memory,
    state_bytes,
    update_memory,
)
from launch.planning.table import cost_lines

# Four matrices 10 x 20 (800 weights), 50 more in two blocks, and 150 outside them: N = 1000.
TOY = Workload(
    parameters=1000,
    hidden=((10, 20),) * 4,
    block_parameters=850,
    blocks=2,
    context=8,
    flops_per_token=6000.0,
    activations=500.0,
    loss=30.0,
)
JUDGED = 2 * 40 * 3 / 4  # five float64, all-reduced over four ranks


def test_what_arguments_turn_off_is_not_planned():
    """`optimizer.arguments={orthogonalize: false}`: directions travel in float32, as those of celo2-base."""
    setup = Setup("ddp", 4, orthogonalize=False)
    assert setup.entry.takes_rule and not setup.entry.orthogonalizes
    found = [sent_bytes(TOY, one)["directions"] for one in (setup, Setup("ddp", 4, optimizer="celo2-base"), Setup("ddp", 4))]
    assert found == [2400, 2400, 1200]


def test_what_a_collective_sends():
    assert all_reduce(100, 4) == 150 and reduce_scatter(100, 4) == all_gather(100, 4) == broadcast(100, 4) == 75
    assert all_to_all(100, 4) == 75
    assert all(f(100, 1) == 0 for f in (all_reduce, reduce_scatter, all_gather, broadcast, all_to_all))


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        # 4 bytes x 1000, twice 3/4 of it; directions of 800 in bf16: 1600 x 3/4.
        (Setup("ddp", 4, 3), {"gradients": 6000, "weights": 0, "directions": 1200, "sums": 0}),
        (Setup("ddp", 4, 3, bf16=False), {"gradients": 6000, "weights": 0, "directions": 1200, "sums": 0}),
        (Setup("ddp", 4, 3, bf16=False, cpu=True), {"gradients": 6000, "weights": 0, "directions": 2400, "sums": 0}),
        (Setup("ddp", 4, optimizer="celo2-base"), {"gradients": 6000, "weights": 0, "directions": 2400, "sums": 0}),
        (Setup("ddp", 4, optimizer="adamw"), {"gradients": 6000, "weights": 0, "directions": 0, "sums": 0}),
        # The 200 weights of AdamW come from their owners, in float32.
        (Setup("ddp", 4, shard_state=True), {"gradients": 6000, "weights": 600, "directions": 1200, "sums": 0}),
        # Runs of 200: every matrix is whole on a rank, and no direction travels.
        (Setup("zero1", 4, 3), {"gradients": 6000, "weights": 3000, "directions": 0, "sums": 0}),
        (Setup("zero2", 4, 3), {"gradients": 18000, "weights": 3000, "directions": 0, "sums": 0}),
        # A rank holds 200 elements of directions; 3/4 go to other owners, and as many come back: 2 x 400 bytes x 3/4.
        # 10 + 20 + 12 + 6 + 1 = 49 sums of each of 4 matrices: 784 bytes.
        (Setup("zero3", 4, 3), {"gradients": 9000, "weights": 18000, "directions": 600, "sums": 1176}),
        (Setup("zero3", 4, 3, normalize_gradient=True), {"gradients": 9000, "weights": 18000, "directions": 600, "sums": 1200}),
        (Setup("zero3", 4, 3, optimizer="muon"), {"gradients": 9000, "weights": 18000, "directions": 600, "sums": 0}),
        # Blocks in bf16 twice (2 x 1700 x 3/4), the other 150 in float32 once (600 x 3/4), in each of 3 micro-batches.
        (Setup("fsdp2", 4, 3), {"gradients": 9000, "weights": 9000, "directions": 600, "sums": 1176}),
        (Setup("fsdp2", 4, 3, bf16=False), {"gradients": 9000, "weights": 16650, "directions": 600, "sums": 1176}),
        (Setup("fsdp2", 4, 3, bf16=False, cpu=True), {"gradients": 9000, "weights": 16650, "directions": 1200, "sums": 1176}),
        # Two copies over two ranks each: halves travel within, and the sum of 2000 bytes between the copies.
        (Setup("fsdp2", 4, 1, replicas=2), {"gradients": 4000, "weights": 2000, "directions": 800, "sums": 784}),
    ],
)
def test_sent_bytes(setup, expected):
    assert sent_bytes(TOY, setup) == pytest.approx({"whiteners": 0, **expected, "agreement": JUDGED})


def test_whiteners_are_planned():
    """10² + 20² float32 of each of four matrices: 8000 bytes on every rank, and as many in an all-reduce."""
    for setup, held_here, sent in (
        (Setup("ddp", 4), 8000, 12000),
        (Setup("ddp", 4, shard_state=True), 2000, 0),
        (Setup("zero1", 4), 8000, 0),  # no matrix is split
        (Setup("zero3", 4), 8000, 12000),
        (Setup("fsdp2", 4), 8000, 12000),
        (Setup("ddp", 1), 8000, 0),
        (Setup("ddp", 4, orthogonalize=False), 0, 0),
    ):
        whitened = replace(setup, whitens=True)
        assert "whiteners" not in held(TOY, setup) and held(TOY, whitened)["whiteners"] == held_here, setup
        assert sent_bytes(TOY, whitened)["whiteners"] == sent, setup
        machine = Machine()
        copied = [save_memory(TOY, one)["copy of its shards"] for one in (setup, whitened)]
        assert copied[1] - copied[0] == (8000 / setup.shards if setup.orthogonalize else 0)
        slower = optimizer_seconds(TOY, whitened, machine) / optimizer_seconds(TOY, setup, machine)
        assert (slower > 1) == setup.orthogonalize


def test_one_rank_sends_nothing():
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        assert sum(sent_bytes(TOY, Setup(strategy, 1, 3)).values()) == 0


def test_which_matrices_are_split():
    assert split_matrices(TOY, Setup("zero1", 4)) == []  # a run ends exactly after every matrix
    assert len(split_matrices(TOY, Setup("zero1", 3))) == 2  # runs of 267 end at 267 and 534: in the second and the third
    assert len(split_matrices(TOY, Setup("zero2", 8))) == 4  # runs of 100
    assert len(split_matrices(TOY, Setup("zero3", 4))) == 4 and split_matrices(TOY, Setup("ddp", 4)) == []


def test_memory_by_hand():
    ddp = passes_memory(TOY, Setup("ddp", 4, micro_batch=2))
    # Four accumulators for 800, two for 200; three decays of 10 + 20 means of 4 matrices.
    held = {name: state_bytes(TOY, Setup(optimizer=name)) for name in ("celo2", "celo2-base", "adamw", "muon")}
    assert held == {"celo2": 14400, "celo2-base": 16000, "adamw": 8000, "muon": 4800}
    in_bfloat16 = [state_bytes(TOY, Setup(optimizer=name, state_bf16=True)) for name in ("celo2", "celo2-base")]
    assert in_bfloat16 == [8 * 800 + 8 * 200, 8 * 800 + 16 * 200]
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer state"], ddp["row and column means"]) == (4000, 4000, 14400, 1440)
    assert (ddp["bf16 copies"], ddp["activations (estimate)"], ddp["loss (estimate)"]) == (2000, 2000, 120)
    # The results of one matrix of four, and Newton-Schulz on it, when activations are gone.
    update = update_memory(TOY, Setup("ddp", 4))
    assert (update["directions"], update["gradients"]) == (2 * (200 + 3 * 200 + 2 * 100), 4000)
    assert memory_per_rank(TOY, Setup("ddp", 4, micro_batch=2)) == ddp
    many = replace(TOY, activations=0.0, loss=0.0)
    assert memory_per_rank(many, Setup("ddp", 4, bf16=False)) == update_memory(many, Setup("ddp", 4, bf16=False))
    assert memory_per_rank(TOY, Setup("ddp", 4, shard_state=True))["optimizer state"] == 3600
    zero1, zero2, zero3 = (passes_memory(TOY, Setup(f"zero{stage}", 4, accumulation=2)) for stage in (1, 2, 3))
    assert [m["weights"] for m in (zero1, zero2, zero3)] == [4000, 4000, 1000]
    assert [m["gradients"] for m in (zero1, zero2, zero3)] == [4000, 1000, 1000]
    # Of one micro-batch only what exceeds activations (1000) and loss (120), which go while gradients come; zero3 keeps them.
    single = [passes_memory(TOY, Setup(name, 4))["gradients"] for name in ("zero1", "zero2", "zero3", "fsdp2", "ddp")]
    assert single == [2880, 0, 1000, 0, 4000]
    # DDP: those of micro-batches before the last beside the buckets; the largest, tied, of 100 weights, comes twice at the end.
    several = passes_memory(replace(many, largest=100), Setup("ddp", 4, accumulation=2))
    assert (several["gradients"], several["gradients that have not travelled"]) == (4000, 4000)
    assert several["a gradient on its way"] == 2 * 400
    assert passes_memory(replace(many, largest=60), Setup("ddp", 4))["a gradient on its way"] == 240  # of two that are not tied
    assert passes_memory(replace(many, largest=100), Setup("ddp", 1))["gradients"] == 4000 + 800
    assert [m["optimizer state"] for m in (zero1, zero2, zero3)] == [3600] * 3
    assert [m["flat copies"] for m in (zero1, zero2, zero3)] == [1000, 1000, 0]
    assert [m["buckets"] for m in (zero1, zero2, zero3)] == [2e8] * 3 and ddp["buckets"] == 0
    assert passes_memory(TOY, Setup("zero1", 4), cpu=True)["buckets"] == 4000  # pages that are never written do not count
    assert zero3["gathered (estimate)"] == 4000  # all of a small model
    assert [update_memory(TOY, Setup(f"zero{stage}", 4))["gradients"] for stage in (1, 2, 3)] == [2000] * 3
    fsdp2 = passes_memory(TOY, Setup("fsdp2", 4))
    assert (fsdp2["weights"], fsdp2["optimizer state"], fsdp2["bf16 copies"]) == (1000, 3600, 0)
    assert fsdp2["gathered (estimate)"] == (2 * 2 + 4) * 425 + 8 * 150  # two blocks in bf16, a gradient, and what is outside
    assert memory_per_rank(TOY, Setup("fsdp2", 4, replicas=2))["weights"] == 2000


def test_start_and_save_by_hand():
    """State is 14400 bytes, weights 4000; the momenta of the largest matrix take 3 x 800 bytes."""
    start = {name: phases(TOY, Setup(name, 4))["start"] for name in ("ddp", "zero1", "zero3", "fsdp2")}
    assert start["ddp"].on_device == 4000 + 14400 + 1440 + 4000  # beside the buckets of the gradients
    assert start["fsdp2"].on_device == 1000 + 3600 + 1440 and start["zero3"].on_device == 2000 + 3600 + 1440 + 2e8
    # Two copies of the weights while zero1 flattens them; on one rank the state is more.
    assert start["zero1"].device == {"weights": 4000, "flat copies": 5000, "gradients": 1000}
    pieces = 4 * 2 * PIECE  # weights on their way
    assert peaks_on_cpu(TOY, Setup("zero1", 4))["start"] == 4000 + 3600 + 360 + 1000 + pieces + 0.05e9
    # On a CPU nothing of AdamW's state is there, nor a page of ddp's buckets; zero3 writes zeros into its gradients.
    adamw = {name: peaks_on_cpu(TOY, Setup(name, 4, optimizer="adamw"))["start"] for name in ("ddp", "fsdp2", "zero3")}
    assert adamw == {"ddp": 2 * 4000 + pieces, "fsdp2": 1000 + pieces, "zero3": 2000 + pieces + 0.05e9}
    # Of an architecture of transformers a pass finds out which weights get a gradient, and its loss is compared before.
    large = replace(TOY, known=False, parameters=10 * PIECE, block_parameters=8 * PIECE)
    unknown = {name: phases(large, Setup(name, 4, optimizer="adamw"))["start"] for name in ("ddp", "fsdp2")}
    assert unknown["fsdp2"].host["weights on their way"] == 4 * 6 * PIECE  # a block of two, and what is outside
    assert phases(large, Setup("ddp", 4, optimizer="muon"))["start"].device["gradients"] == 40 * PIECE
    assert unknown["fsdp2"].device["gathered (estimate)"] == (2 * 2 + 4) * 4 * PIECE + 8 * 2 * PIECE
    alone = phases(TOY, Setup("zero1", 1))["start"].device
    assert alone == {"weights": 4000, "optimizer state": 14400, "row and column means": 1440, "flat copies": 4000, "gradients": 0}
    assert start["zero3"].host == {"imports": 0.5e9, "weights on their way": pieces, "flat copies": 1000}
    assert start["fsdp2"].host == {"imports": 0.5e9, "weights on their way": pieces}
    save = phases(TOY, Setup("fsdp2", 4))["save"]
    assert save.host == {"imports": 0.5e9, "copy of its shards": 4600, "a tensor": 2400}
    assert save.device == phases(TOY, Setup("fsdp2", 4))["step"].device
    device, host = peaks(TOY, Setup("fsdp2", 4))
    assert (device, host) == (save.on_device, start["fsdp2"].on_host)
    # Offloaded, weights (1000), AdamW's state (2000, at the start of a run that goes on) and gradients (1000) are on the host.
    # Two micro-batches, so that all gradients are beside the activations.
    on_gpu, on_host = (phases(TOY, Setup("fsdp2", 4, 2, optimizer="adamw", offload=offload)) for offload in (False, True))
    for name, more in (("start", 3000), ("step", 4000), ("save", 4000)):
        moved = on_gpu[name].on_device - on_host[name].on_device
        assert moved == on_host[name].on_host - on_gpu[name].on_host == more, name


def test_directions_by_hand():
    """Four matrices of 200 elements; Newton-Schulz needs 3 x 200 + 2 x 100 of each of a batch."""
    assert directions_held(TOY, Setup("ddp", 1)) == 2 * 4 * 800
    assert directions_held(TOY, Setup("ddp", 1), batch_elements=450) == 2 * 2 * 800  # two at once
    # A share of 200, what arrived, the matrix of this owner; more than twice both together.
    assert directions_held(TOY, Setup("fsdp2", 4)) == 2 * (200 + 2 * 200 + 800)
    assert directions_held(TOY, Setup("adamw", optimizer="adamw")) == 0


def test_seconds_by_hand():
    machine = Machine(
        flops=1e6,
        efficiency=0.5,
        newton_schulz_efficiency=0.5,
        memory_bandwidth=1e4,
        gpus_per_node=2,
        intra_node_bandwidth=1e4,
        inter_node_bandwidth=1e3,
        latency=0.0,
    )
    # 3 micro-batches x 2 sequences x 8 tokens x 6000 FLOPs at 0.5 MFLOP/s.
    setup = Setup("ddp", 4, 3, 2)
    time = step_time(TOY, setup, machine)
    assert time.compute == pytest.approx(0.576)
    # Gradients: 6000 bytes over two adapters, 3 s, behind two thirds of one micro-batch of three: 0.128 s. Directions 0.6 s.
    assert time.hidden == pytest.approx(0.128) and time.exposed == pytest.approx(3 - 0.128 + 0.6 + JUDGED / 2000)
    # One matrix each of four ranks: 5 x (4 x 10 x 10 x 20 + 2 x 1000) FLOPs at 0.5 MFLOP/s. Memory: 40 bytes of each of 800
    # weights, 42 of each of 200 directions, 10 to apply, and AdamW's 28 of each of 200.
    assert newton_schulz_flops(10, 20) == 50000
    expected = 0.1 + (800 * 40 + 200 * 42 + 800 * 10 + 200 * 28) / 1e4
    assert time.optimizer == optimizer_seconds(TOY, setup, machine) == pytest.approx(expected)
    assert time.total == pytest.approx(0.576 + time.exposed + expected)
    # With bfloat16 state 24 and 28 bytes instead.
    low = (0.1 * 1e4 + 800 * 24 + 200 * 28 + 800 * 10 + 200 * 28) / 1e4
    assert optimizer_seconds(TOY, replace(setup, state_bf16=True), machine) == pytest.approx(low)
    # A rule that normalizes gradients reads 4 bytes more of each weight, of each of the 200 that a rank has of split matrices.
    for strategy, more in (("ddp", 4 * 800), ("zero3", 4 * 200)):
        plain = Setup(strategy, 4, 3, 2)
        seconds = [optimizer_seconds(TOY, replace(plain, normalize_gradient=on), machine) for on in (False, True)]
        assert seconds[1] - seconds[0] == pytest.approx(more / 1e4)
    assert StepTime(1, 2, 3, 4).total == 8  # what is hidden takes no time
    # In one node the ring is ten times as fast, and zero3 hides weights and gradients behind all of computing.
    inside = step_time(TOY, Setup("zero3", 2, 3, 2), machine)
    sent = sent_bytes(TOY, Setup("zero3", 2, 3, 2))
    behind = (sent["gradients"] + sent["weights"]) / 1e4
    rest = (sent["sums"] + sent["agreement"] + sent["directions"]) / 1e4
    assert inside.hidden == pytest.approx(0.576) and inside.exposed == pytest.approx(behind - 0.576 + rest)
    # Across nodes an all-to-all has one adapter for each GPU, not a node's.
    slow = step_time(TOY, Setup("zero3", 4, 3, 2), machine)
    sent = sent_bytes(TOY, Setup("zero3", 4, 3, 2))
    rest = (sent["sums"] + sent["agreement"]) / 2e3 + sent["directions"] / 1e3
    assert slow.exposed == pytest.approx((sent["gradients"] + sent["weights"]) / 2e3 - 0.576 + rest)


class Tiny(nn.Module):
    """Two blocks, an embedding outside, and a fused parameter of two matrices in the groups."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 8) for _ in range(2))


def test_workload_of_a_model():
    model = Tiny()
    fused, other = (block.weight for block in model.blocks)
    groups = [
        {"params": [fused], "role": "hidden", "matrices": ((2, 4, 4), (0, 1, 2), (2, 4, 4))},
        {"params": [other], "role": "hidden", "matrices": None},
        {"params": [model.embedding.weight, *(block.bias for block in model.blocks)], "role": "other", "matrices": None},
    ]
    workload = workload_of(model, groups, 16, 1.0, 2.0, 3.0, False)
    assert workload.hidden == ((4, 4), (4, 4), (8, 4)) and workload.blocks == 2
    assert (workload.parameters, workload.block_parameters, workload.outside, workload.hidden_parameters) == (108, 80, 28, 64)


def gpt3(width, layers):
    """GPT-3's shapes: four attention projections, and 4 x width in the feed-forward part."""
    hidden = (((width, width),) * 4 + ((4 * width, width), (width, 4 * width))) * layers
    blocks = sum(r * c for r, c in hidden) + layers * 13 * width
    n = blocks + (50304 + 2048) * width
    activations = 2048 * width * (layers + 16)
    return Workload(n, hidden, blocks, layers, 2048, 6.0 * n, activations, 3 * 4096 * 50304.0, recompute=True)


def test_the_large_sizes():
    xl = gpt3(2048, 24)
    # 62 TFLOP of Newton–Schulz a step at 1.3B; accumulators of 19.3 GB.
    assert sum(newton_schulz_flops(*shape) for shape in xl.hidden) == pytest.approx(62e12, rel=0.01)
    assert 4 * 4 * xl.hidden_parameters == pytest.approx(19.3e9, rel=0.01)
    davinci = gpt3(12288, 96)
    assert davinci.parameters == pytest.approx(175e9, rel=0.01)
    # Without sharding, 8 accumulators and more a weight fit nowhere; over 1,024 GPUs they do.
    machine = Machine()
    assert sum(memory_per_rank(davinci, Setup("ddp", 1024)).values()) > 20 * machine.memory
    assert sum(memory_per_rank(davinci, Setup("fsdp2", 1024)).values()) < machine.memory
    # More owners than matrices do not help: the largest matrix is left.
    largest = newton_schulz_flops(12288, 49152) / (machine.flops * machine.newton_schulz_efficiency)
    assert optimizer_seconds(davinci, Setup("fsdp2", 1024), machine) == pytest.approx(largest, rel=0.05)


def test_the_table():
    lines = cost_lines(gpt3(2048, 24), Setup("fsdp2", micro_batch=4), 256, Machine())
    rows = [line.split() for line in lines[2:]]
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256]  # 256 sequences do not reach 512 GPUs
    assert rows[0][1:4] == ["64", "x", "4"] and rows[-1][1:4] == ["1", "x", "1"]
    speeds = [float(row[12].replace(",", "")) for row in rows]
    assert speeds == sorted(speeds) and all(row[6] == "yes" for row in rows[1:])
    assert max(map(len, lines[1:])) <= 130
    assert "divides over none" in cost_lines(gpt3(2048, 24), Setup("fsdp2", replicas=3), 7, Machine())[-1]


def test_recomputing_costs_a_third():
    setup, machine = Setup("ddp", 8), Machine()
    more = Workload(**{**TOY.__dict__, "recompute": True})
    assert step_time(more, setup, machine).compute == pytest.approx(4 / 3 * step_time(TOY, setup, machine).compute)


def test_an_average_of_the_weights_counts():
    """4 bytes a weight where the weights are, or the part of them that the optimizer updates; and once more in a save."""
    for strategy, share in (("ddp", 1), ("zero1", 4), ("zero3", 4), ("fsdp2", 4)):
        without, kept = (Setup(strategy, 4, average=average) for average in (False, True))
        assert held(TOY, kept)["average of the weights"] == 4 * TOY.parameters / share
        more = save_memory(TOY, kept)["copy of its shards"] - save_memory(TOY, without)["copy of its shards"]
        assert more == 4 * TOY.parameters / 4
