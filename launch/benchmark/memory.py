"""`python -m launch.benchmark memory`: peak memory of each rank while a training run starts, makes a step and saves.

Every run is `train.pretrain` itself in processes of torchrun, in a temporary folder, with a model of 300M weights. It makes two
steps of a few tokens, since most optimizers make their state in the first one, an evaluation, which counts to the second step,
and a checkpoint. A phase ends where the run marks its progress. Bytes are the peak of the resident set (RSS) in a phase, minus
what a process has after its imports, when it has found the others; on GPUs also the peak of the allocator. Memory that the run
has freed does not count: glibc would keep much of it, and `GIVE_BACK` makes it return memory at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

import train
from configs.load import load_written
from data.prepare import prepare
from launch.benchmark.measure import Column, Row, table
from launch.command import at_least
from launch.distributed.heartbeat import Heartbeat, RankError, print_error
from launch.distributed.setup import STRATEGIES, make_accelerator
from launch.distributed.strategy import Strategy
from launch.distributed.zero import import_deepspeed
from launch.monitoring.signals import StopSignals
from launch.optimizers.build import optimizer_groups
from launch.planning.activations import activation_elements, loss_elements
from launch.planning.cost import setup_of, workload_of
from launch.planning.memory import peaks_on_cpu
from launch.private import leave
from launch.run.check import check
from launch.run.hooks import Hooks
from launch.run.setup import build_from_config, lock_run
from launch.train_command import EXPECTED_ERRORS

CONFIG: dict[str, dict[str, Any]] = {
    "run": {"name": "memory"},
    "model": {"layers": 21, "width": 1024, "heads": 16, "context": 64, "vocab_size": 32768},  # 298,042,368 weights
    "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 1},
    "log": {"sample_tokens": 0},
    "eval": {"sequences": 1},
}
# Allocations of this size or more leave the process when they are freed. By default glibc raises the limit up to 32 MB, which is
# more than a weight of a block, and keeps what it can reuse: one of four ranks under zero3 then peaks at 4.0 GB in its step, not
# at 3.0.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
STARTS = ("new", "resume", "init")  # a new run; the same again from its checkpoint; another run with its weights
ENDS = ("start", "step", "save")
# What a run marks -> the phase that begins there.
BEGINS = {
    "building the model": "build",
    "sharding model and optimizer": "shard",
    "loading the checkpoint": "load",
    "writing the run's folder": "ready",
}

ROUNDS = None
COLUMNS = (
    Column("strategy", "strategy"),
    Column("processes", "processes", "d"),
    Column("start", "start"),
    Column("phase", "phase"),
    Column("peak", "peak MB, largest", ",.0f"),
    Column("mean_peak", "mean", ",.0f"),
    Column("planned", "planned", ",.0f"),
    Column("rss", "at its end", ",.0f"),
    Column("device", "device MB", ",.0f"),
    Column("seconds", "seconds", ".1f"),
    Column("stall", "stall s", ".2f"),
    Column("written", "MB written, largest", ",.0f"),
    Column("all_written", "by all", ",.0f"),
)


def add_options(parser: ArgumentParser, device: torch.device) -> None:
    """Add strategies, numbers of processes, and options of the run's configuration."""
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["ddp", "fsdp2"])
    parser.add_argument("--processes", nargs="+", type=at_least(1), default=[1, 2])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["new"], help="resume and init follow a new run")
    parser.add_argument("--until", choices=ENDS, default="save", help="how far a new run goes")
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="section.key=value",
        default=[],
        help="options of the run, such as model.layers=4 optimizer.name=adamw",
    )


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """Rows for each strategy and number of processes: one for each phase."""
    rows: list[Row] = []
    starts = ["new", *(start for start in STARTS[1:] if start in args.starts)]
    weights = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.yaml"
        prepare_random_text(folder)
        config.write_text(yaml.safe_dump(CONFIG | {"data": {"dir": str(folder / "data")}}), encoding="utf-8")
        for strategy in args.strategies:
            for world in args.processes:
                run = folder / f"{strategy}-{world}"
                for start in starts:
                    overrides = [*args.set, f"distributed.strategy={strategy}", f"run.dir={run}"]
                    if start == "init":
                        overrides += [f"run.dir={run}-init", f"model.init={run}"]
                    until = "start" if start == "init" else "save" if len(starts) > 1 else args.until
                    load_written(str(config), overrides)  # a mistake in --set fails here, with one line
                    result = folder / "result.json"
                    result.unlink(missing_ok=True)
                    status = launch(world, [str(result), until, str(config), *overrides])
                    of_run: Row = {"strategy": strategy, "processes": world, "start": start}
                    if status or not result.exists():
                        rows.append(of_run | {"phase": f"failed with status {status}"})
                        break
                    found = json.loads(result.read_text(encoding="utf-8"))
                    weights = found["weights"] or weights
                    planned = plan_of(str(config), overrides, world)
                    rows += [of_run | row | {"planned": planned.get(row["phase"])} for row in found["rows"]]
                    print(table(rows[-len(found["rows"]) :], COLUMNS), file=sys.stderr)  # the next one may take minutes
                for path in (run, Path(f"{run}-init")):  # tens of GB
                    shutil.rmtree(path, ignore_errors=True)
    return f"{weights:,} weights; a phase's peak is beyond the imports, whose size is in the row `imports`", rows


