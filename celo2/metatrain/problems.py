"""Inner problems: how long, how scaled, on which data. Everything random is a pure function of the seed.

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
from celo2.metatrain.families import Family

WARM_UP, FINAL = 0.05, 0.1  # of inner_schedule cosine: shares of an episode and of the learning rate
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


def draw_episode(config: Config, family: Family, problem: int, episode: int) -> Episode:
    """The episode of (seed, problem, episode)."""
    low, high = family.scales
    rng = random(config.seed, EPISODE, problem, episode)
    length = round(float(log_uniform(rng, config.min_length, config.max_length)))
    shared = log_uniform(rng, low, high)
    scale, weights = {}, {}
    for name, shape in family.shapes.items():
        if config.reparametrization == "parameter":
            s = log_uniform(rng, low, high, shape)
        elif config.reparametrization == "tensor":
            s = log_uniform(rng, low, high)
        else:
            s = shared if config.reparametrization == "global" else 1.0
        scale[name] = np.broadcast_to(np.float32(s), shape)
        weights[name] = (family.draw(rng, name, shape) / s).astype(np.float32)
    return Episode(length, scale, weights)


def cosine(age: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The factor on the learning rates at `age` steps into episodes of `length`: linear warm-up, then a cosine to a tenth."""
    warm_up = np.maximum(1, np.round(WARM_UP * length))
    angle = np.pi * (age - warm_up) / np.maximum(1, length - warm_up)
    return np.where(age < warm_up, (age + 1) / warm_up, FINAL + (1 - FINAL) * 0.5 * (1 + np.cos(angle)))


@dataclass(frozen=True)
class Truncation:
    """What T steps of all problems need, beside weights and rule.

    Attributes:
        rows: (N, T, B) int64, the examples of each step: images, or the first bytes of sequences.
        rate: (N, T) float32, what multiplies the inner learning rates.
        reset_at: (N,) int64, the step before which a problem starts anew; T: not in this truncation.
        fresh: weights (N, *shape) from there on; scale_before, scale_after: the scales s (N, *shape) until and from there.
    """

    rows: np.ndarray
    rate: np.ndarray
    reset_at: np.ndarray
    fresh: Weights
    scale_before: Weights
    scale_after: Weights


@dataclass
class Problems:
    """Where every problem of a family stands: task, episode, age in steps and length (N,), and its scales (N, *shape).

    `first_number` is the number of the first of them among the problems of all families, on which random numbers depend.
    """

    config: Config
    family: Family
    first_number: int = 0
    number: np.ndarray = field(init=False)
    task: np.ndarray = field(init=False)
    episode: np.ndarray = field(init=False)
    age: np.ndarray = field(init=False)
    length: np.ndarray = field(init=False)
    scale: Weights = field(init=False)
    first: Weights = field(init=False)

    def __post_init__(self) -> None:
        """All problems at their first episode: at ages below its length, drawn so that they do not end together, or at 0."""
        tasks = len(self.family.data.names)
        count = tasks * self.config.problems_per_task
        self.number = self.first_number + np.arange(count)
        self.task = np.repeat(np.arange(tasks), self.config.problems_per_task)
        self.episode = np.zeros(count, np.int64)
        episodes = [draw_episode(self.config, self.family, int(n), 0) for n in self.number]
        self.length = np.array([e.length for e in episodes])
        starts = [random(self.config.seed, START, int(n)) for n in self.number]
        self.age = np.array([rng.integers(length) for rng, length in zip(starts, self.length, strict=True)])
        self.age *= self.config.staggered
        self.scale = stacked([e.scale for e in episodes])
        self.first = stacked([e.weights for e in episodes])

    def truncation(self, iteration: int) -> Truncation:
        """The next T steps; moves every problem past them."""
        config, family, steps = self.config, self.family, self.config.truncation
        rows = np.empty((len(self.task), steps, family.batch), np.int64)
        for n, task in enumerate(self.task):
            rng = random(config.seed, DATA, iteration, int(self.number[n]))
            rows[n] = family.data.starts[task] + rng.integers(family.data.counts[task], size=rows.shape[1:])
        left = self.length - self.age
        reset_at = np.where(left < steps, left, steps)
        before = self.scale
        after = {name: s.copy() for name, s in before.items()}
        fresh = {name: np.zeros_like(s) for name, s in before.items()}
        age, length = self.age, self.length
        self.age, self.length = age + steps, length.copy()
        for n in np.flatnonzero(left < steps):
            self.episode[n] += 1
            episode = draw_episode(config, family, int(self.number[n]), int(self.episode[n]))
            self.length[n], self.age[n] = episode.length, steps - left[n]
            for name in family.shapes:
                after[name][n], fresh[name][n] = episode.scale[name], episode.weights[name]
        self.scale = after
        t = np.arange(steps)
        is_new = t >= reset_at[:, None]
        ages = np.where(is_new, t - reset_at[:, None], age[:, None] + t)
        lengths = np.where(is_new, self.length[:, None], length[:, None])
        rate = cosine(ages, lengths) if config.inner_schedule == "cosine" else np.ones(ages.shape)
        return Truncation(rows, rate.astype(np.float32), reset_at, fresh, before, after)


def stacked(weights: list[Weights]) -> Weights:
    """Weights of many problems (N, *shape) from one mapping each."""
    return {name: np.stack([w[name] for w in weights]) for name in weights[0]}
