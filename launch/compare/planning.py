"""How many seeds tell two contestants apart: estimated from the search before the final runs, and from these afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from statistics import fmean, variance
from typing import Any

from celo2.training.search import Search
from celo2.training.statistics import POWER, detectable, half_width, seeds_needed

HARDEST = 4  # at most this many pairs are named


def planned(searches: Mapping[str, Search], seeds: int) -> dict[str, Any]:
    """The section `planned` of results.json: the seeds that each pair would need, by the losses of the search, paired by seed.

    The spread of a paired difference is pooled over the pairs. With one seed in the search, the spread is not known.
    """
    least = detectable(seeds)
    found: dict[str, Any] = {"seeds": seeds, "power": POWER, "detectable_sds": least, "sd": None, "pairs": [], "sentences": []}
    best = {label: s.losses[s.chosen] for label, s in searches.items() if s.chosen is not None and s.chosen in s.losses}
    gaps = {
        (a, b): [x - y for x, y in zip(best[a], best[b], strict=True)]
        for a, b in combinations(sorted(best, key=lambda k: fmean(best[k])), 2)
    }
    if least is not None:
        found["sentences"].append(
            f"{seeds} seeds show a difference of {least:.1f} SDs of the paired difference with {POWER:.0%} power (two-sided, "
            "p < 0.05)."
        )
    if not gaps or len(next(iter(gaps.values()))) < 2:
        return found
    sd = math.sqrt(fmean(variance(values) for values in gaps.values()))
    found["sd"] = sd
    count = len(next(iter(gaps.values())))
    for (a, b), values in gaps.items():
        found["pairs"].append({"a": a, "b": b, "difference": fmean(values), "seeds_needed": seeds_needed(fmean(values), sd)})
    if least is not None:
        found["sentences"][0] += f" The search's {count} seeds put that SD at {sd:.4f}: {least * sd:.3f} nats."
    hard = sorted((p for p in found["pairs"] if (p["seeds_needed"] or math.inf) > seeds), key=lambda p: abs(p["difference"]))
    for pair in hard[:HARDEST]:
        needed = "more than 10,000" if pair["seeds_needed"] is None else f"about {pair['seeds_needed']:,}"
        found["sentences"].append(
            f"{pair['a']} and {pair['b']} differ by {abs(pair['difference']):.4f} in the search: to tell them apart takes "
            f"{needed} seeds."
        )
    return found


def seeds_for(mean: float, half: float | None, n: int, paired: bool) -> int | None:
    """The pairs of seeds that a measured, paired difference would need, from the interval of its n pairs."""
    if half is None or not paired or n < 2:
        return None
    return seeds_needed(mean, half / half_width(1.0, n - 1) * math.sqrt(n))
