"""Data speedup: how many times as much data a reference optimizer would need to reach another one's loss, and its trend.

The reference's loss at the end of a training run of D tokens is fitted as L = α D^−B + β (as in arXiv 2509.02046). If another
optimizer has the loss L after D tokens, and the fit for this model size gives L at D' tokens, its data speedup is D' / D. All
inputs are losses by seed at cells; a cell is a model size and a number of tokens.

Legend: C cells, S sizes; L loss (nats), D tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear, minimize_scalar

from celo2.training.statistics import half_width

Vector = NDArray[np.float64]
BySeed = Mapping[int, float]
EXPONENTS = (0.02, 3.0)  # bounds of B; published fits have 0.1 to 0.6


@dataclass(frozen=True)
class Cell:
    """A model size, its number of weights, and a budget."""

    size: str
    weights: float
    tokens: float

    @property
    def ratio(self) -> float:
        """Tokens per weight."""
        return self.tokens / self.weights


@dataclass(frozen=True)
class Fit:
    """L = scale[size] (D / unit)^−exponent + floor[size]."""

    exponent: float
    unit: float  # tokens
    scale: dict[str, float]
    floor: dict[str, float]
    misfit: float  # the largest distance of a mean from the fit, nats
    at_edge: bool  # no exponent within EXPONENTS fits better than one at their end
    by_losses: dict[str, Vector]  # derivatives of (exponent, scale, floor) of a size by the losses of the cells, (3, C)

    def log_tokens(self, size: str, loss: float) -> float:
        """The logarithm of the tokens at which the fit comes down to `loss`; infinite if it never does."""
        above = (loss - self.floor[size]) / self.scale[size]
        return math.log(self.unit) - math.log(above) / self.exponent if above > 0 else math.inf

    def derivatives(self, size: str, loss: float) -> tuple[Vector, float]:
        """Derivatives of `log_tokens` by the losses of the cells (C,) and by `loss`."""
        over = loss - self.floor[size]
        by_loss = -1 / (self.exponent * over)
        by_parameters = [math.log(over / self.scale[size]) / self.exponent**2, 1 / (self.exponent * self.scale[size]), -by_loss]
        return np.array(by_parameters) @ self.by_losses[size], by_loss


def why_no_fit(cells: Sequence[Cell]) -> str | None:
    """Why a fit over these cells cannot be made; None if it can."""
    by_size = {c.size: [o.tokens for o in cells if o.size == c.size] for c in cells}
    fewest = min((len(set(tokens)) for tokens in by_size.values()), default=0)
    if fewest >= 3 or (fewest == 2 and len(by_size) >= 2):
        return None
    return "the fit L = α D^−B + β needs three numbers of tokens at a size, or two at each of two sizes"


def fit(cells: Sequence[Cell], losses: Sequence[float]) -> Fit:
    """Least squares over the cells. All sizes share B, and each has its own β, which is not below 0, as no loss is. Each size
    has its own α, too, if every size has at least three numbers of tokens; otherwise all share one α.

    Raises:
        ValueError: the losses do not fall with the tokens.
    """
    sizes = sorted({c.size for c in cells})
    own = all(len({c.tokens for c in cells if c.size == size}) >= 3 for size in sizes)
    unit = math.exp(fmean(math.log(c.tokens) for c in cells))
    member = np.array([[c.size == size for size in sizes] for c in cells], float)  # (C, S)
    logs, y = np.log([c.tokens / unit for c in cells]), np.asarray(losses, float)

    def solve(log_exponent: float) -> tuple[float, Vector, Vector]:
        """Squared error, coefficients and residuals at an exponent."""
        falling = np.exp(-math.exp(log_exponent) * logs)[:, None]
        design = np.hstack([falling * member if own else falling, member])
        least = np.concatenate([np.full(design.shape[1] - len(sizes), -np.inf), np.zeros(len(sizes))])
        found = np.linalg.lstsq(design, y, rcond=None)[0]
        if (found < least).any():
            found = lsq_linear(design, y, (least, np.inf), method="bvls").x
        rest = y - design @ found
        return float(rest @ rest), found, rest

    low, high = (math.log(value) for value in EXPONENTS)
    starts = np.linspace(low, high, 40)
    middle = starts[int(np.argmin([solve(value)[0] for value in starts]))]
    step = starts[1] - starts[0]
    found = minimize_scalar(
        lambda value: solve(value)[0],
        bounds=(max(low, middle - step), min(high, middle + step)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    _, values, rest = solve(found.x)
    scales = values[: len(sizes)] if own else np.repeat(values[:1], len(sizes))
    if not (scales > 0).all():
        raise ValueError("the losses do not fall with the tokens")
    exponent, floors, count = math.exp(found.x), values[-len(sizes) :], len(sizes)
    # For small residuals, the fitted parameters' derivatives by the losses are the pseudo-inverse of the fit's by the parameters.
    falling = np.exp(-exponent * logs)[:, None]
    by_exponent = -logs[:, None] * falling * (member @ scales)[:, None]
    inverse = np.linalg.pinv(np.hstack([by_exponent, falling * member if own else falling, member * (floors > 0)]))
    by_losses = {size: inverse[[0, 1 + i if own else 1, -count + i]] for i, size in enumerate(sizes)}
    scale, floor = dict(zip(sizes, scales.tolist(), strict=True)), dict(zip(sizes, floors.tolist(), strict=True))
    at_edge = not low + 1e-6 < found.x < high - 1e-6
    return Fit(exponent, unit, scale, floor, float(np.abs(rest).max()), at_edge, by_losses)


@dataclass(frozen=True)
class Speedup:
    """A factor of data with its confidence interval; None: not known. Infinite: the fit of the reference never gets there."""

    value: float
    low: float | None
    high: float | None
    beyond: bool = False  # the reference would need more tokens than it was ever given at this size


class Speedups:
    """The data speedups of one optimizer over the reference, at the cells where both have losses.

    Args:
        cells: C cells.
        reference: the reference's losses by seed, at each cell.
        other: the same of the optimizer. A cell where it has none is left out.
    """

    def __init__(self, cells: Sequence[Cell], reference: Sequence[BySeed], other: Sequence[BySeed]) -> None:
        self.cells, self.reference, self.other = cells, reference, other
        self.means = np.array([fmean(losses.values()) for losses in reference])
        self.others = np.array([fmean(losses.values()) if losses else math.nan for losses in other])
        self.fit = fit(cells, self.means.tolist())
        self.logs = np.array([self.log(i) for i in range(len(cells))])
        self.known = np.isfinite(self.logs)
        self.by_reference, self.by_other = self.gradients()

    def log(self, i: int) -> float:
        """The logarithm of the speedup at a cell; NaN without a loss there."""
        loss, cell = self.others[i], self.cells[i]
        return math.nan if math.isnan(loss) else self.fit.log_tokens(cell.size, loss) - math.log(cell.tokens)

    def gradients(self) -> tuple[NDArray[np.float64], Vector]:
        """Derivatives of every cell's logarithm by the reference's means (C, C), and by the optimizer's own mean (C,)."""
        by_reference, by_other = np.zeros((len(self.cells), len(self.cells))), np.zeros(len(self.cells))
        for i in np.flatnonzero(self.known).tolist():
            by_reference[i], by_other[i] = self.fit.derivatives(self.cells[i].size, self.others[i])
        return by_reference, by_other

    def half(self, weights: Vector) -> float | None:
        """Half the width of the interval of Σ weights · logarithms, by the delta method.

        The losses of a seed belong together within a size, where they share initial weights and data; sizes are independent.
        The degrees of freedom are Welch and Satterthwaite's. None where a size has fewer than two seeds in common.
        """
        used = np.flatnonzero(weights)
        by_reference, by_other = weights[used] @ self.by_reference[used], weights * self.by_other
        total, divisor = 0.0, 0.0
        for size in {c.size for c in self.cells}:
            here = [i for i, c in enumerate(self.cells) if c.size == size]
            parts = [(by_reference[i], self.reference[i]) for i in here] + [
                (by_other[i], self.other[i]) for i in here if weights[i]
            ]
            parts = [(factor, losses) for factor, losses in parts if abs(factor) > 1e-9]
            if not parts:
                continue
            seeds = set.intersection(*(set(losses) for _, losses in parts))
            if len(seeds) < 2:
                return None
            part = variance([sum(factor * losses[seed] for factor, losses in parts) for seed in sorted(seeds)]) / len(seeds)
            total, divisor = total + part, divisor + part**2 / (len(seeds) - 1)
        return half_width(math.sqrt(total), total**2 / divisor) if divisor else 0.0

    def at(self, i: int) -> Speedup | None:
        """The speedup at a cell; None where the optimizer has no loss."""
        if math.isnan(self.others[i]):
            return None
        if not self.known[i]:
            return Speedup(math.inf, None, None, True)
        longest = max(c.tokens for c in self.cells if c.size == self.cells[i].size)
        beyond = self.logs[i] + math.log(self.cells[i].tokens) > math.log(longest) * (1 + 1e-12)
        return speedup(self.logs[i], self.half(np.eye(len(self.cells))[i]), bool(beyond))

    def trend(self, weights: float, ratio: float) -> Speedup | None:
        """What a straight line in the logarithms of weights and of tokens per weight says at another model and budget.

        The interval is the wider of two: from the spread over seeds, and from the scatter of the cells about the line. It
        assumes that the line continues. None without two sizes or two ratios at which the speedup is finite.
        """
        used = np.flatnonzero(self.known)
        columns = [[1.0] * len(used)]
        point = [1.0]
        for value, of_cells in ((weights, [c.weights for c in self.cells]), (ratio, [c.ratio for c in self.cells])):
            logs = np.log([of_cells[i] for i in used])
            if len(logs) and np.ptp(logs) > 0.1:  # ratios differ a little, since steps are whole
                columns.append((logs - logs.mean()).tolist())
                point.append(math.log(value) - logs.mean())
        design = np.array(columns).T
        if design.shape[1] < 2 or len(used) < design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
            return None
        inverse = np.linalg.pinv(design)
        combined = np.zeros(len(self.cells))
        combined[used] = np.array(point) @ inverse
        rest = self.logs[used] - design @ (inverse @ self.logs[used])
        halves = [self.half(combined)]
        dof = len(used) - design.shape[1]
        if dof:
            halves.append(half_width(math.sqrt(float(rest @ rest) / dof * float((combined**2).sum())), dof))
        known = [half for half in halves if half is not None]
        return speedup(float(combined[used] @ self.logs[used]), max(known) if known else None)


def speedup(log: float, half: float | None, beyond: bool = False) -> Speedup:
    """A speedup from its logarithm and half the width of its interval."""
    if half is None:
        return Speedup(bounded(log), None, None, beyond)
    return Speedup(bounded(log), bounded(log - half), bounded(log + half), beyond)


def bounded(log: float) -> float:
    """The exponential of `log`, or infinity where it overflows."""
    return math.exp(log) if log < 700 else math.inf
