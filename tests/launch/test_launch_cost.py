"""The cost model against numbers worked out by hand, on a toy model and on GPT-3's shapes."""

import pytest
from torch import nn

from celo2.orthogonalize import newton_schulz_flops
from launch.planning.cost import (
    GPU_MEMORY,
    Setup,
    Workload,
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    cost_lines,
    exchanged_bytes,
    memory_per_rank,
    reduce_scatter,
    split_matrices,
    state_bytes,
    workload_of,
)

# Four matrices 10 x 20 (800 weights), 50 more in two blocks, and 150 outside them: N = 1000.
TOY = Workload(
    parameters=1000,
    hidden=((10, 20),) * 4,
    block_parameters=850,
    blocks=2,
    activations=500.0,
    loss=30.0,
)
JUDGED = 2 * 24 * 3 / 4  # three float64, all-reduced over four ranks


def test_what_a_collective_sends():
    assert all_reduce(100, 4) == 150 and reduce_scatter(100, 4) == all_gather(100, 4) == broadcast(100, 4) == 75
    assert all_to_all(100, 4) == 75
    assert all(f(100, 1) == 0 for f in (all_reduce, reduce_scatter, all_gather, broadcast, all_to_all))


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        # 4 bytes x 1000, twice 3/4 of it; directions of 800 in bf16: 1600 x 3/4.
        (Setup("ddp", 4, 3), {"gradients": 6000, "weights": 0, "directions": 1200, "sums": 0}),
        (Setup("ddp", 4, 3, bf16=False), {"gradients": 6000, "weights": 0, "directions": 2400, "sums": 0}),
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
        (Setup("fsdp2", 4, 3, bf16=False), {"gradients": 9000, "weights": 16650, "directions": 1200, "sums": 1176}),
        # Two copies over two ranks each: halves travel within, and the sum of 2000 bytes between the copies.
        (Setup("fsdp2", 4, 1, replicas=2), {"gradients": 4000, "weights": 2000, "directions": 800, "sums": 784}),
    ],
)
def test_exchanged_bytes(setup, expected):
    assert exchanged_bytes(TOY, setup) == pytest.approx({**expected, "agreement": JUDGED})


def test_one_rank_sends_nothing():
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        assert sum(exchanged_bytes(TOY, Setup(strategy, 1, 3)).values()) == 0


def test_which_matrices_are_split():
    assert split_matrices(TOY, Setup("zero1", 4)) == []  # a run ends exactly after every matrix
    assert len(split_matrices(TOY, Setup("zero1", 3))) == 2  # runs of 267 end at 267 and 534: in the second and the third
    assert len(split_matrices(TOY, Setup("zero2", 8))) == 4  # runs of 100
    assert len(split_matrices(TOY, Setup("zero3", 4))) == 4 and split_matrices(TOY, Setup("ddp", 4)) == []


def test_memory_by_hand():
    ddp = memory_per_rank(TOY, Setup("ddp", 4, micro_batch=2))
    # Four accumulators for 800, two for 200; three decays of 10 + 20 means of 4 matrices.
    held = {name: state_bytes(TOY, Setup(optimizer=name)) for name in ("celo2", "celo2-base", "adamw", "muon")}
    assert held == {"celo2": 14400, "celo2-base": 16000, "adamw": 8000, "muon": 4800}
    in_bfloat16 = [state_bytes(TOY, Setup(optimizer=name, state_bf16=True)) for name in ("celo2", "celo2-base")]
    assert in_bfloat16 == [8 * 800 + 8 * 200, 8 * 800 + 16 * 200]
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer state"], ddp["row and column means"]) == (4000, 4000, 14400, 1440)
    assert (ddp["bf16 copies"], ddp["activations (estimate)"], ddp["loss (estimate)"], ddp["directions"]) == (
        2000,
        2000,
        120,
        400,
    )
    assert memory_per_rank(TOY, Setup("ddp", 4, shard_state=True))["optimizer state"] == 3600
    zero1, zero2, zero3 = (memory_per_rank(TOY, Setup(f"zero{stage}", 4)) for stage in (1, 2, 3))
    assert [m["weights"] for m in (zero1, zero2, zero3)] == [4000, 4000, 1000]
    assert [m["gradients"] for m in (zero1, zero2, zero3)] == [4000, 1000, 1000]
    assert [m["optimizer state"] for m in (zero1, zero2, zero3)] == [3600] * 3
    assert [m["flat copies"] for m in (zero1, zero2, zero3)] == [5000, 5000, 4000]
    fsdp2 = memory_per_rank(TOY, Setup("fsdp2", 4))
    assert (fsdp2["weights"], fsdp2["optimizer state"], fsdp2["bf16 copies"]) == (1000, 3600, 0)
    assert fsdp2["gathered (estimate)"] == (2 * 2 + 4) * 425 + 8 * 150  # two blocks in bf16, a gradient, and what is outside
    assert memory_per_rank(TOY, Setup("fsdp2", 4, replicas=2))["weights"] == 2000


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
    workload = workload_of(model, groups, 2.0, 3.0)
    assert workload.hidden == ((4, 4), (4, 4), (8, 4)) and workload.blocks == 2
    assert (workload.parameters, workload.block_parameters, workload.outside, workload.hidden_parameters) == (108, 80, 28, 64)


def gpt3(width, layers):
    """GPT-3's shapes: four attention projections, and 4 x width in the feed-forward part."""
    hidden = (((width, width),) * 4 + ((4 * width, width), (width, 4 * width))) * layers
    blocks = sum(r * c for r, c in hidden) + layers * 13 * width
    n = blocks + (50304 + 2048) * width
    activations = 2048 * width * (layers + 16)
    return Workload(n, hidden, blocks, layers, activations, 3 * 4096 * 50304.0)


def test_the_large_sizes():
    xl = gpt3(2048, 24)
    # 62 TFLOP of Newton–Schulz a step at 1.3B; accumulators of 19.3 GB.
    assert sum(newton_schulz_flops(*shape) for shape in xl.hidden) == pytest.approx(62e12, rel=0.01)
    assert 4 * 4 * xl.hidden_parameters == pytest.approx(19.3e9, rel=0.01)
    davinci = gpt3(12288, 96)
    assert davinci.parameters == pytest.approx(175e9, rel=0.01)
    # Without sharding, 8 accumulators and more a weight fit nowhere; over 1,024 GPUs they do.
    assert sum(memory_per_rank(davinci, Setup("ddp", 1024)).values()) > 20 * GPU_MEMORY
    assert sum(memory_per_rank(davinci, Setup("fsdp2", 1024)).values()) < GPU_MEMORY


def test_the_table():
    lines = cost_lines(gpt3(2048, 24), Setup("fsdp2", micro_batch=4), 256)
    rows = [line.split() for line in lines[2:]]
    assert [int(row[0]) for row in rows] == [8, 16, 32, 64, 128, 256]  # 256 sequences do not reach 512 GPUs
    assert rows[0][1:4] == ["8", "x", "4"] and rows[-1][1:4] == ["1", "x", "1"]
    assert all(row[5] == "yes" for row in rows)
    memory = [float(row[4]) for row in rows]
    assert memory == sorted(memory, reverse=True)
    assert max(map(len, lines)) <= 110
    assert "divides over none" in cost_lines(gpt3(2048, 24), Setup("ddp"), 7)[-1]
