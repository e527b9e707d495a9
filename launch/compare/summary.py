"""All numbers and sentences of a report as one JSON object: `results.json`, and what the page and the picture show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import mean, median
from typing import Any

import numpy as np

from celo2.training.search import Search
from celo2.training.statistics import CONFIDENCE, Difference, difference, estimate, holm
from configs.load import to_yaml
from launch.compare.curves import Run, at, other_differences, reaches, thinned, upto
from launch.compare.evaluations import other_curves, other_evaluations
from launch.compare.planning import seeds_for
from launch.compare.sensitivity import search_record, worth_sentence
from launch.compare.target import target_record
from launch.optimizers.table import rate_of_the_rest

LEVEL = 1 - CONFIDENCE
SAME_LENGTH = 1e-3  # runs of equally many steps differ by a few tokens, since the last sequence of an epoch is shorter
TRAINING = ("step", "tokens", "seconds", "loss", "grad_norm", "update_rms", "update_ratio")  # what the charts show
MOST_POINTS = 1000  # of a curve

Groups = Mapping[str, Sequence[Run]]  # the final runs of each optimizer, by label


def summarize(
    groups: Groups, searches: Mapping[str, Search], about: dict[str, Any], target_loss: float | None = None
) -> dict[str, Any]:
    """The report's contents. `about`: title, command, machine, versions, method (sentences); `target_loss`: see `target`."""
    sound = {label: [run for run in runs if run.status != "diverged" and run.validation] for label, runs in groups.items()}
    diverged = {label: [run.seed for run in runs if run.status == "diverged"] for label, runs in groups.items()}
    everything = [run for runs in sound.values() for run in runs]
    tokens = min((run.tokens for run in everything), default=0)
    finals = {label: {run.seed: at(run.losses(), tokens) for run in runs} for label, runs in sound.items()}
    whole = [label for label in groups if finals[label] and not diverged[label]]
    means = {label: mean(finals[label].values()) for label in whole}
    pairs = pairwise(sound, finals, sorted(whole, key=means.__getitem__), tokens)
    target = max((loss for label in whole for loss in finals[label].values()), default=None)
    missing = [label for label in groups if label not in whole]
    sentences = [sentence(pair, len(pairs)) for pair in pairs]
    sentences += [divergence(label, len(diverged[label]), len(groups[label])) for label in missing]
    rows = [row(label, runs, finals[label], tokens, target, searches.get(label)) for label, runs in groups.items()]
    worth = [worth_sentence(r["label"], r["search"]) for r in rows if r["search"]]
    return about | {
        "confidence": CONFIDENCE,
        "compared_at_tokens": tokens,
        "target_loss": target,
        "sentences": sentences,
        "caveats": caveats(everything, tokens),
        "optimizers": rows,
        "pairs": pairs,
        "tuning": [text for text in worth if text],
        "target": target_record(groups, target_loss) if target_loss is not None else None,
        "evaluations": other_evaluations(sound),
        "runs": [curves(run) for runs in groups.values() for run in runs],
    }


def pairwise(groups: Groups, finals: Mapping[str, Mapping[int, float]], labels: Sequence[str], tokens: float) -> list[dict]:
    """Every pair of `labels`, which come lowest mean first, with its difference and whether that is a claim."""
    pairs = []
    for low, high in combinations(labels, 2):
        gap: Difference = difference(finals[low], finals[high])
        if gap.mean > 0:  # over the seeds that both have, the order may be reversed
            low, high, gap = high, low, difference(finals[high], finals[low])
        shares = reach(groups[low], groups[high], gap.paired, tokens)
        needed = seeds_for(gap.mean, gap.half, gap.n, gap.paired)
        pairs.append({"a": low, "b": high, **asdict(gap), "seeds_needed": needed, "reach": shares})
    for pair, corrected in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_corrected"] = corrected
        pair["claim"] = corrected is not None and corrected < LEVEL
    return pairs


