"""The search for hyperparameters: coordinate descent on a grid of factors, as a pure function of what was tried.

A setting is a tuple of numbers, one for each key; its loss is a mean over seeds, infinite where a training run diverged. The
next setting follows from the losses so far, so that a search which was interrupted needs no memory but its training runs.

Why coordinate descent: it found better settings than Optuna's samplers for the same number of trials (docs/comparing.md), and the
lines that it leaves through its best setting are the sensitivity of the optimizer to each key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

FACTOR = 2.0  # between neighbours of a grid of learning rates
MOST_ROUNDS = 6  # of one more trial; beyond a factor of 64 something else is wrong

Setting = tuple[float, ...]
Losses = Mapping[float, float]  # along one key
Tried = Mapping[Setting, float]


@dataclass(frozen=True)
class Key:
    """One hyperparameter that is searched for."""

    name: str
    first: float  # where the search begins
    factor: float = FACTOR  # to its first neighbours
    values: tuple[float, ...] = ()  # ascending; the only ones, `first` among them. Empty: any positive number
    digits: int | None = None  # significant ones of a value that is tried, for names of folders

    def rounded(self, value: float) -> float:
        """A value as it is tried."""
        return value if self.digits is None else float(f"{value:.{self.digits}g}")


@dataclass
class Search:
    """What one optimizer has tried."""

    keys: tuple[Key, ...]
    losses: dict[Setting, tuple[float, ...]] = field(default_factory=dict)  # validation losses by seed of the search
    notes: list[str] = field(default_factory=list)
    given: Setting | None = None  # a setting that was not searched for
    back: dict[str, tuple[float, ...]] = field(default_factory=dict)  # the chosen setting with this key where it began

    @property
    def tried(self) -> dict[Setting, float]:
        """The mean loss of every setting."""
        return {setting: fmean(losses) for setting, losses in self.losses.items()}

    @property
    def chosen(self) -> Setting | None:
        """The best setting; None if every trial diverged."""
        return best(self.tried) if self.given is None else self.given

    @property
    def start(self) -> Setting:
        """Where the search began."""
        return tuple(key.first for key in self.keys)

    @property
    def trials(self) -> int:
        """How many settings were tried."""
        return len(self.losses)

    def value(self, name: str) -> float | None:
        """The chosen value of a key; None if there is none."""
        index = next((i for i, key in enumerate(self.keys) if key.name == name), None)
        return None if index is None or self.chosen is None else self.chosen[index]


def grid(centre: float, trials: int, factor: float = FACTOR) -> list[float]:
    """`trials` values, `factor` apart, around `centre`; the odd one above it."""
    below = (trials - 1) // 2
    return [centre * factor ** (i - below) for i in range(trials)]


def best(tried: Tried) -> Setting | None:
    """The setting of the lowest loss; None if none is finite."""
    finite = [(loss, setting) for setting, loss in tried.items() if math.isfinite(loss)]
    return min(finite)[1] if finite else None


def line(tried: Tried, through: Setting, index: int) -> dict[float, float]:
    """The losses of all settings that differ from `through` in the key `index` alone, by its value, ascending."""
    found = {s[index]: loss for s, loss in tried.items() if moved(s, index, through[index]) == through}
    return dict(sorted(found.items()))


def moved(setting: Setting, index: int, value: float) -> Setting:
    """`setting` with another value of one key."""
    return (*setting[:index], value, *setting[index + 1 :])


def edge(key: Key, losses: Losses, value: float) -> str | None:
    """ "below" or "above" where `value` is the smallest or largest tried on its line; None if it lies between two others, or
    if there is nothing beyond."""
    lowest, highest = (key.values[0], key.values[-1]) if key.values else (0.0, math.inf)
    if value == max(losses) and value < highest and (len(losses) == 1 or value != min(losses)):
        return "above"
    return "below" if value == min(losses) and value > lowest else None


def next_value(key: Key, losses: Losses, value: float) -> float | None:
    """The most useful further value on the line of `value`, the best of it: beyond an edge, or else in the middle of its wider
    interval (of equal ones the upper, unless that end diverged). None: there is none."""
    side, tried = edge(key, losses, value), sorted(losses)
    place = tried.index(value)
    if key.values:
        i = key.values.index(value)
        return None if side is None else key.values[i + 1 if side == "above" else i - 1]
    if side is not None:
        steps = tried[:2] if side == "below" else tried[-2:]
        ratio = max(steps[1] / steps[0], key.factor) if len(steps) > 1 else key.factor
        return key.rounded(value / ratio if side == "below" else value * ratio)
    below, above = tried[place - 1], tried[place + 1]
    up = above / value >= value / below
    if math.isclose(above / value, value / below) and math.isinf(losses[above]):
        up = False
    middle = key.rounded(math.sqrt(value * (above if up else below)))
    return None if middle in losses else middle


def open_sides(keys: Sequence[Key], tried: Tried) -> dict[str, str]:
    """The keys whose best value lies at the edge of what was tried with all others at their best, and the side."""
    chosen = best(tried)
    if chosen is None:
        return {keys[0].name: "below"}
    sides = {key.name: edge(key, line(tried, chosen, i), chosen[i]) for i, key in enumerate(keys)}
    return {name: side for name, side in sides.items() if side is not None}


def next_setting(keys: Sequence[Key], tried: Tried) -> Setting | None:
    """The most useful further setting. None: the lists of values allow no other.

    The first key whose best value lies at an edge moves beyond it. If none does, the key with the widest interval around its
    best value gets a value within. If everything diverged, the first key goes below its smallest value.
    """
    chosen = best(tried)
    if chosen is None:
        smallest = min(tried)
        return None if keys[0].values else moved(smallest, 0, keys[0].rounded(smallest[0] / keys[0].factor))
    widest: list[tuple[float, int, Setting]] = []
    for index, key in enumerate(keys):
        losses = line(tried, chosen, index)
        value = next_value(key, losses, chosen[index])
        if value is None:
            continue
        if edge(key, losses, chosen[index]) is not None:
            return moved(chosen, index, value)
        values = list(losses)
        place = values.index(chosen[index])
        widest.append((values[place + 1] / values[place - 1], -index, moved(chosen, index, value)))
    return max(widest)[2] if widest else None


def begin(keys: Sequence[Key], firsts: Sequence[float]) -> list[Setting]:
    """The first settings: the first key at each of `firsts`, the others where they begin."""
    return [(keys[0].rounded(value), *(key.first for key in keys[1:])) for value in firsts]


Evaluate = Callable[[str, list[tuple[str, Setting]]], list[tuple[float, ...]]]


def search(
    searches: Mapping[str, Search],
    firsts: Mapping[str, list[Setting]],
    trials: int,
    evaluate: Evaluate,
    say: Callable[[str], None],
) -> None:
    """Fill every optimizer's search with as many trials: `firsts` at once, then one after the other until each has `trials`.

    While anybody's best then lies at the edge of what was tried, everybody gets one more trial, at most MOST_ROUNDS times: beyond
    the edge, or the most useful further one. So all of them spend as many trials, and none owes its loss to a search that ended
    early. `evaluate(phase, [(label, setting), ...])` runs trials, at once where it can, and returns their losses by seed.
    """

    def try_all(phase: str, wanted: list[tuple[str, Setting]]) -> None:
        for (label, setting), losses in zip(wanted, evaluate(phase, wanted), strict=True):
            searches[label].losses[setting] = losses

    def try_next(phase: str) -> bool:
        found = {label: next_setting(s.keys, s.tried) for label, s in searches.items()}
        wanted = [(label, setting) for label, setting in found.items() if setting is not None]
        if wanted:
            try_all(phase, wanted)
        return bool(wanted)

    try_all("search", [(label, setting) for label, settings in firsts.items() for setting in settings])
    done = max(map(len, firsts.values()))
    while done < trials and try_next(f"search, trial {done + 1} of {trials}"):
        done += 1
    for number in range(1, MOST_ROUNDS + 1):
        open_keys = {label: open_sides(s.keys, s.tried) for label, s in searches.items()}
        if not any(open_keys.values()):
            break
        for label, s in searches.items():
            setting = next_setting(s.keys, s.tried)
            if setting is None:
                continue
            reason = explained(s, setting, open_keys[label])
            s.notes.append(reason)
            say(f"{label}: {reason}")
        try_next(f"extension {number}")
    for label, s in searches.items():
        sides, said = open_sides(s.keys, s.tried), len(s.notes)
        if s.chosen is None:
            s.notes.append(f"every {s.keys[0].name} that was tried diverged")
        else:
            s.notes += [still_open(s, sides)] if sides else []
        for note in s.notes[said:]:
            say(f"{label}: {note}")


def still_open(s: Search, sides: Mapping[str, str]) -> str:
    """Which keys have their best value at the edge of what was tried, when no further trials are left."""
    beyond = " and ".join(f"{side} {s.value(name):g}" for name, side in sides.items())
    one = len(sides) == 1
    return (
        f"its best {' and '.join(sides)} {'is' if one else 'are'} still at the edge after {MOST_ROUNDS} extensions: "
        f"{'a value' if one else 'values'} {beyond} may be better"
    )


def explained(s: Search, setting: Setting, sides: Mapping[str, str]) -> str:
    """Why a further trial has this setting."""
    chosen = s.chosen
    if chosen is None:
        return f"every trial diverged: tries {s.keys[0].name} {setting[0]:g} below them"
    index = next(i for i in range(len(setting)) if setting[i] != chosen[i])
    name, value = s.keys[index].name, setting[index]
    if name in sides:
        others = [f"{other}, {s.value(other):g}" for other in sides if other != name]
        too = f" (so is its best {' and '.join(others)})" if others else ""
        return f"its best {name}, {chosen[index]:g}, is at the edge of its grid{too}: tries {value:g} {sides[name]} it"
    return f"tries {name} {value:g} beside its best, for the same budget"


def at_the_start(s: Search) -> dict[str, Setting]:
    """The chosen setting with one key put back to where the search began, by the name of each key that it moved."""
    chosen = s.chosen
    if chosen is None:
        return {}
    return {key.name: moved(chosen, i, key.first) for i, key in enumerate(s.keys) if chosen[i] != key.first}


def lowered(s: Search, names: Sequence[str], error: float) -> Setting:
    """The chosen setting with lower values where the search does not tell them from it: each key of `names`, one after the other,
    at the lowest value on its line whose loss is at most `error` above the chosen one's. One that was given stays.

    Raises:
        ValueError: every trial diverged.
    """
    through = s.chosen
    if through is None:
        raise ValueError("every trial diverged: no setting was chosen")
    if s.given is not None:
        return through
    limit = s.tried[through] + error
    for index, key in enumerate(s.keys):
        if key.name in names:
            low = min(value for value, loss in line(s.tried, through, index).items() if loss <= limit)
            through = moved(through, index, low)
    return through


@dataclass(frozen=True)
class Sensitivity:
    """How the loss depends on one key, all others at their best."""

    key: str
    chosen: float
    curve: list[tuple[float, float]]  # (value, mean loss), as tried
    doubled: float | None  # loss above the best with twice the value; None: not bracketed by trials
    halved: float | None
    low: float | None  # where the loss is `MARGIN` above the best; None: beyond what was tried
    high: float | None


MARGIN = 0.01  # nats


def sensitivity(keys: Sequence[Key], tried: Tried, through: Setting) -> list[Sensitivity]:
    """The line of every key through a setting; between trials, straight in the logarithm of the value. What diverged is not
    interpolated to, and of a key with values of its own only the curve is known."""
    found = []
    for index, key in enumerate(keys):
        losses = line(tried, through, index)
        curve = [(value, loss) for value, loss in losses.items() if math.isfinite(loss)]
        value = through[index]
        lowest = tried[through]
        if key.values:
            found.append(Sensitivity(key.name, value, curve, None, None, None, None))
            continue
        doubled, halved = (excess(curve, value * factor, lowest) for factor in (2.0, 0.5))
        low = crossing([p for p in reversed(curve) if p[0] <= value], lowest + MARGIN)
        high = crossing([p for p in curve if p[0] >= value], lowest + MARGIN)
        found.append(Sensitivity(key.name, value, curve, doubled, halved, low, high))
    return found


def excess(curve: Sequence[tuple[float, float]], value: float, lowest: float) -> float | None:
    """The loss at `value` above `lowest`; None outside the curve."""
    for (a, u), (b, v) in pairwise(curve):
        if a * (1 - 1e-9) <= value <= b * (1 + 1e-9):
            share = math.log(value / a) / math.log(b / a)
            return u + share * (v - u) - lowest
    return None


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """The value at which points that lead away from the best come up to `level`; None if they do not."""
    for (a, u), (b, v) in pairwise(points):
        if v >= level > u:
            share = (level - u) / (v - u)
            return a * (b / a) ** share
    return None
