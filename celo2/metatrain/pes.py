"""Persistent evolution strategies: from the losses of antithetic unrolls to a gradient of θ. Pure functions.

Source: Vicol, Metz, Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution
Strategies", ICML 2021, arXiv 2112.13835. Legend: N problems, T steps of a truncation, D weights of the rule.
"""

from __future__ import annotations

import numpy as np


def antithetic(theta: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
    """θ (D,) with ε (N, D) added and subtracted, in turn: (2N, D)."""
    return np.stack([theta + epsilon, theta - epsilon], 1).reshape(-1, len(theta))


def differences(losses: np.ndarray, reset_at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L⁺ - L⁻ (N,) of losses (2N, T), each the sum over its steps divided by T: before a problem's reset, and from it on."""
    steps = losses.shape[1]
    delta = (losses[0::2].astype(np.float64) - losses[1::2]) / steps
    before = np.arange(steps) < reset_at[:, None]
    return (delta * before).sum(1), (delta * ~before).sum(1)


def estimate(
    before: np.ndarray, after: np.ndarray, xi: np.ndarray, epsilon: np.ndarray, sigma: float, weight: np.ndarray
) -> np.ndarray:
    """The gradient (D,): the mean over problems of weight · (L⁺ - L⁻) / (2σ²) · ξ.

    Args:
        before, after: what `differences` returned.
        xi: (N, D), the sum of ε since each problem started, this truncation's included.
        epsilon: (N, D) of this truncation: the steps after a reset know no other perturbation.
        weight: (N,), 1 in the published recipe.
    """
    total = (weight * before)[:, None] * xi + (weight * after)[:, None] * epsilon
    return total.mean(0) / (2 * sigma**2)


def persisted(xi: np.ndarray, epsilon: np.ndarray, reset_at: np.ndarray, steps: int) -> np.ndarray:
    """ξ for the next truncation: it restarts from this truncation's ε where a problem started again."""
    return np.where((reset_at < steps)[:, None], epsilon, xi)


class BucketScale:
    """1 / RMS of the loss differences of similar problems, so that large scales s do not make up the whole gradient.

    With raw losses nearly all of the squared estimate comes from s > 100. `mean_square` (buckets,) is a running mean
    without bias: `count` (buckets,) observations have entered it.
    """

    DECAY = 0.98

    def __init__(self, buckets: int) -> None:
        self.mean_square, self.count = np.zeros(buckets), np.zeros(buckets, np.int64)

    def weights(self, bucket: np.ndarray, difference: np.ndarray) -> np.ndarray:
        """The weight (N,) of each problem, after its difference (N,) has entered the mean of its bucket (N,)."""
        for b in np.unique(bucket):
            self.count[b] += 1
            rate = max(1 - self.DECAY, 1 / self.count[b])
            self.mean_square[b] += rate * (np.square(difference[bucket == b]).mean() - self.mean_square[b])
        return 1 / np.sqrt(self.mean_square[bucket] + 1e-12)