def reach(runs: Sequence[Run], others: Sequence[Run], paired: bool, tokens: float) -> dict[str, Any]:
    """The share of the others' tokens and seconds with which `runs` reach the others' loss at `tokens`.

    By seed if `paired`; else each run against the mean of the others. Shares are means over the runs that reach it, with the
    smallest and the largest. `at_most`: some run had reached it already at its first evaluation.
    """
    by_seed = {run.seed: run for run in others}
    level = mean(at(run.losses(), tokens) for run in others)
    clock = mean(run.seconds_at(tokens) for run in others)
    shares: list[tuple[float, float]] = []
    at_most = False
    asked = [run for run in runs if not paired or run.seed in by_seed]
    for run in asked:
        other = by_seed.get(run.seed) if paired else None
        goal, seconds = (at(other.losses(), tokens), other.seconds_at(tokens)) if other else (level, clock)
        x = reaches(upto(run.losses(), tokens), goal)
        if x is not None:
            shares.append((x / tokens, run.seconds_at(x) / seconds))
            at_most |= x == run.losses()[0][0]
    result: dict[str, Any] = {"asked": len(asked), "reached": len(shares), "at_most": at_most}
    for key, values in zip(("tokens", "seconds"), zip(*shares, strict=True), strict=False):
        result |= {key: mean(values), f"{key}_range": [min(values), max(values)]}
    return result


def sentence(pair: dict[str, Any], pairs: int = 1) -> str:
    """The sentence about one of `pairs` pairs. It makes a claim only if the corrected test supports that."""
    a, b, n = pair["a"], pair["b"], pair["n"]
    if pair["p"] is None:
        return f"{a} and {b}: one seed tells no difference from noise, so nothing is claimed (measured {number(pair['mean'])})."
    spread = f"{number(pair['half'])}" if pair["half"] >= 5e-4 else f"{pair['half']:.1g}"
    seeds = f"{n} seeds" if pair["paired"] else f"{n} seeds each, unpaired"
    p = "p < 0.001" if pair["p_corrected"] < 1e-3 else f"p = {pair['p_corrected']:.2g}"
    if not pair["claim"]:
        p += f" when corrected for {pairs} pairs" if pair["p"] < LEVEL else ""  # the interval alone would make it a claim
        return f"{a} and {b}: no difference beyond the noise ({number(pair['mean'])} ± {spread}, {seeds}, {p})."
    said = f"{a} has a lower loss than {b}, by {number(-pair['mean'])} ± {spread} ({seeds}, {p})"
    r = pair["reach"]
    if not r["reached"]:
        return f"{said}; it never reaches {b}'s final loss in a single run."
    where = "" if r["reached"] == r["asked"] else f" in {r['reached']} of {r['asked']} runs"
    shares = f"{saving(r['tokens'], 'fewer', 'tokens', r['at_most'])} and {saving(r['seconds'], 'less', 'time', r['at_most'])}"
    return f"{said}; it reaches {b}'s final loss with {shares}{where}."


def saving(share: float, word: str, what: str, at_most: bool) -> str:
    """What a share of another's tokens or time means: 0.97 is "3 % fewer tokens", or at least that if the share is a bound."""
    percent = round(100 * (1 - share))
    if share >= 2:
        return f"{'at most ' if at_most else ''}{share:.1f} times the {what}"
    if percent == 0:
        return f"{'at most ' if at_most else ''}as {'many' if word == 'fewer' else 'much'} {what}"
    if percent < 0:
        return f"{'at most ' if at_most else ''}{-percent} % more {what}"
    return f"{'at least ' if at_most else ''}{percent} % {word} {what}"


def number(value: float) -> str:
    """A loss difference with three decimal places and a true minus."""
    return f"{value:.3f}".replace("-", "−")


def divergence(label: str, count: int, of: int) -> str:
    """The sentence about an optimizer without a whole set of finished runs."""
    if not of:
        return f"{label} diverged at every learning rate that was tried: it is not compared."
    return (
        f"{label} diverged in {count} of {of} seeds: its final loss is not compared." if count else f"{label} has no evaluation."
    )


