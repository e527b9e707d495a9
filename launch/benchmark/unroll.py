"""`python -m launch.benchmark unroll`: an outer iteration of meta-training at the published size, 64 unrolls of 50 steps.

On a GPU, also an iteration of 2,048 unrolls: 3,125 of them have as many inner steps as the published 100,000 iterations.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace

import numpy as np
import torch

from celo2.metatrain.config import Config, Engine, Tasks
from celo2.metatrain.tasks import CLASSES, SIDE, Data
from celo2.metatrain.train import PESTraining
from launch.benchmark.measure import TIMES, Column, Row, summary, time_rounds

EXAMPLES = 1000  # of each of the published four data sets; random pixels take as long as real ones
PUBLISHED_ITERATIONS, PUBLISHED_UNROLLS = 100_000, 64
MANY = 32  # times the published unrolls
ROUNDS = 7
COLUMNS = (Column("engine", "engine"), Column("unrolls", "unrolls", ",d"), *TIMES, Column("hours", "hours for all", ".2f"))


def random_images(names: list[str]) -> Data:
    """Data sets of random images, in the form that meta-training expects."""
    random, count = np.random.default_rng(0), EXAMPLES * len(names)
    pixels = random.standard_normal((count, SIDE * SIDE), np.float32)
    starts = np.arange(len(names)) * EXAMPLES
    labels = random.integers(CLASSES, size=count)
    return Data("images", (pixels, labels), starts, np.full(len(names), EXAMPLES), tuple(names))


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """A row for each engine that runs on `device`."""
    configs = {"plain": Config(engine=Engine("plain", device.type))}
    if device.type == "cpu" and importlib.util.find_spec("numba"):
        configs["fast"] = Config(engine=Engine("fast"))
    if device.type == "cuda":
        many = Tasks(problems=MANY * Tasks().problems)
        configs["plain, many"] = Config(tasks=many, engine=Engine("plain", "cuda"))
    found = {name: PESTraining(config, random_images(config.tasks.sources)) for name, config in configs.items()}
    seconds = time_rounds({name: training.step for name, training in found.items()}, args.rounds, device)
    rows = []
    for name, values in seconds.items():
        row = {"engine": name, "unrolls": len(found[name].xi) * 2, **summary(values)}
        iterations = PUBLISHED_ITERATIONS * PUBLISHED_UNROLLS / row["unrolls"]
        rows.append(row | {"hours": row["ms"] * iterations / 3.6e6})
    return "50 steps; all: the published amount of inner steps", rows
