"""`python -m launch.benchmark optimizer`: one optimizer step over the hidden matrices of a GPT-3, contestants side by side.

Beside every time the table shows two floors: the bytes that a step must move, divided by the copy bandwidth, and its FLOPs,
divided by the matmul rate. Both rates are measured in the same run. Bytes for each weight, in float32 unless said otherwise:

    AdamW     28: g, w, two moments read; w, two moments written
    Muon      26: g, w, momentum read; w, momentum written; the update u in bfloat16 written, read by Newton–Schulz, and again
    Celo2     `celo2.kernels.traffic`: three passes over g, w and four accumulators, u written and read, w written

Newton–Schulz itself counts in FLOPs alone, those of full products. Of every three products `celo2.kernels` computes only half of
two, which are symmetric, so that a step may be faster than this floor. The MLP of Celo2, 216 multiply-adds for each weight, also
counts in FLOPs alone, although it does not run on matmul units.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

import torch

from celo2 import Celo2
from celo2.blocked import PLAIN
from celo2.kernels import passes_for
from celo2.kernels.traffic import bytes_moved
from celo2.metatrain.engine import captured
from celo2.orthogonalize import newton_schulz_flops
from celo2.rule import update
from launch.benchmark.measure import (
    TIMES,
    Column,
    Rates,
    Row,
    Step,
    measure_rates,
    peak_bytes,
    summary,
    synchronize,
    time_rounds,
)
from models.sizes import SIZES

LR = 1e-5  # small: the same weights are updated thousands of times
MUON, ADAMW = "torch.optim.Muon", "torch.optim.AdamW(fused=True)"
MLP_FLOPS = 2 * 216
# cpu: 12.6 million weights, a second of work; host: as many matrices as gpt3-350m with hardly any weights. It measures the time
# of Python, which on a GPU must be shorter than that of the device.
SMALL = {"cpu": (4, 512), "host": (24, 16)}
DEFAULT_SIZES = {"cpu": ("cpu",), "cuda": ("gpt3-125m", "gpt3-350m", "gpt3-1.3b")}

ROUNDS = 7
COLUMNS = (
    Column("size", "matrices of"),
    Column("optimizer", "optimizer"),
    *TIMES,
    Column("to_muon", "x Muon", ".2f"),
    Column("to_adamw", "x AdamW", ".1f"),
    Column("host_us", "host us a matrix", ",.1f"),
    Column("gigabytes", "GB", ",.2f"),
    Column("teraflops", "TFLOP", ",.2f"),
    Column("bytes_floor", "bytes floor ms", ",.2f"),
    Column("flops_floor", "FLOPs floor ms", ",.2f"),
    Column("to_floor", "x larger floor", ".1f"),
    Column("peak_mib", "peak MiB", ",.0f"),
)


@dataclass
class Contestant:
    """One optimizer over the matrices: its step, and what a step must at least do."""

    name: str
    step: Step
    moved: int  # bytes
    flops: float
    dtype: torch.dtype = torch.bfloat16  # of the products


def shapes_of(size: str) -> list[tuple[int, int]]:
    """The hidden matrices of a named size: q, k, v, o and the two of the feed-forward part, layer by layer."""
    layers, width = SMALL[size] if size in SMALL else (SIZES[size].layers, SIZES[size].width)
    return ([(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]) * layers


def make_params(size: str, device: torch.device) -> list[torch.nn.Parameter]:
    """The matrices with gradients, of the scale that they have in training."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes_of(size):
        p = torch.nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02)
        p.grad = torch.randn(shape, generator=generator, device=device) * 1e-3
        params.append(p)
    return params


