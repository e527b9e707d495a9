"""Persistent evolution strategies: estimate the gradient of θ from the losses of antithetic unrolls. Pure functions.

Source: Vicol, Metz, Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution
Strategies", ICML 2021, arXiv 2112.13835. Legend: N problems, T steps of a truncation, D numbers of θ.
"""

from __future__ import annotations

import numpy as np

from celo2.metatrain.families import TINY

IMITATION = 0.01  # RMS of the difference of an imitation term, as in ELO (arXiv 2607.06772)


def antithetic(theta: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
    """θ + ε and θ - ε for each problem in turn (2N, D), from θ (D,) and ε (N, D)."""
    return np.stack([theta + epsilon, theta - epsilon], 1).reshape(-1, len(theta))


def differences(losses: np.ndarray, reset_at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L⁺ - L⁻ from losses (2N, T), summed over steps and divided by T: (N,) before each problem's reset, and (N,) from it on."""
    steps = losses.shape[1]
    delta = (losses[0::2].astype(np.float64) - losses[1::2]) / steps
    before = np.arange(steps) < reset_at[:, None]
    return (delta * before).sum(1), (delta * ~before).sum(1)


def estimate(
    before: np.ndarray, after: np.ndarray, xi: np.ndarray, xi_after: np.ndarray, sigma: float, weights: np.ndarray
) -> np.ndarray:
    """The gradient (D,): the mean over problems of weight · (L⁺ - L⁻) / (2σ²) · ξ.

    Args:
        before, after: (N,), from `differences`.
        xi: (N, D), the sum of ε since each problem started, including this truncation.
        xi_after: (N, D), this sum after a reset: the ε of this truncation, plus the sum of a late state if one is resumed.
        weights: (2, N) for `before` and `after`, or (N,) for both. 1 in the published recipe.
    """
    weight, weight_after = np.broadcast_to(weights, (2, len(before)))
    total = (weight * before)[:, None] * xi + (weight_after * after)[:, None] * xi_after
    return total.mean(0) / (2 * sigma**2)


def persisted(xi: np.ndarray, xi_after: np.ndarray, reset_at: np.ndarray, steps: int) -> np.ndarray:
    """ξ (N, D) for the next truncation: `xi_after` for problems that were reset, `xi` for the others."""
    return np.where((reset_at < steps)[:, None], xi_after, xi)


def with_imitation(losses: np.ndarray, terms: np.ndarray, weights: tuple[float, float]) -> np.ndarray:
    """Losses (2N, T) mixed with imitation terms (2N, T, 2), which measure how the rule's steps differ from an expert's (ELO).

    The losses get the weight 1 - sum(weights). The difference of a term between both signs is scaled to the RMS `IMITATION` over
    all steps. If a term of one sign is not finite, the term counts as 0 for both signs.
    """
    total = (1 - sum(weights)) * losses.astype(np.float64)
    for n, weight in enumerate(weights):
        term = terms[..., n].astype(np.float64)
        finite = np.isfinite(term[0::2]) & np.isfinite(term[1::2])
        term = np.where(np.repeat(finite, 2, axis=0), term, 0.0)
        rms = np.sqrt(np.square(term[0::2] - term[1::2]).mean())
        total += weight * IMITATION / (rms + TINY) * term
    return total


def fallen(start: float, iteration: int, begin: int, end: int) -> float:
    """A weight that is `start` until iteration `begin` and then falls linearly to 0 at `end`."""
    return start * min(1.0, max(0.0, (end - iteration) / (end - begin)))


class BucketScale:
    """Weights 1 / RMS of the loss differences of similar problems, so that large scales s do not dominate the gradient.

    With raw losses nearly all of the squared estimate comes from s > 100. `mean_square` (buckets,) is an unbiased running
    mean over `count` (buckets,) observations.
    """

    DECAY = 0.98

    def __init__(self, buckets: int) -> None:
        self.mean_square, self.count = np.zeros(buckets), np.zeros(buckets, np.int64)

    def weights(self, bucket: np.ndarray, difference: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        """The weight of each difference; first adds those marked in `counts` (by default all) to the means of their buckets."""
        counts = np.ones(bucket.shape, bool) if counts is None else counts
        for b in np.unique(bucket[counts]):
            self.count[b] += 1
            rate = max(1 - self.DECAY, 1 / self.count[b])
            self.mean_square[b] += rate * (np.square(difference[counts & (bucket == b)]).mean() - self.mean_square[b])
        return 1 / np.sqrt(self.mean_square[bucket] + 1e-12)
