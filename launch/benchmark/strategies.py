"""`python -m launch.benchmark strategies`: every strategy on 1, 2 and 4 processes: difference, memory, bytes sent.

Nothing is timed. `table` starts this module under torchrun, where `main` measures all rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from celo2.stack import local
from configs.schema import Config, Distributed, Train
from configs.schema import Optimizer as OptimizerConfig
from launch.benchmark.measure import Column, Row
from launch.benchmark.traffic import Traffic
from launch.distributed.gather import collect
from launch.distributed.setup import STRATEGIES, make_accelerator, make_strategy
from launch.distributed.strategy import Strategy
from launch.distributed.zero import Zero
from launch.monitoring.guard import Judged
from launch.optimizers.build import optimizer_groups
from launch.planning.cost import sent_bytes, setup_of, workload_of
from launch.private import leave
from models import build_model

# Sizes that 2 and 4 do not divide.
MODEL: dict[str, Any] = {"layers": 4, "width": 66, "heads": 3, "context": 32, "vocab_size": 261}
BATCH, ACCUMULATION, STEPS, LR = 8, 2, 20, 2e-3
ROWS: dict[str, dict[str, Any]] = {  # the section `distributed` of each
    "ddp": {"strategy": "ddp"},
    "ddp, shard_state": {"strategy": "ddp", "shard_state": True},
    **{name: {"strategy": name} for name in ("zero1", "zero2", "zero3", "fsdp2")},
}

ROUNDS = None
COLUMNS = (
    Column("row", "strategy"),
    Column("processes", "processes", "d"),
    Column("loss_difference", "loss", ".1e"),
    Column("weight_difference", "weights", ".1e"),
    Column("state", "state bytes", ",d"),
    Column("gradients", "gradient bytes", ",d"),
    Column("sent_bytes", "sent a step", ",.0f"),
    Column("formula_bytes", "formula", ",.0f"),
)


class ZeroOfLargeModel(Zero):
    """Keeps no parameter gathered. DeepSpeed keeps small ones, which would hide what a large model sends."""

    zero_options: ClassVar[dict[str, Any]] = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    }


def measure_row(row: str, accelerator: Accelerator, folder: Path) -> Row:
    """The losses of STEPS steps, and the bytes held and sent in the last one. Every rank must call it."""
    world, rank = accelerator.num_processes, accelerator.process_index
    micro = BATCH // world // ACCUMULATION
    config = Config(
        train=Train(batch_size=BATCH, micro_batch_size=micro),
        optimizer=OptimizerConfig(lr=LR),
        distributed=Distributed(**ROWS[row]),
    )
    torch.manual_seed(0)
    model = build_model(**MODEL)
    groups = optimizer_groups(config.optimizer, model)
    workload = workload_of(model, groups, MODEL["context"], 0.0, 0.0, 0.0, False)
    formula = sent_bytes(workload, replace(setup_of(config, world), cpu=True))
    strategies = STRATEGIES | dict.fromkeys(("zero1", "zero2", "zero3"), ZeroOfLargeModel)
    strategy = make_strategy(config, accelerator, model, strategies=strategies)

    generator = torch.Generator().manual_seed(1)
    losses, gradients = [], 0
    with Traffic() as traffic:
        for _ in range(STEPS):
            traffic.sent.clear()
            tokens = torch.randint(0, MODEL["vocab_size"], (BATCH, MODEL["context"] + 1), generator=generator)
            mine = [(t[:, :-1], t[:, 1:]) for t in tokens[rank::world].split(micro)]
            loss = strategy.backward(mine, BATCH * MODEL["context"], int)
            gradients = gradient_bytes(strategy)
            strategy.step(lambda norm: Judged(0, torch.zeros(8, dtype=torch.float64, device=norm.device)))
            losses.append(loss)
        sent = dict(traffic.sent)
    total = accelerator.reduce(torch.stack(losses), "sum").tolist()
    counts = torch.tensor([state_bytes(strategy), gradients, sum(sent.values())], dtype=torch.float64)
    everyone = accelerator.gather(counts[None]).tolist()
    weights = collect(strategy)
    result = {
        "row": row,
        "processes": world,
        "losses": total,
        "state_bytes": [int(r[0]) for r in everyone],
        "gradient_bytes": [int(r[1]) for r in everyone],
        "sent_bytes": sum(r[2] for r in everyone) / world,
        "formula_bytes": sum(formula.values()) - formula["agreement"],
        "kinds": sent,
    }
    if accelerator.is_main_process:
        save_file(weights, folder / f"{row}-{world}.safetensors")
    return result


def state_bytes(strategy: Strategy) -> int:
    """Bytes of optimizer state on this rank."""
    return sum(value.nbytes for state in strategy.optimizer.state.values() for value in state.values())


def gradient_bytes(strategy: Strategy) -> int:
    """Bytes of gradients on this rank between the backward pass and the step."""
    zero = getattr(strategy, "zero", None)
    found: list[Tensor] = [local(p.grad) for p in strategy.model.parameters() if p.grad is not None]
    if zero is not None:
        found += [g for group in zero.averaged_gradients.values() for g in group or () if g is not None]
    return sum({g.data_ptr(): g.nbytes for g in found if g.numel()}.values())


def table(worlds: tuple[int, ...] = (1, 2, 4)) -> list[Row]:
    """Start this module on each number of processes and compare everything with one process under DDP.

    Each record also has `loss_difference`, the largest relative one of a step, and `weight_difference`, the largest at the end.
    """
    records: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, "-m", "launch.benchmark.strategies", folder], env=environment, check=True)
            records += json.loads((Path(folder) / f"{world}.json").read_text(encoding="utf-8"))
        reference, weights = records[0], load_file(Path(folder) / "ddp-1.safetensors")
        for record in records:
            own = load_file(Path(folder) / f"{record['row']}-{record['processes']}.safetensors")
            pairs = zip(record["losses"], reference["losses"], strict=True)
            record["loss_difference"] = max(abs(a / b - 1) for a, b in pairs)
            record["weight_difference"] = max((own[name] - value).abs().max().item() for name, value in weights.items())
    return records


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """A row for each strategy and number of processes; bytes of the rank with the most."""
    rows = [{**r, "state": max(r["state_bytes"]), "gradients": max(r["gradient_bytes"])} for r in table()]
    return f"{STEPS} steps; differences from one process", rows


def main(folder: Path) -> int:
    """Measure every row in this process of torchrun and write FOLDER/<processes>.json on the first rank."""
    torch.set_num_threads(1)
    accelerator = make_accelerator(Config())
    results = [measure_row(row, accelerator, folder) for row in ROWS]
    if accelerator.is_main_process:
        (folder / f"{accelerator.num_processes}.json").write_text(json.dumps(results), encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