def contestants(params: list[torch.nn.Parameter], device: torch.device) -> list[Contestant]:
    """Every path of Celo2 on `device`, Muon and AdamW. Paths with equal forms of state share it: 1.3B weights fill a GPU."""
    weights = sum(p.numel() for p in params)
    flops = sum(newton_schulz_flops(*p.shape) for p in params)

    def celo2(name: str, step: Step, state_bytes: int = 4, ns_dtype: torch.dtype = torch.bfloat16) -> Contestant:
        moved = bytes_moved(weights, 4, 4, state_bytes, ns_dtype.itemsize, half.rule.normalize_gradient)
        return Contestant(f"Celo2, {name}", step, moved, flops + MLP_FLOPS * weights, ns_dtype)

    half = Celo2(params, LR, ns_dtype=torch.bfloat16)
    full = Celo2(params, LR, ns_dtype=torch.float32)
    small = Celo2(params, LR, ns_dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    half.allocate_state()
    full.state = half.state
    found = [
        celo2("bf16 Newton-Schulz", half.step),
        celo2("float32 Newton-Schulz", full.step, ns_dtype=torch.float32),
        celo2("bf16 Newton-Schulz and state", small.step, state_bytes=2),
    ]
    if device.type == "cuda":
        if passes_for(device) is not PLAIN:
            found.append(celo2("bf16, without Triton", lambda: step_plainly(half)))
        found.append(celo2("reference, float32, a matrix at a time", lambda: step_by_reference(half), ns_dtype=torch.float32))
        graphed = Celo2(params, torch.tensor(LR, device=device), ns_dtype=half.ns_dtype)
        graphed.state = half.state
        try:
            found.append(celo2("bf16, in a CUDA graph", captured(graphed.step, warm_up=1).replay))
        except RuntimeError as error:  # the other contestants can still be measured
            print(f"not captured in a CUDA graph: {error}")
    return [
        *found,
        Contestant(MUON, torch.optim.Muon(params, lr=LR).step, 26 * weights, flops),
        Contestant(ADAMW, torch.optim.AdamW(params, lr=LR, fused=True).step, 28 * weights, 0),
    ]


def step_plainly(optimizer: Celo2) -> None:
    """A step on the plain path, whatever the device."""
    chosen, optimizer.passes = optimizer.passes, PLAIN
    optimizer.step()
    optimizer.passes = chosen


@torch.no_grad()
def step_by_reference(optimizer: Celo2) -> None:
    """A step by `celo2.rule.update`, one matrix after the other."""
    for p in optimizer.param_groups[0]["params"]:
        rule = optimizer.rule.to(p.device)
        p.sub_(update(rule, optimizer.state[p], p.grad, p, orthogonalize=True), alpha=LR)


def host_seconds(step: Step, device: torch.device) -> float:
    """CPU seconds that a step costs the calling thread, which only queues what a GPU does: the median of five."""
    found = []
    for _ in range(5):
        synchronize(device)
        start = time.thread_time()
        step()
        found.append(time.thread_time() - start)
    return statistics.median(found)


def measure_size(size: str, rounds: int, rates: Rates, device: torch.device) -> list[Row]:
    """A row for each contestant."""
    params = make_params(size, device)
    found = contestants(params, device)
    seconds = time_rounds({c.name: c.step for c in found}, rounds, device)
    times = {name: summary(values) for name, values in seconds.items()}
    rows = []
    for c in found:
        floors = rates.floors(c.moved, c.flops, c.dtype)
        row = {"size": size, "optimizer": c.name, **times[c.name], **floors}
        row |= {"gigabytes": c.moved / 1e9, "teraflops": c.flops / 1e12, "peak_mib": peak_bytes(c.step, device) / 2**20}
        row["to_muon"], row["to_adamw"] = (row["ms"] / times[other]["ms"] for other in (MUON, ADAMW))
        row["to_floor"] = row["ms"] / max(floors.values())
        if device.type == "cuda" or size == "host":
            row["host_us"] = 1e6 * host_seconds(c.step, device) / len(params)
        rows.append(row)
    return rows


def add_options(command: ArgumentParser, device: torch.device) -> None:
    """Add the sizes; the default ones suit `device`."""
    known, default = [*SMALL, *SIZES], DEFAULT_SIZES[device.type]
    command.add_argument("--sizes", nargs="+", choices=known, default=default, metavar="SIZE", help=", ".join(known))


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """The rows of every size, and the rates that their floors rest on."""
    rates = measure_rates(device)
    return rates.describe(), [row for size in args.sizes for row in measure_size(size, args.rounds, rates, device)]
