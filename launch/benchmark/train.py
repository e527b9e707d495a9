"""`python -m launch.benchmark train`: a whole training step, made of the parts of `train.py`, compiled and not.

Random tokens replace a corpus; they cost the same. "At 0.5M tokens" is computed, not measured: the time of forward and backward
grows with the tokens, that of the optimizer does not, and a step has 524,288 tokens, as gpt3-125m to -760m are trained.
"""

from __future__ import annotations

import statistics
import time
import warnings
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from configs.schema import Config, Model, Optimizer, Train
from data.batches import Batches, prefetch
from data.shards import TokenShards
from launch.benchmark.measure import TIMES, Column, Row, peak_bytes, summary, synchronize, time_rounds
from launch.command import at_least
from launch.distributed.setup import make_accelerator, make_strategy, peak
from launch.monitoring.guard import Guard
from launch.monitoring.step_statistics import StepStatistics
from models import build_model, flops_per_token

FULL_STEP = 524288  # tokens
PROFILED_STEPS, LARGEST = 3, 15


class Batch(NamedTuple):
    """What a size is measured with."""

    sequences: int
    vocabulary: int


# Sequences of a micro-batch as in configs/; the small one is a quarter of configs/demo.yaml.
BATCHES = {
    "gpt3-mini": Batch(4, 2048),
    "gpt3-125m": Batch(16, 50304),
    "gpt3-350m": Batch(8, 50304),
    "gpt3-760m": Batch(8, 50304),
    "gpt3-1.3b": Batch(4, 50304),
}
DEFAULT_SIZES = {"cpu": ("gpt3-mini",), "cuda": ("gpt3-125m", "gpt3-350m", "gpt3-1.3b")}

ROUNDS = 7
COLUMNS = (
    Column("size", "model"),
    Column("compiled", "compiled"),
    *TIMES,
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("mfu", "MFU", ".3f"),
    Column("optimizer_share", "optimizer", ".1%"),
    Column("full_share", "at 0.5M tokens", ".1%"),
    Column("loading_share", "waiting for data", ".2%"),
    Column("syncs", "host syncs", "d"),
    Column("peak_mib", "peak MiB beyond weights and state", ",.0f"),
    Column("first_seconds", "first step s", ".1f"),
)


