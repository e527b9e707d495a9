"""Persistent evolution strategies: from the losses of antithetic unrolls to a gradient of θ. Pure functions.

Source: Vicol, Metz, Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution
Strategies", ICML 2021, arXiv 2112.13835. Legend: N problems, T steps of a truncation, D numbers of θ.
"""

from __future__ import annotations

import numpy as np

from celo2.metatrain.families import TINY

IMITATION = 0.01  # RMS that the difference of an imitation term is scaled to, as in ELO (arXiv 2607.06772)


def antithetic(theta: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
    """θ (D,) with ε (N, D) added and subtracted, in turn: (2N, D)."""
    return np.stack([theta + epsilon, theta - epsilon], 1).reshape(-1, len(theta))


def differences(losses: np.ndarray, reset_at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L⁺ - L⁻ (N,) of losses (2N, T), twice: summed over the steps before a problem's reset, and over the rest; divided by T."""
    steps = losses.shape[1]
    delta = (losses[0::2].astype(np.float64) - losses[1::2]) / steps
    before = np.arange(steps) < reset_at[:, None]
    return (delta * before).sum(1), (delta * ~before).sum(1)


def estimate(
    before: np.ndarray, after: np.ndarray, xi: np.ndarray, xi_after: np.ndarray, sigma: float, weights: np.ndarray
) -> np.ndarray:
    """The gradient (D,): the mean over problems of weight · (L⁺ - L⁻) / (2σ²) · ξ.

    Args:
        before, after: what `differences` returned.
        xi: (N, D), the sum of ε since each problem started, this truncation's included.
        xi_after: (N, D), the same after a reset: this truncation's ε, plus the sum of a late state if the problem resumed one.
        weights: (2, N), of `before` and `after`; or (N,), of both. 1 in the published recipe.
    """
    weight, weight_after = np.broadcast_to(weights, (2, len(before)))
    total = (weight * before)[:, None] * xi + (weight_after * after)[:, None] * xi_after
    return total.mean(0) / (2 * sigma**2)


def persisted(xi: np.ndarray, xi_after: np.ndarray, reset_at: np.ndarray, steps: int) -> np.ndarray:
    """ξ for the next truncation: `xi_after` for problems that were reset, else `xi`."""
    return np.where((reset_at < steps)[:, None], xi_after, xi)


def with_imitation(losses: np.ndarray, terms: np.ndarray, weights: tuple[float, float]) -> np.ndarray:
    """Losses (2N, T), in part replaced by terms (2N, T, 2) that measure how the rule's steps differ from an expert's, as in ELO.

    Each term is scaled so that its difference between both signs has the RMS `IMITATION` over all steps. The weight of the losses
    is 1 minus the sum of the terms' weights. If one term of a pair of signs is not finite, both count as 0.
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
    """A weight that is `start` until iteration `begin` and falls to 0 at `end`, linearly."""
    return start * min(1.0, max(0.0, (end - iteration) / (end - begin)))


class BucketScale:
    """1 / RMS of the loss differences of similar problems, so that large scales s do not make up the whole gradient.

    With raw losses nearly all of the squared estimate comes from s > 100. `mean_square` (buckets,) is a running mean
    without bias: `count` (buckets,) observations have entered it.
    """

    DECAY = 0.98

    def __init__(self, buckets: int) -> None:
        self.mean_square, self.count = np.zeros(buckets), np.zeros(buckets, np.int64)

    def weights(self, bucket: np.ndarray, difference: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        """The weight of each difference, after those of `counts` (None: all) have entered the mean of their bucket."""
        counts = np.ones(bucket.shape, bool) if counts is None else counts
        for b in np.unique(bucket[counts]):
            self.count[b] += 1
            rate = max(1 - self.DECAY, 1 / self.count[b])
            self.mean_square[b] += rate * (np.square(difference[counts & (bucket == b)]).mean() - self.mean_square[b])
        return 1 / np.sqrt(self.mean_square[bucket] + 1e-12)
