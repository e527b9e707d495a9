"""`python -m launch.benchmark optimizer`: the time of one optimizer step, side by side in one process.
`python -m launch.benchmark save`: how long training waits for a checkpoint of a 125M model, and how large that is.
`python -m launch.benchmark strategies`: every strategy on 1, 2 and 4 processes: difference, memory, bytes exchanged.

Every optimizer steps over the same matrices in turn, round after round, so that a busy machine slows all of them alike;
the ratio of the medians is the result, the spread over the rounds its error.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from celo2 import Celo2
from configs.schema import Checkpoint as CheckpointConfig
from configs.schema import Config
from launch.checkpoint import Saver
from launch.equality import table
from launch.strategy import make_strategy
from models import build_model

# The hidden matrices of four blocks of a GPT of width 512, q, k, v and o apart: 12.6 million weights.
SHAPES = [(512, 512)] * 16 + [(2048, 512)] * 4 + [(512, 2048)] * 4


def time_steps(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call in each round, the calls of a round one after the other, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def benchmark_optimizers(rounds: int, device: torch.device) -> dict[str, object]:
    """Times of Celo2, Muon and AdamW over `SHAPES`, and their ratios to Muon and AdamW."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device)) for shape in SHAPES]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).to(device)
    steps = {
        "celo2, bfloat16 Newton-Schulz": Celo2(params, lr=1e-5, ns_dtype=torch.bfloat16).step,
        "celo2, float32 Newton-Schulz": Celo2(params, lr=1e-5, ns_dtype=torch.float32).step,
        "torch.optim.Muon": torch.optim.Muon(params, lr=1e-5).step,
        "torch.optim.AdamW(fused=True)": torch.optim.AdamW(params, lr=1e-5, fused=True).step,
    }
    seconds = time_steps(steps, rounds, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads" if device.type == "cpu" else gpu_name(device),
        "torch": torch.__version__,
        "weights": sum(p.numel() for p in params),
        "rounds": rounds,
        "rows": [
            {
                "optimizer": name,
                "milliseconds": 1e3 * medians[name],
                "fastest": 1e3 * min(values),
                "slowest": 1e3 * max(values),
                "to_muon": medians[name] / medians["torch.optim.Muon"],
                "to_adamw": medians[name] / medians["torch.optim.AdamW(fused=True)"],
            }
            for name, values in seconds.items()
        ],
    }


def benchmark_save(rounds: int, device: torch.device) -> list[dict[str, object]]:
    """The records of `rounds` checkpoints of `gpt3-125m` with Celo2's state, one after the other, in a temporary folder."""
    model = build_model(size="gpt3-125m", vocab_size=50304)
    weights = model.num_parameters()
    strategy = make_strategy(Config(), Accelerator(cpu=device.type == "cpu"), model)
    records: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), CheckpointConfig(keep=1), records.append, write=True, saved=0)
        for step in range(1, rounds + 1):
            saver.save(strategy, {"step": step})
            saver.close()
    return [{**record, "bytes_per_weight": record["bytes"] / weights} for record in records]


def gpu_name(device: torch.device) -> str:
    """What the GPU calls itself."""
    return torch.cuda.get_device_name(device)


def main(argv: list[str] | None = None) -> int:
    """Print the table, and write it as JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m launch.benchmark", description=__doc__)
    parser.add_argument("what", choices=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="a file for the result")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure, show = BENCHMARKS[args.what]
    result = measure(args.rounds, device)
    show(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return 0


def print_saves(records: list[dict[str, object]]) -> None:
    """A line a checkpoint."""
    for r in records:
        size = f"{r['bytes'] / 1e9:.2f} GB, {r['bytes_per_weight']:.1f} bytes a weight"
        print(f"stall {r['stall_seconds']:.2f} s, written in {r['write_seconds']:.2f} s beside training; {size}")


def print_optimizers(result: dict[str, object]) -> None:
    """The table of optimizer steps."""
    print(f"{result['weights']:,} weights in {len(SHAPES)} matrices; {result['machine']}; torch {result['torch']}")
    print(f"{'':32}{'median ms':>10}{'fastest':>9}{'slowest':>9}{'x Muon':>8}{'x AdamW':>9}")
    for row in result["rows"]:
        times = f"{row['milliseconds']:10.1f}{row['fastest']:9.1f}{row['slowest']:9.1f}"
        print(f"{row['optimizer']:32}{times}{row['to_muon']:8.2f}{row['to_adamw']:9.1f}")


def print_strategies(records: list[dict[str, object]]) -> None:
    """A line for each strategy and number of processes; bytes of the rank with the most."""
    print(f"{'':20}{'processes':>10}{'loss':>10}{'weights':>10}{'state':>12}{'gradients':>12}{'sent a step':>14}{'formula':>14}")
    for r in records:
        differences = f"{r['loss_difference']:10.1e}{r['weight_difference']:10.1e}"
        held = f"{max(r['state_bytes']):12,}{max(r['gradient_bytes']):12,}"
        print(f"{r['row']:20}{r['processes']:>10}{differences}{held}{r['sent_bytes']:14,.0f}{r['formula_bytes']:14,.0f}")


BENCHMARKS = {
    "optimizer": (benchmark_optimizers, print_optimizers),
    "save": (benchmark_save, print_saves),
    "strategies": (lambda rounds, device: table("celo2"), print_strategies),
}


if __name__ == "__main__":
    sys.exit(main())
