"""Inner problems: which network, how long, how scaled, on which data. Everything random is a pure function of the seed.

Problem n runs episodes, one after the other. An episode has a length L, a scale s and initial weights that depend on
(seed, n, episode); the data of a truncation depend on (seed, iteration, n). So a resumed run repeats exactly, threads do not
matter, and both signs of a problem see the same.

Legend: N inner problems, T steps of a truncation, B examples of a batch, U = 2N unrolls (+ε and -ε of each problem in turn).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from celo2.metatrain.config import Config
from celo2.metatrain.tasks import CLASSES, SIDE, Images

HIDDEN = 32
SHAPES = {"w1": (SIDE * SIDE, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, CLASSES), "b2": (CLASSES,)}
EPISODE, DATA, NOISE, START = range(4)  # purposes of random numbers: no two share a stream

Weights = dict[str, np.ndarray]


def random(seed: int, purpose: int, *counters: int) -> np.random.Generator:
    """The stream of random numbers for one purpose at one place, independent of every other."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, *counters])))


def log_uniform(rng: np.random.Generator, low: float, high: float, size: tuple[int, ...] = ()) -> np.ndarray:
    """Samples whose logarithms are uniform between those of low and high."""
    return np.exp(rng.uniform(math.log(low), math.log(high), size))


@dataclass(frozen=True)
class Episode:
    """One inner problem: length in steps, the scale of each weight, and weights as the optimizer sees them (w / s)."""

    length: int
    scale: Weights
    weights: Weights


def draw_episode(config: Config, problem: int, episode: int) -> Episode:
    """The episode of (seed, problem, episode). Weights: normal within two deviations of 1 / sqrt(fan-in); biases zero."""
    rng = random(config.seed, EPISODE, problem, episode)
    length = round(float(log_uniform(rng, config.min_length, config.max_length)))
    shared = log_uniform(rng, config.min_scale, config.max_scale)
    scale, weights = {}, {}
    for name, shape in SHAPES.items():
        if config.reparametrization == "parameter":
            s = log_uniform(rng, config.min_scale, config.max_scale, shape)
        elif config.reparametrization == "tensor":
            s = log_uniform(rng, config.min_scale, config.max_scale)
        else:
            s = shared if config.reparametrization == "global" else 1.0
        scale[name] = np.broadcast_to(np.float32(s), shape)
        w = truncated_normal(rng, shape) / math.sqrt(shape[0]) if len(shape) == 2 else np.zeros(shape)
        weights[name] = (w / s).astype(np.float32)
    return Episode(length, scale, weights)


def truncated_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal samples, drawn again while beyond two standard deviations."""
    x = rng.standard_normal(shape)
    while (far := np.abs(x) > 2).any():
        x[far] = rng.standard_normal(int(far.sum()))
    return x


@dataclass(frozen=True)
class Truncation:
    """What T steps of all problems need, beside weights and rule.

    Attributes:
        rows: (N, T, B) int64, the examples of each step.
        reset_at: (N,) int64, the step before which a problem starts anew; T: not in this truncation.
        fresh: weights (N, *shape) from there on; scale_before, scale_after: the scales s (N, *shape) until and from there.
    """

    rows: np.ndarray
    reset_at: np.ndarray
    fresh: Weights
    scale_before: Weights
    scale_after: Weights


@dataclass
class Problems:
    """Where every problem stands: its task, episode, age in steps and length (N,), and its scales (N, *shape)."""

    config: Config
    data: Images
    task: np.ndarray = field(init=False)
    episode: np.ndarray = field(init=False)
    age: np.ndarray = field(init=False)
    length: np.ndarray = field(init=False)
    scale: Weights = field(init=False)
    first: Weights = field(init=False)

    def __post_init__(self) -> None:
        """All problems at their first episode, at ages drawn between 0 and its length, so that they do not end together."""
        tasks = len(self.data.names)
        count = tasks * self.config.problems_per_task
        self.task = np.repeat(np.arange(tasks), self.config.problems_per_task)
        self.episode = np.zeros(count, np.int64)
        episodes = [draw_episode(self.config, n, 0) for n in range(count)]
        self.length = np.array([e.length for e in episodes])
        self.age = np.array([random(self.config.seed, START, n).integers(self.length[n]) for n in range(count)])
        self.scale = stacked([e.scale for e in episodes])
        self.first = stacked([e.weights for e in episodes])

    def truncation(self, iteration: int) -> Truncation:
        """The next T steps; moves every problem past them."""
        config, steps = self.config, self.config.truncation
        count = len(self.task)
        rows = np.empty((count, steps, config.batch_size), np.int64)
        for n, task in enumerate(self.task):
            drawn = random(config.seed, DATA, iteration, n).integers(self.data.counts[task], size=rows.shape[1:])
            rows[n] = self.data.starts[task] + drawn
        left = self.length - self.age
        reset_at = np.where(left < steps, left, steps)
        before = self.scale
        after = {name: s.copy() for name, s in before.items()}
        fresh = {name: np.zeros_like(s) for name, s in before.items()}
        self.age = self.age + steps
        for n in np.flatnonzero(left < steps):
            self.episode[n] += 1
            episode = draw_episode(config, int(n), int(self.episode[n]))
            self.length[n], self.age[n] = episode.length, steps - left[n]
            for name in SHAPES:
                after[name][n], fresh[name][n] = episode.scale[name], episode.weights[name]
        self.scale = after
        return Truncation(rows, reset_at, fresh, before, after)


def stacked(weights: list[Weights]) -> Weights:
    """Weights of many problems (N, *shape) from one mapping each."""
    return {name: np.stack([w[name] for w in weights]) for name in weights[0]}
