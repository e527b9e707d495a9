"""`python -m launch.benchmark options CONFIG [KEY=VALUE ...]`: what the options of a training run cost in each step.

Short training runs of `train.py` itself take turns, with an option and without, in another order in each round. The table shows
CPU seconds of the whole process, on which other work on the machine has less influence. An option of evaluations is compared with
a run that evaluates as often without it.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import random
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

import train
from configs.load import ConfigError, load_config
from launch.benchmark.measure import Column, Row
from launch.distributed.strategy import Strategy
from launch.run.hooks import Hooks

ROUNDS = 5
STEPS, BEFORE = 8, 3  # of a run, and the first ones, which do not count
OFTEN = "eval.every=4"  # one evaluation among the steps that count
QUIET = ("log.every=1000", "log.sample_tokens=0", "eval.every=0", "checkpoint.every=0", f"train.steps={STEPS}")
COLUMNS = (
    Column("name", "option"),
    Column("against", "compared with"),
    Column("seconds", "CPU s a step", ".3f"),
    Column("ratio", "ratio, median", ".3f"),
    Column("lowest", "lowest", ".3f"),
    Column("highest", "highest", ".3f"),
)


class Clock(Hooks):
    """CPU seconds of the process at the beginning of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def before_step(self, step: int, strategy: Strategy) -> None:
        """Look at the clock."""
        self.seconds.append(time.process_time())

    def step(self) -> float:
        """CPU seconds of a step, the mean of those that count."""
        return (self.seconds[-1] - self.seconds[BEFORE]) / (STEPS - 1 - BEFORE)


def contestants(data: str, batch: int) -> dict[str, tuple[str, list[str]]]:
    """By name: the contestant that it is compared with, and its options. `data`: the path of the data folder."""
    data = json.dumps(data, ensure_ascii=False)  # within YAML a path may need its quotes
    alone = {
        "log.every=1": ["log.every=1"],
        "log.layers=1": ["log.layers=1"],
        "train.average, ema": ["train.average={kind: ema}"],
        "train.average, tail": ["train.average={kind: tail, fraction: 1}"],
        "train.deterministic": ["train.deterministic=true"],
        "train.ramp": [f"train.ramp={{2: {batch}}}"],
        "data.mix": ["data.dir=null", f"data.mix=[{{dir: {data}, weight: 1}}]"],
        "model.gradient_checkpointing=operations": ["model.gradient_checkpointing=operations"],
        "model.gradient_checkpointing=true": ["model.gradient_checkpointing=true"],
        OFTEN: [OFTEN],
    }
    evaluating = {
        "eval.sets, one more": [f"eval.sets={{more: {data}}}"],
        "eval.tasks, 20 questions": ["eval.tasks={python: configs/tasks/python.jsonl}"],
        "train.average, evaluated": ["train.average={kind: ema}"],
    }
    found = {name: ("none", options) for name, options in alone.items()}
    found["log.trackers=[tensorboard]"] = ("log.every=1", ["log.every=1", "log.trackers=[tensorboard]"])
    return {"none": ("none", [])} | found | {name: (OFTEN, [OFTEN, *options]) for name, options in evaluating.items()}


def add_options(command: ArgumentParser, device: torch.device) -> None:
    """Add the configuration."""
    command.add_argument("config", help="a YAML file, such as configs/demo.yaml")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """A row for each option."""
    config = load_config(args.config, args.overrides)
    if config.data.dir is None:
        raise ConfigError("benchmark options makes mixtures of its own: give data.dir, not data.mix")
    compared = contestants(str(config.data.dir), config.train.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for number in range(args.rounds):
        order = list(compared)
        random.Random(number).shuffle(order)  # a run may be slower because of the one before it
        for name in order:
            seconds[name].append(step_seconds([args.config, *args.overrides, *QUIET, *compared[name][1]]))
    rows = []
    for name, (against, _) in compared.items():
        ratios = [own / other for own, other in zip(seconds[name], seconds[against], strict=True)]
        row = {"name": name, "against": against, "seconds": statistics.median(seconds[name])}
        rows.append(row | {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)})
    return f"{STEPS - 1 - BEFORE} steps of {args.config} in each round", rows


def step_seconds(arguments: list[str]) -> float:
    """CPU seconds of a step of train.py with these arguments. Raises ConfigError with its message if it fails."""
    clock, output = Clock(), io.StringIO()
    gc.collect()  # of the run before
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = train.main([*arguments, f"run.dir={Path(folder) / 'run'}"], clock)
    if status != 0:
        raise ConfigError(output.getvalue().strip().splitlines()[-1].removeprefix("error: "))
    return clock.step()
