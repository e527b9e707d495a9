"""CMA-ES over the free numbers of θ: whole episodes, the same ones for every candidate of a generation.

It needs fewer unrolls than PES if few numbers are free, works with any loss, and optimizes what counts: the loss at the end.
"""

from __future__ import annotations

import numpy as np

from celo2.metatrain.cma import CmaEs
from celo2.metatrain.config import Config
from celo2.metatrain.families import Arrays
from celo2.metatrain.outer import MetaState
from celo2.metatrain.problems import NOISE, random, whole_episodes
from celo2.metatrain.tasks import Data
from celo2.metatrain.theta import directions_of, within_bounds

KEPT = 2  # more candidates of a generation: the mean of the search's distribution, and the first θ


class Generations(MetaState):
    """One iteration is a generation. Its problems are new, and the same for all candidates, the mean and the first θ among them.

    Attributes:
        directions: (n, D), the directions of the search from the first θ. es: the distribution of the steps along them.
    """

    def __init__(self, config: Config, *data: Data) -> None:
        super().__init__(config, *data)
        self.directions = directions_of(config, self.first_theta)
        self.es = CmaEs(np.zeros(len(self.directions)), config.estimator.sigma, config.outer.population)

    def theta_of(self, steps: np.ndarray) -> np.ndarray:
        """θ (..., D) for steps (..., n), with step sizes and whitening within the bounds of a rule file."""
        return within_bounds((self.first_theta + steps @ self.directions).astype(np.float32), self.config)

    def current(self) -> np.ndarray:
        return self.theta_of(self.es.mean)

    def tensors(self) -> Arrays:
        return {"average": self.average} | {f"cma.{key}": x for key, x in self.es.tensors().items()}

    def search(self) -> dict[str, float]:
        steps = self.es.ask(random(self.config.run.seed, NOISE, self.iteration))
        theta = np.concatenate([self.theta_of(steps), self.current()[None], self.first_theta[None]])
        raw, counts = self.unrolled(theta)  # (N, λ + 2, T), (N,)
        losses, shown = (x.reshape(raw.shape) for x in self.bounded(raw.reshape(-1, raw.shape[-1])))
        final = np.stack([self.final(of_problem[:, :n]) for of_problem, n in zip(losses, counts, strict=True)], 1)  # (λ + 2, N)
        *values, of_mean, of_first = final.mean(1)
        self.es.tell(steps, np.array(values))

        ran = np.arange(raw.shape[-1]) < counts[:, None, None]
        shown = np.where(ran, shown, np.nan)[:, :-KEPT]
        return self.means(shown.reshape(-1, raw.shape[-1])) | {
            "final": float(of_mean),
            "gain": float(of_first - of_mean),
            "best": float(min(values)),
            "sigma": float(self.es.sigma),
            "theta_norm": float(np.linalg.norm(self.current())),
            "not_finite": float(1 - (np.isfinite(raw) | ~ran).mean()),
        }

    def final(self, losses: np.ndarray) -> np.ndarray:
        """The mean of the last `estimator.last` of losses (..., T)."""
        count = max(1, round(self.config.estimator.last * losses.shape[-1]))
        return losses[..., -count:].mean(-1)

    def unrolled(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses (N, C, T) of the problems of this generation under candidates θ (C, D), and the steps (N,) of each problem."""
        found, counts = [], []
        for family, first_number, unroll in zip(self.families, self.first_numbers, self.unrolls, strict=True):
            state, episodes = whole_episodes(self.config, family, first_number, self.iteration, len(theta))
            losses = unroll(self.config, family, state, np.tile(theta, (len(episodes.rows), 1)), episodes, None)
            found.append(losses.reshape(len(episodes.rows), len(theta), -1))
            counts.append(np.asarray(episodes.steps))
        longest = max(losses.shape[-1] for losses in found)
        padded = [np.pad(x, ((0, 0), (0, 0), (0, longest - x.shape[-1])), constant_values=np.nan) for x in found]
        return np.concatenate(padded), np.concatenate(counts)
