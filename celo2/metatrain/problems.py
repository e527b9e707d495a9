"""Inner problems: their lengths, scales and data. Everything random is a pure function of the seed.

Problem n runs episodes, one after the other. An episode has a length L, a scale s and initial weights that depend on
(seed, n, episode); the data of a truncation depend on (seed, iteration, n). So a resumed training run repeats exactly, the
number of threads does not matter, and both signs of a problem see the same data.

Legend: N inner problems, T steps of a truncation, B examples of a batch, U unrolls (those of each problem in turn; with PES, +ε
and -ε), D numbers that the search varies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from celo2.metatrain.config import Config, theta_size
from celo2.metatrain.families import Arrays, Family
from celo2.training.schedule import cosine

WARM_UP, FINAL = 0.05, 0.1  # of a cosine schedule: share of its steps, and share of the peak learning rate
EPISODE, DATA, NOISE, START, RESUME = range(5)  # purposes of random numbers: no two share a stream


def random(seed: int, purpose: int, *counters: int) -> np.random.Generator:
    """The stream of random numbers for one purpose at one place, independent of every other."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, *counters])))


def log_uniform(rng: np.random.Generator, low: float, high: float, size: tuple[int, ...] = ()) -> np.ndarray:
    """Samples that are log-uniform between low and high."""
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


def warm_up_and_cosine(age: int, length: int, final: float = FINAL) -> float:
    """The factor on learning rates at step `age` (from 0) of `length`: linear warm-up, then a cosine down to `final`."""
    warm_up = max(1, round(WARM_UP * length))
    if age < warm_up:
        return (age + 1) / warm_up
    return cosine((age - warm_up) / max(1, length - warm_up), final)


@dataclass(frozen=True)
class Truncation:
    """What T steps of all problems need beside weights and rule.

    Attributes:
        rows: (N, T, B) int64, the examples of each step: images, or the first bytes of sequences.
        rate: (N, T) float32, factors on the inner learning rates.
        reset_at: (N,) int64, the step before which a problem starts again; T: not in this truncation.
        fresh: the state (U, ...) after the reset; scale_before, scale_after: the scales s (N, *shape) before and after it.
        xi: (N, D) the sum of ε of the late state that a problem resumes at the reset, zero for one that starts anew; or None.
        steps: (N,) int64, the steps of each problem; losses after them mean nothing. None: T.
    """

    rows: np.ndarray
    rate: np.ndarray
    reset_at: np.ndarray
    fresh: Arrays
    scale_before: Arrays
    scale_after: Arrays
    xi: np.ndarray | None = None
    steps: np.ndarray | None = None


@dataclass(frozen=True)
class LateStates:
    """States near the ends of episodes, from which problems that end may resume (ELO, arXiv 2607.06772).

    Attributes:
        count: (N,) int64, the number of states that each problem has put in; the last S are kept.
        slots: (N, S, ...) of each array of a problem, by name.
    """

    count: np.ndarray
    slots: Arrays

    @classmethod
    def of(cls, arrays: Arrays, slots: int) -> LateStates:
        """Empty slots for arrays (N, ...)."""
        n = len(next(iter(arrays.values())))
        return cls(np.zeros(n, np.int64), {key: np.zeros((n, slots, *x.shape[1:]), x.dtype) for key, x in arrays.items()})

    def put(self, n: int, arrays: Arrays) -> None:
        """Add the state of problem n, in place of its oldest one if all slots are taken."""
        for key, slots in self.slots.items():
            slots[n, self.count[n] % slots.shape[1]] = arrays[key][n]
        self.count[n] += 1

    def one_of(self, n: int, rng: np.random.Generator) -> Arrays:
        """A state of problem n, which has at least one."""
        slot = rng.integers(min(self.count[n], next(iter(self.slots.values())).shape[1]))
        return {key: slots[n, slot] for key, slots in self.slots.items()}


