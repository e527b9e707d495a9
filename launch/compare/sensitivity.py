"""What a search says beside its best setting: how sensitive an optimizer is to each key, and what tuning it was worth."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from statistics import fmean
from typing import Any

from celo2.training.search import MARGIN, Search, line, sensitivity
from celo2.training.statistics import difference


def search_record(s: Search) -> dict[str, Any]:
    """The entry `search` of an optimizer in results.json.

    `lr` and `adamw_lr`: losses along the key, all others at their best. `chosen_lr`: the best, from which a ladder derives its
    rates (older files lack it: there it is that of the final runs). `keys`: the losses along every key, with the loss at twice
    and half its value and the range within MARGIN of the best. `put_back`: how much the loss rises when one key alone goes back
    to its first value, with its interval over the search's seeds. `points`: every setting that was tried.
    """
    tried, chosen = s.tried, s.chosen
    names = [key.name for key in s.keys]
    through = next(iter(tried), s.start) if chosen is None else chosen
    lines = {name: line(tried, through, i) for i, name in enumerate(names)}
    found: dict[str, Any] = {
        "lr": losses_of(lines.get("lr", {})),
        "adamw_lr": losses_of(lines.get("adamw_lr", {})),
        "chosen_lr": s.value("lr"),
        "trials": s.trials,
        "notes": s.notes,
        "seeds": max((len(losses) for losses in s.losses.values()), default=0),
        "margin": MARGIN,
        "keys": [],
        "put_back": [],
        "points": [{"values": dict(zip(names, point, strict=True)), "loss": finite(loss)} for point, loss in tried.items()],
        "start": finite(tried.get(s.start, float("inf"))),
        "best": None,
    }
    if chosen is None or chosen not in tried:
        return found
    found["best"] = tried[chosen]
    found["keys"] = [asdict(entry) for entry in sensitivity(s.keys, tried, chosen)]
    best = dict(enumerate(s.losses[chosen]))
    for name, losses in s.back.items():
        key = next(key for key in s.keys if key.name == name)
        entry: dict[str, Any] = {"key": name, "value": key.first, "loss": finite(fmean(losses)), "worth": None, "half": None}
        if entry["loss"] is not None:
            gap = difference(dict(enumerate(losses)), best)
            entry |= {"worth": gap.mean, "half": gap.half}
        found["put_back"].append(entry)
    return found


def losses_of(losses: dict[float, float]) -> list[dict[str, float | None]]:
    """Losses by value as JSON; null: diverged."""
    return [{"value": value, "loss": finite(loss)} for value, loss in sorted(losses.items())]


def finite(loss: float) -> float | None:
    """A loss as JSON."""
    return loss if isfinite(loss) else None


def worth_sentence(label: str, record: dict[str, Any]) -> str | None:
    """How much the search lowered an optimizer's loss, and the part of each key alone; None if no key moved, or if unknown."""
    if record["start"] is None or record["best"] is None or not record["put_back"]:
        return None
    gain = record["start"] - record["best"]
    parts = []
    for entry in sorted(record["put_back"], key=lambda e: -(e["worth"] if e["worth"] is not None else float("inf"))):
        worth = "all of it (it diverges)" if entry["worth"] is None else f"{entry['worth']:.3f}".replace("-", "−")
        spread = f" ± {entry['half']:.3f}" if entry["half"] is not None else ""
        what = "adamw_lr, AdamW's part alone," if entry["key"] == "adamw_lr" else entry["key"]
        parts.append(f"{what} back at {entry['value']:g} loses {worth}{spread}")
    seeds = f"{record['seeds']} seed{'s' * (record['seeds'] > 1)} of the search"
    return f"{label}: tuning lowered its loss by {gain:.3f} ({seeds}). Of this, {'; '.join(parts)}."
