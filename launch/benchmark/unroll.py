"""`python -m launch.benchmark unroll`: an outer iteration of meta-training at the published size, 64 unrolls of 50 steps."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from celo2.metatrain.config import Config
from celo2.metatrain.tasks import CLASSES, SIDE, Images
from celo2.metatrain.train import MetaTraining
from launch.benchmark.measure import TIMES, Column, Row, environment, summary, time_rounds

EXAMPLES = 1000  # of each of the published four data sets; random pixels take as long as real ones
COLUMNS = (Column("engine", "engine"), *TIMES)


def random_images(names: list[str]) -> Images:
    """Data sets of the right form."""
    random, count = np.random.default_rng(0), EXAMPLES * len(names)
    pixels = random.standard_normal((count, SIDE * SIDE), np.float32)
    starts = np.arange(len(names)) * EXAMPLES
    return Images(pixels, random.integers(CLASSES, size=count), starts, np.full(len(names), EXAMPLES), tuple(names))


def measure_unrolls(rounds: int, device: torch.device) -> Row:
    """A row for each engine that runs on `device`."""
    engines = ["plain"]
    if device.type == "cpu" and importlib.util.find_spec("numba"):
        engines.append("fast")
    steps = {}
    for engine in engines:
        config = Config(engine=engine, device=device.type)
        steps[engine] = MetaTraining(config, random_images(config.tasks)).step
    seconds = time_rounds(steps, rounds, device)
    rows = [{"engine": name, **summary(values)} for name, values in seconds.items()]
    return {**environment(device, rounds), "note": "64 unrolls x 50 steps", "rows": rows}