def plan_of(config: str, overrides: list[str], world: int) -> dict[str, float]:
    """Megabytes that `--plan` counts, by phase."""
    settings, _ = load_written(config, overrides)
    model, context = build_from_config(settings, settings.model.vocab_size or 0, device="meta")
    groups = optimizer_groups(settings.optimizer, model)
    kept = activation_elements(model, 1, context, settings.model.gradient_checkpointing)
    workload = workload_of(
        model, groups, context, 0.0, kept, loss_elements(model, context * settings.train.micro_batch_size), 0.0
    )
    found = peaks_on_cpu(workload, replace(setup_of(settings, world), cpu=True))
    last = f"step {settings.train.steps}"
    return {"shard": found["start"] / 1e6, last: found["step"] / 1e6, f"save after {last}": found["save"] / 1e6}


def prepare_random_text(folder: Path) -> None:
    """A prepared data set of a few thousand tokens in FOLDER/data."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} of a text. " * 50}) + "\n" for i in range(40)), encoding="utf-8")
    prepare(str(text), folder / "data", tokenizer="bytes", val_fraction=0.2, workers=1, log=lambda line: None)


def launch(world: int, arguments: list[str]) -> int:
    """Start this module on `world` processes; returns the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    environment = {**os.environ, **GIVE_BACK, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world))}
    return subprocess.run(
        [*command, "-m", "launch.benchmark.memory", *arguments], env=environment, stdout=sys.stderr, check=False
    ).returncode