class Problems:
    """The progress of every problem of a family, and the state of its two unrolls.

    Attributes:
        number, task: (N,), of each problem among the problems of all families (random numbers depend on it), and its task.
        episode, age, length: (N,), its episode, the steps done in it, and its length in steps.
        scale: the scales s (N, *shape) of its weights.
        state: weights and accumulators of the unrolls (U, ...), which an engine updates.
        late: states from which ended problems may resume, or None.
    """

    def __init__(self, config: Config, family: Family, first_number: int = 0) -> None:
        """All problems in their first episode, at random ages below its length, so that they do not end together, or at age 0."""
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
        self.late = LateStates.of(self.position(None), config.inner.saved) if config.inner.restart < 1 else None

    def position(self, xi: np.ndarray | None) -> Arrays:
        """The progress of all problems and the sums of ε (N, D) so far: the arrays (N, ...) of a late state."""
        arrays = {"age": self.age, "xi": np.zeros((len(self.task), theta_size(self.config))) if xi is None else xi}
        arrays |= {f"scale.{name}": x for name, x in self.scale.items()}
        return arrays | {f"state.{key}": x.reshape(len(self.task), 2, *x.shape[1:]) for key, x in self.state.items()}

    def tensors(self) -> Arrays:
        """The arrays of the problems that a checkpoint holds, by name."""
        arrays = {"problems.episode": self.episode, "problems.age": self.age, "problems.length": self.length}
        arrays |= {f"scale.{name}": x for name, x in self.scale.items()}
        arrays |= {f"state.{key}": x for key, x in self.state.items()}
        if self.late is not None:
            arrays |= {"late.count": self.late.count} | {f"late.{key}": x for key, x in self.late.slots.items()}
        return {f"{self.family.name}.{key}": x for key, x in arrays.items()}

    def truncation(self, iteration: int, xi: np.ndarray | None = None) -> Truncation:
        """The next T steps; moves every problem past them. xi: (N, D), the sums of ε so far, for late states."""
        config, family, steps = self.config, self.family, self.config.inner.truncation
        rows = np.empty((len(self.task), steps, family.batch), np.int64)
        rate = np.empty((len(self.task), steps), np.float32)
        reset_at = np.minimum(self.length - self.age, steps)
        before = self.scale
        after = {name: s.copy() for name, s in before.items()}
        fresh = {key: np.zeros_like(x) for key, x in self.state.items()}
        xi_after = None if self.late is None else np.zeros((len(self.task), theta_size(config)))
        position = None if self.late is None else self.position(xi) | {"age": self.age.copy()}
        for n, task in enumerate(self.task):
            rng = random(config.run.seed, DATA, iteration, int(self.number[n]))
            rows[n] = family.data.starts[task] + rng.integers(family.data.counts[task], size=rows.shape[1:])
            reset = int(reset_at[n])
            rate[n, :reset] = self.rates(n, reset)
            if reset < steps:
                resumed = self.restart(n, after, fresh)
                if self.late is not None and position is not None and xi_after is not None:
                    xi_after[n] = 0 if resumed is None else resumed
                    self.late.put(n, position)
                rate[n, reset:] = self.rates(n, steps - reset)
        self.scale = after
        return Truncation(rows, rate, reset_at, fresh, before, after, xi_after)

    def rates(self, n: int, count: int) -> list[float]:
        """The factors on the learning rates of problem n in its next `count` steps; moves it past them."""
        first, length = int(self.age[n]), int(self.length[n])
        self.age[n] += count
        if self.config.inner.schedule == "constant":
            return [1.0] * count
        return [warm_up_and_cosine(age, length, self.config.inner.final) for age in range(first, first + count)]

    def restart(self, n: int, scale: Arrays, state: Arrays) -> np.ndarray | None:
        """Start the next episode of problem n, or resume it from a late state; returns that state's sum of ε (D,), or None.

        Writes its scales into those of all problems (N, *shape), and its weights and accumulators into `state` (U, ...).
        """
        self.episode[n] += 1
        number, count = int(self.number[n]), int(self.episode[n])
        episode = draw_episode(self.config, self.family, number, count)
        self.length[n], self.age[n] = episode.length, 0
        if self.late is not None and self.late.count[n]:
            rng = random(self.config.run.seed, RESUME, number, count)
            if rng.random() >= self.config.inner.restart:
                found = self.late.one_of(n, rng)
                self.age[n] = found["age"]
                self.length[n] += found["age"]
                for name in self.family.shapes:
                    scale[name][n] = found[f"scale.{name}"]
                for key, x in state.items():
                    x[2 * n : 2 * n + 2] = found[f"state.{key}"]
                return found["xi"]
        for name in self.family.shapes:
            scale[name][n], state[f"{name}.weight"][2 * n : 2 * n + 2] = episode.scale[name], episode.weights[name]
        return None


def whole_episodes(config: Config, family: Family, first_number: int, generation: int, copies: int) -> tuple[Arrays, Truncation]:
    """New whole episodes, each for `copies` unrolls: their state (U, ...), and a `Truncation` of all their steps."""
    task = np.repeat(np.arange(len(family.data.names)), config.tasks.problems)
    numbers = range(first_number, first_number + len(task))
    episodes = [draw_episode(config, family, n, generation) for n in numbers]
    steps = np.array([e.length for e in episodes])
    rows = np.empty((len(task), steps.max(), family.batch), np.int64)
    rate = np.ones((len(task), steps.max()), np.float32)
    for n, number in enumerate(numbers):
        rng = random(config.run.seed, DATA, generation, number)
        rows[n] = family.data.starts[task[n]] + rng.integers(family.data.counts[task[n]], size=rows.shape[1:])
        if config.inner.schedule == "cosine":
            length = int(steps[n])
            rate[n, :length] = [warm_up_and_cosine(age, length, config.inner.final) for age in range(length)]
    scale = stacked([e.scale for e in episodes])
    state = family.initial_state(stacked([e.weights for e in episodes]), copies)
    return state, Truncation(rows, rate, np.full(len(task), steps.max()), state, scale, scale, steps=steps)


def stacked(weights: list[Arrays]) -> Arrays:
    """Weights of many problems (N, *shape) from one mapping each."""
    return {name: np.stack([w[name] for w in weights]) for name in weights[0]}
