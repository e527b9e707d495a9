"""Inner problems: how long, how scaled, on which data. Everything random is a pure function of the seed.

Problem n runs episodes, one after the other. An episode has a length L, a scale s and initial weights that depend on
(seed, n, episode); the data of a truncation depend on (seed, iteration, n). So a resumed training run repeats exactly, the
number of threads does not matter, and both signs of a problem see the same data.

Legend: N inner problems, T steps of a truncation, B examples of a batch, U = 2N unrolls (+ε and -ε of each problem in turn).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from celo2.metatrain.config import Config
from celo2.metatrain.families import Arrays, Family
from celo2.training.schedule import cosine

WARM_UP, FINAL = 0.05, 0.1  # of a cosine schedule: shares of its steps and of the peak learning rate
EPISODE, DATA, NOISE, START = range(4)  # purposes of random numbers: no two share a stream


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
    scale: Arrays
    weights: Arrays


def draw_episode(config: Config, family: Family, problem: int, episode: int) -> Episode:
    """The episode of (seed, problem, episode)."""
    low, high = family.options.min_scale, family.options.max_scale
    rng = random(config.run.seed, EPISODE, problem, episode)
    length = round(float(log_uniform(rng, config.inner.min_length, config.inner.max_length)))
    shared = log_uniform(rng, low, high)
    scale, weights = {}, {}
    sharing = config.inner.reparametrization
    s: np.ndarray | float
    for name, shape in family.shapes.items():
        if sharing == "parameter":
            s = log_uniform(rng, low, high, shape)
        elif sharing == "tensor":
            s = log_uniform(rng, low, high)
        else:
            s = shared if sharing == "global" else 1.0
        scale[name] = np.broadcast_to(np.float32(s), shape)
        weights[name] = (family.draw(rng, name, shape) / s).astype(np.float32)
    return Episode(length, scale, weights)


def warm_up_and_cosine(age: int, length: int) -> float:
    """The factor on learning rates at step `age` (from 0) of `length`: linear warm-up, then a cosine down to a tenth."""
    warm_up = max(1, round(WARM_UP * length))
    if age < warm_up:
        return (age + 1) / warm_up
    return cosine((age - warm_up) / max(1, length - warm_up), FINAL)


@dataclass(frozen=True)
class Truncation:
    """What T steps of all problems need, beside weights and rule.

    Attributes:
        rows: (N, T, B) int64, the examples of each step: images, or the first bytes of sequences.
        rate: (N, T) float32, what multiplies the inner learning rates.
        reset_at: (N,) int64, the step before which a problem starts again; T: not in this truncation.
        fresh: weights (N, *shape) from there on; scale_before, scale_after: the scales s (N, *shape) until and from there.
    """

    rows: np.ndarray
    rate: np.ndarray
    reset_at: np.ndarray
    fresh: Arrays
    scale_before: Arrays
    scale_after: Arrays


class Problems:
    """Where every problem of a family stands, and the state of its two unrolls.

    Attributes:
        number, task: (N,), of each problem among the problems of all families (random numbers depend on it), and its task.
        episode, age, length: (N,), its episode, the steps it has done of it, and those it has in all.
        scale: the scales s (N, *shape) of its weights.
        state: weights and accumulators of the unrolls (U, ...), which an engine moves.
    """

    def __init__(self, config: Config, family: Family, first_number: int = 0) -> None:
        """All problems at their first episode: at ages below its length, drawn so that they do not end together, or at 0."""
        self.config, self.family = config, family
        tasks = len(family.data.names)
        self.task = np.repeat(np.arange(tasks), config.tasks.problems)
        self.number = first_number + np.arange(len(self.task))
        self.episode = np.zeros(len(self.task), np.int64)
        episodes = [draw_episode(config, family, int(n), 0) for n in self.number]
        self.length = np.array([e.length for e in episodes])
        starts = [random(config.run.seed, START, int(n)) for n in self.number]
        self.age = np.array([rng.integers(length) for rng, length in zip(starts, self.length, strict=True)])
        self.age *= config.inner.staggered
        self.scale = stacked([e.scale for e in episodes])
        self.state = family.initial_state(stacked([e.weights for e in episodes]))

    def tensors(self) -> Arrays:
        """What a checkpoint holds of them, by name."""
        arrays = {"problems.episode": self.episode, "problems.age": self.age, "problems.length": self.length}
        arrays |= {f"scale.{name}": x for name, x in self.scale.items()}
        arrays |= {f"state.{key}": x for key, x in self.state.items()}
        return {f"{self.family.data.kind}.{key}": x for key, x in arrays.items()}

    def truncation(self, iteration: int) -> Truncation:
        """The next T steps; moves every problem past them."""
        config, family, steps = self.config, self.family, self.config.inner.truncation
        rows = np.empty((len(self.task), steps, family.batch), np.int64)
        rate = np.empty((len(self.task), steps), np.float32)
        reset_at = np.minimum(self.length - self.age, steps)
        before = self.scale
        after = {name: s.copy() for name, s in before.items()}
        fresh = {name: np.zeros_like(s) for name, s in before.items()}
        for n, task in enumerate(self.task):
            rng = random(config.run.seed, DATA, iteration, int(self.number[n]))
            rows[n] = family.data.starts[task] + rng.integers(family.data.counts[task], size=rows.shape[1:])
            reset = int(reset_at[n])
            rate[n, :reset] = self.rates(n, reset)
            if reset < steps:
                self.restart(n, after, fresh)
                rate[n, reset:] = self.rates(n, steps - reset)
        self.scale = after
        return Truncation(rows, rate, reset_at, fresh, before, after)

    def rates(self, n: int, count: int) -> list[float]:
        """The factors on the learning rates of problem n in its next `count` steps; moves it past them."""
        first, length = int(self.age[n]), int(self.length[n])
        self.age[n] += count
        if self.config.inner.schedule == "constant":
            return [1.0] * count
        return [warm_up_and_cosine(age, length) for age in range(first, first + count)]

    def restart(self, n: int, scale: Arrays, weights: Arrays) -> None:
        """Problem n starts its next episode: writes its scales and weights into those of all problems (N, *shape)."""
        self.episode[n] += 1
        episode = draw_episode(self.config, self.family, int(self.number[n]), int(self.episode[n]))
        self.length[n], self.age[n] = episode.length, 0
        for name in self.family.shapes:
            scale[name][n], weights[name][n] = episode.scale[name], episode.weights[name]


def stacked(weights: list[Arrays]) -> Arrays:
    """Weights of many problems (N, *shape) from one mapping each."""
    return {name: np.stack([w[name] for w in weights]) for name in weights[0]}