class Resident:
    """The resident set of this process, in bytes, and its peak since `reset`.

    Linux keeps the peak and resets it where /proc/self/clear_refs may be written; elsewhere a thread looks every 5 ms.
    """

    def __init__(self) -> None:
        self.sampled = 0
        try:
            self.reset()
            self.exact = True
        except OSError:
            self.exact = False
            threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.sampled = max(self.sampled, self.now)
            time.sleep(0.005)

    @property
    def now(self) -> int:
        """What is resident now."""
        return status_bytes("VmRSS")

    @property
    def peak(self) -> int:
        """The most since the last `reset`."""
        return status_bytes("VmHWM") if self.exact else max(self.sampled, self.now)

    def reset(self) -> None:
        """Forget the peak."""
        self.sampled = 0
        if getattr(self, "exact", True):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status_bytes(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def bytes_written() -> int:
    """Bytes that this process has sent to disks so far; file systems in memory do not count."""
    with suppress(OSError):  # some containers hide it
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("write_bytes:"):
                return int(line.split()[1])
    return 0


class Phases:
    """The phases of a run on this rank: one row for each that has begun."""

    def __init__(self, device: torch.device, told: bool) -> None:
        """`told`: print a line as each phase ends, since a run may take minutes, or die."""
        self.device, self.told, self.resident = device, told, Resident()
        self.base = self.resident.now
        self.rows: list[Row] = [{"phase": "imports", "peak": self.base / 1e6, "rss": self.base / 1e6, "seconds": 0.0}]
        self.begin("data")

    def begin(self, phase: str) -> None:
        """`phase` begins, and the one before it ends, unless it is the same."""
        if self.rows[-1]["phase"] == phase:
            return
        self.end()
        self.rows.append({"phase": phase})
        self.began, self.written = time.perf_counter(), bytes_written()

    def end(self) -> None:
        """The last phase ends."""
        row = self.rows[-1]
        if row["phase"] != "imports":
            row |= {"peak": (self.resident.peak - self.base) / 1e6, "rss": (self.resident.now - self.base) / 1e6}
            row["seconds"] = time.perf_counter() - self.began
            if row["phase"].startswith("save"):
                row["written"] = (bytes_written() - self.written) / 1e6
            if self.device.type == "cuda":
                row["device"] = torch.cuda.max_memory_allocated(self.device) / 1e6
            if self.told:
                print(f"{row['phase']}: {row['peak']:,.0f} MB on the first rank, {row['seconds']:.1f} s", file=sys.stderr)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.resident.reset()

    def marked(self, text: str) -> None:
        """The run has come to the mark `text`; marks of other names lie within a phase."""
        if text in BEGINS:
            self.begin(BEGINS[text])
        elif text.endswith(": batch loaded"):
            self.begin(text.removesuffix(": batch loaded"))
        elif text.endswith(": saving"):
            self.begin(f"save after {text.removesuffix(': saving')}")

    def copied(self) -> None:
        """A save has its copy and begins to write: training would continue here."""
        self.rows[-1].setdefault("stall", time.perf_counter() - self.began)


class MarkedHeartbeat(Heartbeat):
    """Tells `phases` of every mark."""

    phases: Phases

    def mark(self, text: str, disk: bool = False) -> None:
        """As every heartbeat does."""
        super().mark(text, disk)
        self.phases.marked(text)


class EnoughError(Exception):
    """The run has come as far as it was asked to."""


class PhaseHooks(Hooks):
    """Notes when a save begins to write, and ends the run where `until` says."""

    def __init__(self, phases: Phases, until: str) -> None:
        self.phases, self.until, self.weights = phases, until, 0

    def before_step(self, step: int, strategy: Strategy) -> None:
        """End before the step."""
        self.weights = sum(math.prod(shard.local_shard.shape) for shard in strategy.shards.values())
        if self.until == "start":
            raise EnoughError

    def before_evaluation(self, step: int) -> None:
        """End after the step."""
        if self.until == "step":
            raise EnoughError

    def before_save_phase(self, phase: str) -> None:
        """The copy is done."""
        self.phases.copied()


def main(result: str, until: str, *arguments: str) -> int:
    """One run in this process of torchrun; the first rank writes the rows over all ranks to `result`."""
    with suppress(OSError):  # if memory runs out, the kernel kills these processes and no others
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    config, written = load_written(arguments[0], list(arguments[1:]))
    with StopSignals() as signals:
        accelerator = make_accelerator(config)
        check(config, written, accelerator.num_processes)
        if config.distributed.strategy.startswith("zero"):
            import_deepspeed(accelerator.device)
        phases = Phases(accelerator.device, accelerator.is_main_process)
        hooks = PhaseHooks(phases, until)
        rank, world = accelerator.process_index, accelerator.num_processes
        heartbeat = MarkedHeartbeat(rank, world, config.distributed.timeout, print_error)
        heartbeat.phases = phases
        with heartbeat, lock_run(config, accelerator, heartbeat.mark):
            with suppress(EnoughError):
                train.pretrain(config, accelerator, heartbeat, signals, hooks)
            phases.end()
        everyone: list[Any] = [None] * world
        if world > 1:
            torch.distributed.all_gather_object(everyone, phases.rows)
        else:
            everyone = [phases.rows]
        if accelerator.is_main_process:
            found = {"weights": hooks.weights, "rows": [over_ranks(rows) for rows in zip(*everyone, strict=True)]}
            Path(result).write_text(json.dumps(found), encoding="utf-8")
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return 0


def over_ranks(rows: tuple[Row, ...]) -> Row:
    """The largest number of every kind of the ranks' rows of one phase; the mean peak; what all wrote together."""
    numbers = {key: max(row.get(key, 0) for row in rows) for row in rows for key in row if key != "phase"}
    numbers["mean_peak"] = statistics.mean(row["peak"] for row in rows)
    if "written" in numbers:
        numbers["all_written"] = sum(row["written"] for row in rows)
    return {"phase": rows[0]["phase"], **numbers}


if __name__ == "__main__":
    try:
        status = main(*sys.argv[1:])
    except (*EXPECTED_ERRORS, RankError) as error:
        print_error(str(error))
        status = 2
    leave(status)
