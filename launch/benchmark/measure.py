"""How this project measures: contestants in turns, peak memory, what the machine can do at best, and a table of results."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]
Row = dict[str, Any]

ENOUGH = 0.05  # s: a round repeats a step until it has lasted this long, so that a clock's resolution does not count
MOST_REPEATS = 20
COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}  # bytes: well beyond the last cache (H200: 50 MB; the Xeon: shared, unknown)
MULTIPLIED = {"cuda": 8192, "cpu": 1024}  # rows of the square matrices of the matmul rate


def available_device() -> torch.device:
    """The first GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_rounds(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of one call in each round. Contestants take turns in every round, so that a busy machine slows all of them.

    Two rounds before these do not count: the first compiles and allocates, the second decides how often a round repeats a step.
    """
    repeats: dict[str, int] = {}
    for _ in range(2):
        for name, step in steps.items():
            seconds = timed(step, 1, device)
            repeats[name] = max(1, min(MOST_REPEATS, math.ceil(ENOUGH / seconds)))
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(timed(step, repeats[name], device))
    return found


def timed(step: Step, repeats: int, device: torch.device) -> float:
    """Mean seconds of `repeats` calls, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def summary(seconds: Sequence[float]) -> Row:
    """Median and spread of the rounds, in milliseconds."""
    return {"ms": 1e3 * statistics.median(seconds), "fastest": 1e3 * min(seconds), "slowest": 1e3 * max(seconds)}


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most bytes that `step` held at once beyond what was there before, as the allocator records them."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class Rates(NamedTuple):
    """What the machine does at best, measured in the same run as what is compared with it."""

    bandwidth: float  # bytes/s of a large copy, read and written
    flops: dict[torch.dtype, float]  # FLOP/s of a large square matmul

    def floors(self, moved: float, flops: float, dtype: torch.dtype) -> Row:
        """The milliseconds that the bytes and that the FLOPs alone would take."""
        return {"bytes_floor": 1e3 * moved / self.bandwidth, "flops_floor": 1e3 * flops / self.flops[dtype]}

    def describe(self) -> str:
        """The rates in one line."""
        rates = ", ".join(f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.3g}" for dtype, rate in self.flops.items())
        return f"copy {self.bandwidth / 1e9:,.0f} GB/s (read and written), matmul TFLOP/s: {rates}"


def measure_rates(device: torch.device) -> Rates:
    """Copy bandwidth and matmul rates, the best of five."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source), device)
    n, flops = MULTIPLIED[device.type], {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        flops[dtype] = 2 * n**3 / best(partial(torch.matmul, a, b), device)
    return Rates(bandwidth, flops)


def best(step: Step, device: torch.device) -> float:
    """Seconds of a call in the fastest of five rounds."""
    return min(time_rounds({"": step}, 5, device)[""])


def environment(device: torch.device) -> Row:
    """Where it was measured: machine, threads, versions."""
    versions = [f"{name} {found}" for name in ("torch", "triton", "transformers") if (found := installed(name))]
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "machine": f"{chip}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Column(NamedTuple):
    """One column of a table: the key of a row, what stands above it, and how a number is written."""

    key: str
    heading: str
    format: str = ""


TIMES = (Column("ms", "median ms", ",.2f"), Column("fastest", "fastest", ",.2f"), Column("slowest", "slowest", ",.2f"))


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """`rows` as a Markdown table. A dash stands for a number that a row lacks; a column that all rows lack is left out."""
    used = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    cells = [[column.heading for column in used]]
    for row in rows:
        cells.append(["-" if row.get(c.key) is None else format(row[c.key], c.format) for c in used])
    widths = [max(len(line[i]) for line in cells) for i in range(len(used))]
    cells.insert(1, ["-" * width for width in widths])
    sides = [">" if column.format else "<" for column in used]  # numbers to the right, words to the left
    form = "| " + " | ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)) + " |"
    return "\n".join(form.format(*line) for line in cells)
