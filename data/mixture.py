"""Mixes several sources of tokens by weights that may change at given steps.

Which source gives sequence number g is a pure function of the weights and g: a fixed order of length D, repeated. In this order,
each source occurs in proportion to its weight and evenly: after any number of sequences, the count of each source differs from
its exact share by less than one. K is the number of sources.
"""

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from data import DataError
from data.shards import TokenShards
from data.tokenizer import json_hash

RESOLUTION = 10_000  # the largest period D: shares with a larger common denominator are rounded to ten-thousandths


class Mixture(TokenShards):
    """The splits of several sources, as one array with the sources' tokens one after another.

    weights: for each source, its weight from each given step on; the first step is 0. Raises DataError if the tokenizers differ,
    two sources hold the same data, no source has a weight at some step, or a share is below 1/RESOLUTION.
    """

    def __init__(self, sources: Sequence[TokenShards], weights: Sequence[Mapping[int, float]]):
        first = sources[0]
        for other in sources[1:]:
            ours, theirs = ((s.tokenizer_hash, s.eot_id, s.vocab_size) for s in (first, other))
            if ours != theirs:
                raise DataError(
                    f"{first.folder} and {other.folder} have different tokenizers ({ours[0][:12]} and {theirs[0][:12]}, end of "
                    f"text {ours[1]} and {theirs[1]}): prepare both with the same tokenizer"
                )
        self.sources = list(sources)
        for i, source in enumerate(self.sources):
            for other in self.sources[:i]:
                if source.fingerprint == other.fingerprint:
                    raise DataError(
                        f"{other.folder} and {source.folder} hold the same data: give it once, with the sum of the weights"
                    )
        self.folder, self.split = first.folder, first.split  # of the tokenizer
        self.vocab_size, self.eot_id, self.tokenizer_hash = first.vocab_size, first.eot_id, first.tokenizer_hash
        self.n_tokens = sum(source.n_tokens for source in sources)
        known = [source.n_bytes for source in sources if source.n_bytes is not None]
        self.n_bytes = sum(known) if len(known) == len(sources) else None
        prints = sorted(source.fingerprint for source in sources)
        self.fingerprint = prints[0] if len(prints) == 1 else json_hash(json.dumps(prints))  # independent of the weights
        self.dtype = np.result_type(*(source.dtype for source in sources))
        self._starts = np.cumsum([0] + [source.n_tokens for source in sources])
        self.phases = [
            Phase(step, [weight[max(s for s in weight if s <= step)] for weight in weights], [s.folder for s in sources])
            for step in sorted({step for weight in weights for step in weight})
        ]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [start, stop), which may extend over several sources."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.n_tokens}")
        parts = [
            source.read(max(start - base, 0), min(stop - base, source.n_tokens))
            for source, base in zip(self.sources, self._starts.tolist(), strict=False)
            if start < base + source.n_tokens and stop > base
        ]
        return np.concatenate(parts).astype(self.dtype) if parts else np.empty(0, self.dtype)

    def locate(self, position: int) -> tuple[Path, int]:
        """Return the file that holds the token at `position`, and the token's offset in it."""
        i = int(np.searchsorted(self._starts, position, "right")) - 1
        return self.sources[i].locate(position - int(self._starts[i]))

    @property
    def names(self) -> list[str]:
        """A name for each source: its folder's name, or the whole path if two folders have the same name."""
        short = [source.folder.name for source in self.sources]
        return [name if short.count(name) == 1 else str(s.folder) for name, s in zip(short, self.sources, strict=True)]


class Phase:
    """The mixture from a step on, until the next phase.

    order (D,): the source of sequence g is order[g % D]. shares: the exact share of each source.
    """

    def __init__(self, step: int, weights: Sequence[float], folders: Sequence[Path] = ()):
        self.step = step
        if not sum(weights) > 0:
            raise DataError(f"from step {step} on no source has a weight above 0")
        parts = whole_parts(weights)
        for i, (weight, part) in enumerate(zip(weights, parts, strict=True)):
            if weight and not part:
                share = f"less than 1/{RESOLUTION:,} of the mixture"
                raise DataError(f"the weight {weight:g} of {folders[i]} is {share}: raise it, or leave the source out")
        self.shares = [Fraction(part, sum(parts)) for part in parts]
        self.order = spread(parts)
        self._counts = np.zeros((len(self.order) + 1, len(parts)), np.int64)
        np.cumsum(self.order[:, None] == np.arange(len(parts)), 0, out=self._counts[1:])

    def count(self, g: int) -> np.ndarray:
        """Return how many of the sequences 0 to g - 1 each source would give in this phase, (K,) int64."""
        periods, rest = divmod(g, len(self.order))
        return periods * self._counts[-1] + self._counts[rest]


def whole_parts(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in proportion to the weights.

    The proportion is exact if that is possible with a sum of at most RESOLUTION. Else the numbers are rounded to that sum.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= RESOLUTION:
        return [int(share * period) for share in shares]
    parts = [int(share * RESOLUTION) for share in shares]
    remainders = [share * RESOLUTION - part for share, part in zip(shares, parts, strict=True)]
    for i in sorted(range(len(parts)), key=lambda i: -remainders[i])[: RESOLUTION - sum(parts)]:
        parts[i] += 1
    return parts


def spread(parts: Sequence[int]) -> np.ndarray:
    """Return an order (D,) of the sources, in which source k occurs parts[k] times, evenly spread. D is the sum of `parts`.

    After any g places, the count of source k differs from g parts[k] / D by less than one. Sequence j of source k (from 0) may
    take a place from j D / parts[k] on, and must take one before (j + 1) D / parts[k]. Of the sources that may take a place, the
    one with the earliest deadline gets it (Baruah et al. 1996).
    """
    total, taken = sum(parts), [0] * len(parts)
    order = np.empty(total, np.int64)
    for place in range(total):
        allowed = [k for k, part in enumerate(parts) if taken[k] * total < part * (place + 1)]
        order[place] = k = min(allowed, key=lambda k: (taken[k] + 1) / parts[k])
        taken[k] += 1
    return order


def sources_of(shards: TokenShards) -> tuple[list[TokenShards], list[Phase]]:
    """Return the sources and phases of a mixture. A split that is not a mixture is its own only source."""
    return (shards.sources, shards.phases) if isinstance(shards, Mixture) else ([shards], [Phase(0, [1])])


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Return the phase that contains `step`."""
    return next(phase for phase in reversed(phases) if phase.step <= step)
