"""Confidence intervals and tests for a few seeds: Student's t, paired and Welch's, Holm's correction for many pairs, power."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.special import nctdtr, stdtr, stdtrit  # Student's t: distribution functions (the first noncentral), quantile

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over n values; `half` is half the width of its confidence interval. `sd` and `half` are None for a single value."""

    mean: float
    sd: float | None
    half: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """The mean of a − b with its interval and two-sided p; `half` and `p` are None if too few values give no spread."""

    mean: float
    half: float | None
    p: float | None
    n: int  # number of pairs, or of values on the side with fewer
    paired: bool


def half_width(error: float, dof: float) -> float:
    """Half the width of the confidence interval of a mean with this standard error and these degrees of freedom."""
    return error * float(stdtrit(dof, (1 + CONFIDENCE) / 2))


def p_value(gap: float, error: float, dof: float) -> float:
    """Two-sided p of the difference `gap` with a standard error; with an error of 0 it is 1 for no difference, else 0."""
    if error == 0:
        return 1.0 if gap == 0 else 0.0
    return float(2 * stdtr(dof, -abs(gap) / error))


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of `values` with Student's interval on n − 1 degrees of freedom."""
    n = len(values)
    if n < 2:
        return Estimate(values[0], None, None, 1)
    sd = stdev(values)
    return Estimate(mean(values), sd, half_width(sd / math.sqrt(n), n - 1), n)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """a − b from values by seed. Paired if two seeds or more are common (they share data order and initial weights); otherwise
    Welch's test if both sides have two values; otherwise no test."""
    common = sorted(set(a) & set(b))
    if len(common) >= 2:
        gaps = [a[seed] - b[seed] for seed in common]
        gap, error, n = mean(gaps), stdev(gaps) / math.sqrt(len(gaps)), len(gaps)
        return Difference(gap, half_width(error, n - 1), p_value(gap, error, n - 1), n, True)
    if len(common) == 1 and (len(a) == 1 or len(b) == 1):
        return Difference(a[common[0]] - b[common[0]], None, None, 1, True)
    gap, n = mean(a.values()) - mean(b.values()), min(len(a), len(b))
    if n < 2:
        return Difference(gap, None, None, n, False)
    u, v = (stdev(side.values()) ** 2 / len(side) for side in (a, b))
    error = math.sqrt(u + v)
    dof = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1)) if error else 1  # Welch–Satterthwaite
    return Difference(gap, half_width(error, dof), p_value(gap, error, dof), n, False)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for multiple tests (Holm 1979): the chance of any false claim stays below the level. None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[index] = largest
    return corrected


LEVEL, POWER = 1 - CONFIDENCE, 0.8  # the chance that a test claims a difference if there is none, and if there is one
MOST_SEEDS = 10_000


def power(gap: float, sd: float, n: int, level: float = LEVEL, sides: int = 2) -> float:
    """The chance that a t-test of n values with true mean `gap` and standard deviation `sd` finds that the mean is not 0.

    For n pairs, the values are the differences. `sides` is 1 if only a positive mean counts. Uses the noncentral t.
    """
    if n < 2:
        return 0.0
    if sd == 0:
        return 1.0 if gap else level
    dof, centre = n - 1, abs(gap) / sd * math.sqrt(n)
    critical = float(stdtrit(dof, 1 - level / sides))
    found = 1 - float(nctdtr(dof, centre, critical))
    return found + (float(nctdtr(dof, centre, -critical)) if sides == 2 else 0.0)


def seeds_needed(gap: float, sd: float, level: float = LEVEL, wanted: float = POWER) -> int | None:
    """The smallest number of pairs of seeds that finds a difference with probability `wanted`; None beyond MOST_SEEDS."""
    low, high = 1, 2
    while power(gap, sd, high, level) < wanted:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(gap, sd, middle, level) >= wanted else (middle, high)
    return high


def detectable(n: int, level: float = LEVEL, wanted: float = POWER, sides: int = 2) -> float | None:
    """The smallest true mean, in standard deviations, that a test of n values finds with probability `wanted`; None if n < 2."""
    if n < 2:
        return None
    low, high = 0.0, 1.0
    while power(high, 1.0, n, level, sides) < wanted:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, 1.0, n, level, sides) >= wanted else (middle, high)
    return high
