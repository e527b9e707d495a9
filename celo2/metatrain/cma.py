"""CMA-ES: a gradient-free search over few numbers that uses only the ranks of the candidates of a generation.

Source: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, with positive weights. The package `cma` keeps its
state in an object that only pickle can write; here the state is a few arrays, which a checkpoint can hold.

Legend: n numbers; λ candidates of a generation, of which only the best μ count.
"""

from __future__ import annotations

import math

import numpy as np


class CmaEs:
    """The distribution N(mean, σ² C) of the next candidates.

    Attributes:
        mean: (n,), the result of the search.
        sigma: (), the step size σ.
        covariance: C (n, n).
        path, step_path: (n,), the evolution paths of C and of σ.
        generation: (), the number of generations so far.
    """

    def __init__(self, mean: np.ndarray, sigma: float, population: int | None = None) -> None:
        """Start at `mean` (n,) with C = I. population: λ; None means 4 + 3 ln n, rounded down."""
        n = len(mean)
        self.population = 4 + int(3 * math.log(n)) if population is None else population
        self.mean, self.sigma = np.array(mean, np.float64), np.array(sigma, np.float64)
        self.covariance, self.path, self.step_path = np.eye(n), np.zeros(n), np.zeros(n)
        self.generation = np.zeros((), np.int64)

        weights = math.log((self.population + 1) / 2) - np.log(np.arange(1, self.population // 2 + 1))
        self.weights = weights / weights.sum()
        self.effective = effective = 1 / np.square(self.weights).sum()  # μ_eff
        self.path_rate = (4 + effective / n) / (n + 4 + 2 * effective / n)  # c_c
        self.step_rate = (effective + 2) / (n + effective + 5)  # c_σ
        self.rank_one = 2 / ((n + 1.3) ** 2 + effective)  # c_1
        self.rank_mu = min(1 - self.rank_one, 2 * (effective - 2 + 1 / effective) / ((n + 2) ** 2 + effective))  # c_μ
        self.damping = 1 + 2 * max(0.0, math.sqrt((effective - 1) / (n + 1)) - 1) + self.step_rate  # d_σ
        self.expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # of the norm of N(0, 1)

    def tensors(self) -> dict[str, np.ndarray]:
        """The whole state by name. The arrays are not copies: writing into them changes the state."""
        return {name: vars(self)[name] for name in ("mean", "sigma", "covariance", "path", "step_path", "generation")}

    def root(self) -> tuple[np.ndarray, np.ndarray]:
        """Axes (n, n) and standard deviations (n,) with C = axes diag(deviations²) axesᵀ."""
        squares, axes = np.linalg.eigh(self.covariance)
        return axes, np.sqrt(np.maximum(squares, 1e-20))

    def ask(self, rng: np.random.Generator) -> np.ndarray:
        """The candidates (λ, n) of this generation."""
        axes, deviations = self.root()
        return self.mean + self.sigma * (rng.standard_normal((self.population, len(self.mean))) * deviations) @ axes.T

    def tell(self, candidates: np.ndarray, values: np.ndarray) -> None:
        """Update the distribution towards the candidates (λ, n) with the lowest values (λ,); infinity and NaN rank last."""
        order = np.argsort(np.where(np.isnan(values), np.inf, values), kind="stable")[: len(self.weights)]
        steps = (candidates[order] - self.mean) / self.sigma  # (μ, n)
        step = self.weights @ steps
        axes, deviations = self.root()
        whitened = axes @ ((axes.T @ step) / deviations)
        self.generation += 1
        self.mean += self.sigma * step

        keep = 1 - self.step_rate
        self.step_path[:] = keep * self.step_path + math.sqrt((1 - keep**2) * self.effective) * whitened
        length = np.linalg.norm(self.step_path)
        # The path of C is not updated while σ grows fast.
        bound = (1.4 + 2 / (len(step) + 1)) * self.expected
        moves = float(length / math.sqrt(1 - keep ** (2 * int(self.generation))) < bound)
        spread = self.path_rate * (2 - self.path_rate)
        self.path[:] = (1 - self.path_rate) * self.path + moves * math.sqrt(spread * self.effective) * step
        self.covariance *= 1 - self.rank_one - self.rank_mu + self.rank_one * (1 - moves) * spread
        self.covariance += self.rank_one * np.outer(self.path, self.path) + self.rank_mu * (self.weights * steps.T) @ steps
        self.sigma *= math.exp(self.step_rate / self.damping * (length / self.expected - 1))
