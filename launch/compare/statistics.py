"""Intervals and tests on a handful of seeds: Student's t, paired and Welch's, and Holm's correction for many pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over n values; `half` is half the width of its confidence interval, None for a single value."""

    mean: float
    sd: float | None
    half: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """The mean of a − b with its interval and two-sided p; `half` and `p` are None where a spread cannot be known."""

    mean: float
    half: float | None
    p: float | None
    n: int  # pairs, or the smaller number of values
    paired: bool


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (Lentz; DLMF 8.17.22)."""
    if not 0 < x < 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1 - incomplete_beta(b, a, 1 - x)
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) * fraction / a


def t_p_value(t: float, dof: float) -> float:
    """P(|T| >= |t|) of Student's t with `dof` degrees of freedom."""
    return 0.0 if math.isinf(t) else incomplete_beta(dof / 2, 0.5, dof / (dof + t * t))


def t_quantile(confidence: float, dof: float) -> float:
    """The t with P(|T| <= t) = `confidence`, by bisection."""
    low, high = 0.0, 1.0
    while t_p_value(high, dof) > 1 - confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p_value(middle, dof) > 1 - confidence else (low, middle)
    return (low + high) / 2


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of `values` with Student's interval on n − 1 degrees of freedom."""
    n = len(values)
    if n < 2:
        return Estimate(values[0], None, None, 1)
    sd = stdev(values)
    return Estimate(mean(values), sd, t_quantile(CONFIDENCE, n - 1) * sd / math.sqrt(n), n)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """a − b from values by seed: paired where two seeds or more are common (they share data order and initial weights), else
    Welch's, which needs two values on each side; no test otherwise."""
    common = sorted(set(a) & set(b))
    if len(common) >= 2:
        e = estimate([a[seed] - b[seed] for seed in common])
        return Difference(e.mean, e.half, p_of(e.mean, e.sd / math.sqrt(e.n), e.n - 1), e.n, True)
    if len(common) == 1 and (len(a) == 1 or len(b) == 1):
        return Difference(a[common[0]] - b[common[0]], None, None, 1, True)
    left, right = estimate(list(a.values())), estimate(list(b.values()))
    n, gap = min(left.n, right.n), left.mean - right.mean
    if n < 2:
        return Difference(gap, None, None, n, False)
    u, v = left.sd**2 / left.n, right.sd**2 / right.n
    if u + v == 0:
        return Difference(gap, 0.0, p_of(gap, 0.0, 1), n, False)
    dof = (u + v) ** 2 / (u**2 / (left.n - 1) + v**2 / (right.n - 1))
    error = math.sqrt(u + v)
    return Difference(gap, t_quantile(CONFIDENCE, dof) * error, p_of(gap, error, dof), n, False)


def p_of(gap: float, error: float, dof: float) -> float:
    """Two-sided p of a difference with a standard error; without any spread, equal is 1 and different 0."""
    if error == 0:
        return 1.0 if gap == 0 else 0.0
    return t_p_value(gap / error, dof)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for being several (Holm 1979): the chance of any false claim stays below the level. None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[index] = largest
    return corrected
