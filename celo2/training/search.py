"""Hyperparameter search: coordinate descent on a grid of factors, as a pure function of the trials so far.

A setting is a tuple of numbers, one for each key. Its loss is the mean over seeds, infinite if a training run diverged. The next
setting depends only on the losses so far, so that an interrupted search can resume from its finished training runs alone.

Why coordinate descent: it found better settings than Optuna's samplers with the same number of trials (docs/comparing.md). Its
trials also form a line through the best setting along each key, which shows how sensitive the optimizer is to this key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

FACTOR = 2.0  # ratio of neighbouring learning rates in a grid
MOST_ROUNDS = 6  # extensions of one trial each; if the best value is off by more than a factor of 64, something else is wrong

Setting = tuple[float, ...]
Losses = Mapping[float, float]  # losses by the value of one key
Tried = Mapping[Setting, float]


@dataclass(frozen=True)
class Key:
    """One hyperparameter of a search."""

    name: str
    first: float  # where the search begins
    factor: float = FACTOR  # ratio to the first neighbours
    values: tuple[float, ...] = ()  # the only allowed values, ascending, including `first`. Empty: any positive number
    digits: int | None = None  # significant digits to round values to, because they appear in names of folders

    def rounded(self, value: float) -> float:
        """A value, rounded to `digits` significant digits."""
        return value if self.digits is None else float(f"{value:.{self.digits}g}")


@dataclass
class Search:
    """The search of one optimizer: its keys and the losses of its trials."""

    keys: tuple[Key, ...]
    losses: dict[Setting, tuple[float, ...]] = field(default_factory=dict)  # validation losses, one for each seed of the search
    notes: list[str] = field(default_factory=list)
    given: Setting | None = None  # a setting from the user that replaces the search
    back: dict[str, tuple[float, ...]] = field(default_factory=dict)  # by key: losses of the chosen setting with its first value

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
        """The chosen value of a key; None if there is no such key or no chosen setting."""
        index = next((i for i, key in enumerate(self.keys) if key.name == name), None)
        return None if index is None or self.chosen is None else self.chosen[index]


def grid(centre: float, trials: int, factor: float = FACTOR) -> list[float]:
    """`trials` values around `centre`, neighbours `factor` apart; for an even number one more value above than below."""
    below = (trials - 1) // 2
    return [centre * factor ** (i - below) for i in range(trials)]


def best(tried: Tried) -> Setting | None:
    """The setting of the lowest loss; None if none is finite."""
    finite = [(loss, setting) for setting, loss in tried.items() if math.isfinite(loss)]
    return min(finite)[1] if finite else None


def line(tried: Tried, through: Setting, index: int) -> dict[float, float]:
    """The losses of all settings that differ from `through` at most in the key `index`, by the value of this key, ascending."""
    found = {s[index]: loss for s, loss in tried.items() if moved(s, index, through[index]) == through}
    return dict(sorted(found.items()))


def moved(setting: Setting, index: int, value: float) -> Setting:
    """`setting` with another value of one key."""
    return (*setting[:index], value, *setting[index + 1 :])


def edge(key: Key, losses: Losses, value: float) -> str | None:
    """ "below" or "above" if `value` is the smallest or largest one tried on its line. None if it lies between two others, or
    if `key` allows no value beyond it."""
    lowest, highest = (key.values[0], key.values[-1]) if key.values else (0.0, math.inf)
    if value == max(losses) and value < highest and (len(losses) == 1 or value != min(losses)):
        return "above"
    return "below" if value == min(losses) and value > lowest else None


def next_value(key: Key, losses: Losses, value: float) -> float | None:
    """The most useful next value on a line whose best value is `value`: beyond it at an edge, otherwise in the middle of the
    wider interval beside it (of equal ones the upper, unless its end diverged). None if there is no such value."""
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
    """The keys whose best value lies at the edge of the tried values, with all other keys at their best, and the side."""
    chosen = best(tried)
    if chosen is None:
        return {keys[0].name: "below"}
    sides = {key.name: edge(key, line(tried, chosen, i), chosen[i]) for i, key in enumerate(keys)}
    return {name: side for name, side in sides.items() if side is not None}


def next_setting(keys: Sequence[Key], tried: Tried) -> Setting | None:
    """The most useful next setting. None if the lists of values allow no further one.

    The first key whose best value lies at an edge moves beyond it. If there is none, the key with the widest interval around its
    best value gets a value within this interval. If all trials diverged, the first key moves below its smallest value.
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
    """The first settings of a search: the first key at each value of `firsts`, the others at their first values."""
    return [(keys[0].rounded(value), *(key.first for key in keys[1:])) for value in firsts]


Evaluate = Callable[[str, list[tuple[str, Setting]]], list[tuple[float, ...]]]


def search(
    searches: Mapping[str, Search],
    firsts: Mapping[str, list[Setting]],
    trials: int,
    evaluate: Evaluate,
    say: Callable[[str], None],
) -> None:
    """Run the searches of all optimizers with equal numbers of trials: `firsts` at once, then one by one until each has `trials`.

    If the best value of any optimizer then lies at the edge of its tried values, every optimizer gets one more trial (beyond the
    edge, or its most useful next setting), at most MOST_ROUNDS times. So all spend the same number of trials, and no loss suffers
    from a search that ended early. `evaluate(phase, [(label, setting), ...])` runs trials, in parallel where it can, and returns
    their losses by seed.
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
    """A note on the keys whose best value is still at the edge of the tried values when no trials are left."""
    beyond = " and ".join(f"{side} {s.value(name):g}" for name, side in sides.items())
    one = len(sides) == 1
    return (
        f"its best {' and '.join(sides)} {'is' if one else 'are'} still at the edge after {MOST_ROUNDS} extensions: "
        f"{'a value' if one else 'values'} {beyond} may be better"
    )


def explained(s: Search, setting: Setting, sides: Mapping[str, str]) -> str:
    """The reason why a further trial has this setting, for a note."""
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
    """For each key that the search moved, the chosen setting with only this key set back to its first value."""
    chosen = s.chosen
    if chosen is None:
        return {}
    return {key.name: moved(chosen, i, key.first) for i, key in enumerate(s.keys) if chosen[i] != key.first}


def lowered(s: Search, names: Sequence[str], error: float) -> Setting:
    """The chosen setting with the keys of `names` as low as the search allows: each, one after the other, at the lowest value on
    its line whose loss is at most `error` above that of the chosen setting. A given setting stays unchanged.

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
    """How the loss depends on one key, with all other keys at their best."""

    key: str
    chosen: float
    curve: list[tuple[float, float]]  # (value, mean loss) of all trials on the line
    doubled: float | None  # loss above the best at twice the value; None if no trials lie on both sides of it
    halved: float | None  # the same at half the value
    low: float | None  # the lower value at which the loss is `MARGIN` above the best; None if it is beyond the tried values
    high: float | None  # the higher such value


MARGIN = 0.01  # nats


def sensitivity(keys: Sequence[Key], tried: Tried, through: Setting) -> list[Sensitivity]:
    """The sensitivity to each key around a setting, interpolated linearly in the logarithm of the value. Trials that diverged are
    left out. For a key with a list of `values` only the curve is given."""
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
    """The value at which a curve, given from its best point outwards, first rises to `level`; None if it does not."""
    for (a, u), (b, v) in pairwise(points):
        if v >= level > u:
            share = (level - u) / (v - u)
            return a * (b / a) ** share
    return None
