"""The search for a learning rate: a grid around the usual value, and rounds of one more trial for everybody.

Losses are by learning rate, infinite where a trial diverged. As long as the best value of any optimizer lies at the edge of
what it has tried, every optimizer gets one more trial: those at an edge extend their grid beyond it, the others halve the
interval beside their best. So all of them spend the same number of trials, and none owes its loss to a grid that ended early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

FACTOR = 2.0  # between neighbours of the grid
MOST_ROUNDS = 6  # of one more trial; beyond a factor of 64 something else is wrong

Losses = Mapping[float, float]


@dataclass
class Search:
    """What one optimizer has tried."""

    given: float | None = None  # a learning rate that was not searched for
    losses: dict[float, float] = field(default_factory=dict)  # validation loss by lr
    adamw: dict[float, float] = field(default_factory=dict)  # the same by adamw_lr, with the chosen lr
    notes: list[str] = field(default_factory=list)

    @property
    def lr(self) -> float | None:
        """The chosen learning rate; None if every trial diverged."""
        return best(self.losses) if self.given is None else self.given

    @property
    def adamw_lr(self) -> float | None:
        """The chosen adamw_lr; None if none that was tried is better than the configuration's."""
        chosen = best(self.adamw)
        usual = self.losses.get(self.lr, math.inf) if self.lr is not None else math.inf
        return chosen if chosen is not None and self.adamw[chosen] < usual else None

    @property
    def trials(self) -> int:
        """How many runs it has cost."""
        return len(self.losses) + len(self.adamw)


def rounded(lr: float) -> float:
    """Three digits: a learning rate that fits into a folder's name and reads back the same."""
    return float(f"{lr:.3g}")


def grid(centre: float, trials: int, factor: float = FACTOR) -> list[float]:
    """`trials` learning rates, `factor` apart, around `centre`; the odd one above it."""
    below = (trials - 1) // 2
    return [rounded(centre * factor ** (i - below)) for i in range(trials)]


def best(losses: Losses) -> float | None:
    """The learning rate of the lowest loss; None if none is finite."""
    finite = [(loss, lr) for lr, loss in losses.items() if math.isfinite(loss)]
    return min(finite)[1] if finite else None


def edge(losses: Losses) -> str | None:
    """ "below" or "above" where the best value is the smallest or largest tried; None if it lies between two others."""
    chosen = best(losses)
    if chosen is None or chosen == min(losses):  # if everything diverges, a smaller learning rate may not
        return "below"
    return "above" if chosen == max(losses) else None


def next_lr(losses: Losses) -> float:
    """The most useful further trial: beyond the edge that the best value lies at, or between it and its better neighbour."""
    tried, side = sorted(losses), edge(losses)
    if side is not None:
        ratio = max(tried[1] / tried[0] if side == "below" else tried[-1] / tried[-2], FACTOR) if len(tried) > 1 else FACTOR
        return rounded(tried[0] / ratio) if side == "below" else rounded(tried[-1] * ratio)
    middle = tried.index(min(tried, key=lambda lr: losses[lr]))
    left, right = tried[middle - 1], tried[middle + 1]
    return rounded(math.sqrt(tried[middle] * (left if losses[left] <= losses[right] else right)))


def search(
    grids: Mapping[str, list[float]],
    evaluate: Callable[[str, list[tuple[str, float]]], list[float]],
    say: Callable[[str], None],
) -> dict[str, Search]:
    """Every optimizer's search. `grids` has its first learning rates by label, equally many for all.

    `evaluate(phase, [(label, lr), ...])` runs trials, at once where it can, and returns their validation losses. One value in
    a grid is no search: it is taken as it is, without a trial.
    """
    searches = {label: Search() for label in grids}
    if all(len(lrs) == 1 for lrs in grids.values()):
        for label, (lr,) in grids.items():
            searches[label].given = lr
            searches[label].notes.append("one learning rate was given: no search")
        return searches

    def try_all(phase: str, wanted: list[tuple[str, float]]) -> None:
        for (label, lr), loss in zip(wanted, evaluate(phase, wanted), strict=True):
            searches[label].losses[lr] = loss

    try_all("search", [(label, lr) for label, lrs in grids.items() for lr in lrs])
    for number in range(1, MOST_ROUNDS + 1):
        sides = {label: edge(s.losses) for label, s in searches.items()}
        if not any(sides.values()):
            break
        wanted = [(label, next_lr(s.losses)) for label, s in searches.items()]
        for label, lr in wanted:
            chosen, side = searches[label].lr, sides[label]
            where = "every trial diverged" if chosen is None else f"its best, {chosen:g}, is at the edge of its grid"
            reason = f"{where}: tries {lr:g} {side} it" if side else f"tries {lr:g} beside its best, for the same budget"
            searches[label].notes.append(reason)
            say(f"{label}: {reason}")
        try_all(f"extension {number}", [(label, lr) for label, lr in wanted if lr not in searches[label].losses])
    for label, s in searches.items():
        side = edge(s.losses)
        if s.lr is None:
            s.notes.append("every learning rate that was tried diverged")
        elif side:
            s.notes.append(f"its best is still at the edge after {MOST_ROUNDS} extensions: a value {side} {s.lr:g} may be better")
        if s.lr is None or side:
            say(f"{label}: {s.notes[-1]}")
    return searches