def caveats(runs: Sequence[Run], tokens: float) -> list[str]:
    """What a reader must know before believing the numbers."""
    said = other_differences(list(runs)) if runs else []
    longest = max((run.tokens for run in runs), default=0)
    if longest > tokens * (1 + SAME_LENGTH):
        said.append(
            f"The runs have different lengths: they are compared at {tokens:,.0f} tokens, the shortest (the longest has "
            f"{longest:,.0f}), where the learning-rate schedules of the longer ones were not at their end."
        )
    unfinished = [str(run.folder) for run in runs if run.status == "unfinished"]
    if unfinished:
        said.append(f"Not finished, taken as far as they are: {', '.join(unfinished)}.")
    said += [f"{run.folder} was changed on its way: {', '.join(run.changes)}." for run in runs if run.changes]
    if runs and not any("optimizer_seconds" in r for run in runs for r in run.training):
        said.append("These runs logged neither the time of an optimizer step nor update statistics.")
    return said


def row(
    label: str, runs: Sequence[Run], finals: Mapping[int, float], tokens: float, target: float | None, search: Search | None
) -> dict[str, Any]:
    """One optimizer's line of the table, with its search; `finals` holds the final losses of sound runs by seed."""
    config = runs[0].config.optimizer if runs else None
    sound = [run for run in runs if run.seed in finals]
    timed = [r["optimizer_seconds"] for run in sound for r in run.training[1:] if "optimizer_seconds" in r]
    sizes = [run.state_bytes for run in sound if run.state_bytes is not None]
    asked = [(run, reaches(upto(run.losses(), tokens), target)) for run in sound] if target is not None else []
    hits = [(run, x) for run, x in asked if x is not None]
    result: dict[str, Any] = {
        "label": label,
        "lr": config.lr if config else None,
        "adamw_lr": rate_of_the_rest(config) if config else None,
        "seeds": [run.seed for run in runs],
        "diverged_seeds": [run.seed for run in runs if run.status == "diverged"],
        "final": {str(seed): loss for seed, loss in finals.items()},
        "loss": asdict(estimate(list(finals.values()))) if finals else None,
        "interpolated": any(all(x != tokens for x, _ in run.losses()) for run in sound),
        "step_seconds": median(run.seconds_at(run.tokens) / run.validation[-1]["step"] for run in sound) if sound else None,
        "optimizer_seconds": median(timed) if timed else None,
        "state_bytes": max(sizes, default=None),
        "to_target": None,
        "search": None,
    }
    if hits:
        result["to_target"] = {
            "reached": len(hits),
            "asked": len(sound),
            "at_most": any(x == run.losses()[0][0] for run, x in hits),
            "tokens": mean(x for _, x in hits),
            "steps": mean(run.steps_at(x) for run, x in hits),
            "seconds": mean(run.seconds_at(x) for run, x in hits),
        }
    if search is not None:
        result["search"] = search_record(search)
    return result


def curves(run: Run) -> dict[str, Any]:
    """What the page draws of a run, with the command and configuration that repeat it."""
    training, validation = thinned(run.training, MOST_POINTS), thinned(run.validation, MOST_POINTS)
    columns = [name for name in TRAINING if any(name in r for r in training)]
    tokens = [r["tokens"] for r in validation]
    at_tokens, clock = zip(*run.clock, strict=True)
    seconds = np.interp(tokens, at_tokens, clock).tolist()  # one by one, thousands would take minutes
    return {
        "label": run.label,
        "seed": run.seed,
        "status": run.status,
        "folder": str(run.folder),
        "command": run.command,
        "config": to_yaml(run.config),
        "flops_per_token": run.flops_per_token,
        "training": {name: [digits(r.get(name)) for r in training] for name in columns},
        "validation": {
            "step": [r["step"] for r in validation],
            "tokens": tokens,
            "seconds": [digits(value) for value in seconds],
            "val_loss": [digits(r["val_loss"]) for r in validation],
        }
        | {key: [digits(r.get(key)) for r in validation] for key in other_curves(run)},
    }


def digits(value: float | None) -> float | None:
    """Seven significant digits: as many as float32 has."""
    return value if value is None or isinstance(value, int) else float(f"{value:.7g}")
