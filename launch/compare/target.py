"""Steps, tokens and seconds to a target loss, and a strict test whether a contestant ends below it.

The test is that of the speedrun records of modded-nanogpt, track 3, (target − mean) √n ≥ 0.004 where a run's SD is 0.0013: a
one-sided test at z = 3.08, p = 0.001. Here the SD is estimated from the seeds, so that Student's t replaces the normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scipy.special import stdtr, stdtrit

from celo2.training.statistics import POWER, detectable, estimate
from launch.compare.curves import Run, reaches

RECORD_LEVEL = 0.001  # one-sided: 1 − Φ(0.004 / 0.0013) = 0.00105


def target_record(groups: Mapping[str, Sequence[Run]], target: float) -> dict[str, Any]:
    """The section `target` of results.json: what each optimizer needs to reach the loss `target`, and its test."""
    rows = [target_row(label, runs, target) for label, runs in groups.items()]
    return {"loss": target, "level": RECORD_LEVEL, "power": POWER, "rows": rows, "sentences": sentences(rows, target)}


def target_row(label: str, runs: Sequence[Run], target: float) -> dict[str, Any]:
    """One optimizer's row. A run that diverged counts as one that did not reach the target, and then there is no test."""
    sound = [run for run in runs if run.status != "diverged" and run.validation]
    hits = [(run, x) for run in sound if (x := reaches(run.losses(), target)) is not None]
    row: dict[str, Any] = {"label": label, "asked": len(runs), "reached": len(hits)}
    row["at_most"] = any(x == run.losses()[0][0] for run, x in hits)
    measures = {"tokens": [x for _, x in hits], "steps": [run.steps_at(x) for run, x in hits]}
    measures["seconds"] = [run.seconds_at(x) for run, x in hits]
    for key, values in measures.items():
        row[key] = fmean(values) if values else None
        row[f"{key}_range"] = [min(values), max(values)] if values else None
    finals = [run.validation[-1]["val_loss"] for run in sound]
    loss = estimate(finals) if finals else None
    row |= {"mean": loss and loss.mean, "sd": loss and loss.sd, "n": len(finals), "margin": None, "needed": None, "p": None}
    row |= {"below": False, "detectable": None}
    if loss and loss.sd is not None and len(finals) == len(runs):
        n, gap = loss.n, target - loss.mean
        needed = float(stdtrit(n - 1, 1 - RECORD_LEVEL)) * loss.sd / math.sqrt(n)
        p = (0.0 if gap > 0 else 1.0) if loss.sd == 0 else float(stdtr(n - 1, -gap * math.sqrt(n) / loss.sd))
        smallest = detectable(n, RECORD_LEVEL, sides=1)
        row |= {"margin": gap, "needed": needed, "p": p, "below": p < RECORD_LEVEL}
        row["detectable"] = None if smallest is None else smallest * loss.sd
    return row


def sentences(rows: Sequence[Mapping[str, Any]], target: float) -> list[str]:
    """The sentences of the report, the fastest optimizer first."""
    there = sorted((row for row in rows if row["reached"]), key=lambda row: (-row["reached"] / row["asked"], row["tokens"]))
    if not there:
        known = [row for row in rows if row["mean"] is not None]
        lowest = min(known, key=lambda row: row["mean"]) if known else None
        near = f"; the lowest mean is {lowest['mean']:.4f}, of {lowest['label']}" if lowest else ""
        return [f"No run reached the target loss of {target:g}{near}."]
    said = []
    for row in there:
        some = "" if row["reached"] == row["asked"] else f" in {row['reached']} of {row['asked']} runs"
        most = "at most " if row["at_most"] else ""
        cost = f"{row['label']} reaches {target:g} after {most}{row['steps']:,.0f} steps, {row['tokens']:,.0f} tokens, "
        cost += f"{row['seconds']:,.1f} s{some}"
        said.append(f"{cost}; {verdict(row)}.")
    never = [row["label"] for row in rows if not row["reached"]]
    return [*said, *([f"Never at {target:g}: {', '.join(never)}."] if never else [])]


def verdict(row: Mapping[str, Any]) -> str:
    """The test in words, with its own power."""
    if row["p"] is None:
        return "no test with one seed" if row["n"] == row["asked"] else "no test, since runs diverged"
    power = ""
    if row["detectable"] is not None:
        power = f"; with SD {row['sd']:.4f} and {row['n']} seeds the test sees {row['detectable']:.4f} with {POWER:.0%} power"
    ends = "ends below it" if row["below"] else "is not shown to end below it"
    return f"it {ends} (by {row['margin']:.4f}, {row['needed']:.4f} are needed, p = {row['p']:.2g}{power})".replace("-0.", "−0.")
