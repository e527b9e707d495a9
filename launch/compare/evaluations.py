"""Results of evaluations beside the validation loss: perplexity, further sets, tasks, averages of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from launch.compare.curves import Run

NOT_OTHERS = ("step", "tokens", "val_loss")
NO_CURVE = ("val_perplexity", "val_bits_per_byte")  # they follow from the loss of the same set


def other_keys(runs: Sequence[Run]) -> list[str]:
    """The keys of numbers in the last evaluations of `runs`, but for the validation loss."""
    return list(dict.fromkeys(key for run in runs for last in run.validation[-1:] for key in last if key not in NOT_OTHERS))


def other_curves(run: Run) -> list[str]:
    """The keys of which the page draws a chart."""
    return [key for key in other_keys([run]) if not any(part.startswith(NO_CURVE) for part in key.split("/"))]


def other_evaluations(groups: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Each quantity at the last evaluation of sound runs: {key, optimizers: {label: {mean, sd, n}}}."""
    rows = []
    for key in other_keys([run for runs in groups.values() for run in runs]):
        found: dict[str, dict[str, Any]] = {}
        for label, runs in groups.items():
            values = [run.validation[-1][key] for run in runs if run.validation[-1].get(key) is not None]
            if values:
                found[label] = {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "n": len(values)}
        if found:
            rows.append({"key": key, "optimizers": found})
    return rows