class RandomTokens(TokenShards):
    """A split of uniformly random tokens in memory, without a prepared folder."""

    def __init__(self, n_tokens: int, vocab_size: int) -> None:
        self.n_tokens, self.vocab_size, self.eot_id = n_tokens, vocab_size, 0
        self.tokens = np.random.default_rng(0).integers(vocab_size, size=n_tokens, dtype=np.uint16)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop)."""
        return self.tokens[start:stop]


@dataclass
class Trainer:
    """A run as `train.py` sets it up, without folder, evaluation and checkpoints; records what its steps took."""

    config: Config
    batch: Batch
    loading: list[float] = field(default_factory=list)  # s, until the next batch was there
    updating: list[float] = field(default_factory=list)  # s, in the optimizer

    def __post_init__(self) -> None:
        self.accelerator = make_accelerator(self.config)
        torch.manual_seed(0)
        device = self.accelerator.device  # a billion random numbers take half a minute on a CPU
        model = build_model(size=self.config.model.size, vocab_size=self.batch.vocabulary, device=device)
        self.context = model.config.max_position_embeddings
        self.flops = flops_per_token(model, self.context)
        self.strategy = make_strategy(self.config, self.accelerator, model)
        self.device, self.peak = device, peak(self.accelerator)
        self.statistics = StepStatistics(self.strategy.optimizer, [], self.device)
        self.guard = Guard(self.accelerator, self.config.train)
        self.tokens = self.batch.sequences * self.context
        batches = Batches(RandomTokens(64 * self.tokens + 1, self.batch.vocabulary), self.context, self.batch.sequences, seed=0)
        pin = self.device.type == "cuda"
        self.stream = prefetch(batches, 0, 1 << 30, 0, 1, self.batch.sequences, pin_memory=pin)
        self.first_seconds = self.timed_step()

    def step(self) -> None:
        """What the loop of `train.py` does in a step."""
        self.statistics.begin(measure=False)
        start = time.perf_counter()
        with record_function("1 batch"):
            micro_batches = next(self.stream)
        self.loading.append(time.perf_counter() - start)
        with record_function("2 forward and backward"):
            loss = self.strategy.backward(micro_batches, self.tokens, int)
        with record_function("3 clip, judge, update"):
            self.strategy.step(lambda norm: self.guard.judge(0, loss, norm, save=False))
        self.guard.wait(newest=False)
        self.guard.arrived.clear()
        self.updating.append(self.statistics.record()["optimizer_seconds"])

    def timed_step(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        self.step()
        synchronize(self.device)
        return time.perf_counter() - start

    def syncs(self) -> int | None:
        """How often the host waits for the device in a step; None where there is nothing to wait for."""
        if self.device.type != "cuda":
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    def row(self, seconds: list[float]) -> Row:
        """What a line of the table says, from the seconds of a step in every round."""
        updating = statistics.median(self.updating[-len(seconds) :])
        loading = statistics.median(self.loading[-len(seconds) :])
        typical = statistics.median(seconds)
        speed = self.tokens / typical
        full = (typical - updating) * FULL_STEP / self.tokens + updating
        return {
            "size": self.config.model.size,
            "compiled": "yes" if self.config.train.compile else "no",
            **summary(seconds),
            "tokens_per_step": self.tokens,
            "tokens_per_second": speed,
            "mfu": speed * self.flops / self.peak if self.peak else None,
            "optimizer_share": updating / typical,
            "full_share": updating / full,
            "loading_share": loading / typical,
            "syncs": self.syncs(),
            "peak_mib": peak_bytes(self.step, self.device) / 2**20,
            "first_seconds": self.first_seconds,
        }


def make_trainer(size: str, compiled: bool, device: torch.device, sequences: int | None) -> Trainer:
    """A run of `size` in bfloat16 on a GPU and in float32 on the CPU; `sequences` replaces those of its micro-batch."""
    batch = BATCHES[size] if sequences is None else BATCHES[size]._replace(sequences=sequences)
    config = Config(
        model=Model(size=size),
        optimizer=Optimizer(name="celo2", lr=1e-4),
        train=Train(
            batch_size=batch.sequences,
            micro_batch_size=batch.sequences,
            precision="bf16" if device.type == "cuda" else "fp32",
            compile=compiled,
        ),
    )
    return Trainer(config, batch)


def add_options(command: ArgumentParser, device: torch.device) -> None:
    """Add the sizes; the default ones suit `device`."""
    known, default = list(BATCHES), DEFAULT_SIZES[device.type]
    command.add_argument("--sizes", nargs="+", choices=known, default=default, metavar="SIZE", help=", ".join(known))
    command.add_argument(
        "--micro-batch-size", type=at_least(1), metavar="N", help="sequences in a micro-batch, instead of the size's default"
    )
    command.add_argument("--profile", metavar="FILE", help="file for a profile of a step")


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """Two rows for each size, not compiled and compiled, in turns; and a profile of the first."""
    rows = []
    for size in args.sizes:
        trainers = {compiled: make_trainer(size, compiled, device, args.micro_batch_size) for compiled in (False, True)}
        seconds = time_rounds({str(compiled): trainer.step for compiled, trainer in trainers.items()}, args.rounds, device)
        rows += [trainer.row(seconds[str(compiled)]) for compiled, trainer in trainers.items()]
        if args.profile is not None and size == args.sizes[0]:
            Path(args.profile).write_text(profile_steps(trainers[False]), encoding="utf-8")
        for trainer in trainers.values():
            trainer.stream.close()
        del trainers, trainer  # two models of the next size would not fit beside these
    batches = ", ".join(f"{size} {args.micro_batch_size or BATCHES[size].sequences} sequences" for size in args.sizes)
    return f"one micro-batch a step: {batches}", rows


def profile_steps(trainer: Trainer) -> str:
    """A table of the operations that take most of a step's time, without the operations that they call."""
    cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as recorded:
        for _ in range(PROFILED_STEPS):
            trainer.step()
        synchronize(trainer.device)
    largest = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages = recorded.key_averages()
    milliseconds = {e.key: e.cpu_time_total / PROFILED_STEPS / 1e3 for e in averages if e.key[:2] in ("1 ", "2 ", "3 ")}
    parts = "\n".join(f"{name}: {time:,.1f} ms of the host" for name, time in sorted(milliseconds.items()))
    return f"{PROFILED_STEPS} steps\n{parts}\n\n{averages.table(sort_by=largest, row_limit=LARGEST)}\n"
