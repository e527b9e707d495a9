"""Simple charts as SVG for the page: lines with marks and intervals on logarithmic or linear axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 38  # margins


@dataclass(frozen=True)
class Series:
    """One line. `points`: (x, y) or (x, y, low, high); low and high may be None. `mark`: the x of a point to highlight."""

    name: str
    color: str  # CSS
    points: Sequence[tuple[float | None, ...]]
    dashed: bool = False
    marks: bool = True
    mark: float | None = None


def chart(series: Sequence[Series], x_title: str, y_title: str, log_x: bool = True, log_y: bool = False) -> Markup:
    """An SVG picture; empty where there is nothing to draw."""
    xs = [float(p[0] or 0) for s in series for p in s.points]
    ys = [float(v) for s in series for p in s.points for v in p[1:] if v is not None and math.isfinite(v)]
    if not xs or not ys:
        return Markup("")
    x_axis, y_axis = Axis(xs, log_x, LEFT, WIDTH - RIGHT), Axis(ys, log_y, HEIGHT - BOTTOM, TOP)
    parts = [
        Markup('<svg class="simple" viewBox="0 0 {} {}" role="img" aria-label="{} by {}">').format(
            WIDTH, HEIGHT, y_title, x_title
        )
    ]
    bottom, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    for value in x_axis.ticks():
        at = x_axis(value)
        parts.append(Markup('<path class="grid" d="M{0:.1f} {1}V{2}"/>').format(at, TOP, bottom))
        parts.append(text(at, bottom + 14, "middle", name(value)))
    for value in y_axis.ticks():
        at = y_axis(value)
        parts.append(Markup('<path class="grid" d="M{0} {1:.1f}H{2}"/>').format(LEFT, at, WIDTH - RIGHT))
        parts.append(text(LEFT - 5, at + 3.5, "end", name(value)))
    parts += [text(middle, HEIGHT - 5, "middle", x_title), text(LEFT, TOP - 3, "start", y_title)]
    for s in series:
        parts += drawn(s, x_axis, y_axis)
    return Markup("").join([*parts, Markup("</svg>")])


class Axis:
    """Maps values to places between two ends of the picture."""

    def __init__(self, values: Sequence[float], log: bool, start: float, stop: float) -> None:
        self.log = log and min(values) > 0
        low, high = self.scaled(min(values)), self.scaled(max(values))
        margin = 0.06 * (high - low) or 0.5 * (0.7 if self.log else abs(low) * 0.1 or 1)
        self.low, self.high, self.start, self.stop = low - margin, high + margin, start, stop

    def scaled(self, value: float) -> float:
        return math.log(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self.scaled(value) - self.low) / (self.high - self.low)
        return self.start + min(max(share, -0.05), 1.05) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Three to six round values."""
        if self.log and self.high - self.low > math.log(8):
            decades = range(math.floor(self.low / math.log(10)), math.ceil(self.high / math.log(10)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in decades for d in digits if self.low <= math.log(d * 10.0**e) <= self.high]
                if len(found) <= 6:
                    return found
            return found[:: -(-len(found) // 6)]
        low, high = (math.exp(self.low), math.exp(self.high)) if self.log else (self.low, self.high)
        rough = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        first = math.ceil(low / step)
        return [i * step for i in range(first, math.floor(high / step) + 1)]


def name(value: float) -> str:
    """The text of a tick."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    return f"{value:.6g}".replace("-", "−")


def text(x: float, y: float, anchor: Literal["start", "middle", "end"], words: str) -> Markup:
    """A piece of text."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def drawn(s: Series, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    """A line, its marks and its intervals."""
    points = [p for p in s.points if p[0] is not None and p[1] is not None and math.isfinite(p[1])]
    places = [(x_axis(float(p[0])), y_axis(float(p[1]))) for p in points]  # type: ignore[arg-type]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    style = Markup('style="stroke:{};{}"').format(s.color, "stroke-dasharray:4 3" if s.dashed else "")
    found = [Markup('<path class="line" {} d="{}"><title>{}</title></path>').format(style, path, s.name)] if places else []
    for p, (x, y) in zip(points, places, strict=True):
        if len(p) == 4 and p[2] is not None and p[3] is not None:
            ends = y_axis(float(p[2])), y_axis(float(p[3]))
            found.append(Markup('<path class="line thin" {} d="M{:.1f} {:.1f}V{:.1f}"/>').format(style, x, *ends))
        if s.marks:
            chosen = Markup(' class="chosen"') if s.mark is not None and p[0] == s.mark else Markup("")
            said = f"{s.name}: {p[0]:g}, {p[1]:.4f}"
            found.append(
                Markup('<circle{} cx="{:.1f}" cy="{:.1f}" r="3.2" style="stroke:{};fill:{}"><title>{}</title></circle>').format(
                    chosen, x, y, s.color, "var(--background, Canvas)" if chosen else s.color, said
                )
            )
    return found


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Names with their colors."""
    key = '<span class="label"><span class="key" style="background:{}"></span><span>{}</span></span> '
    return Markup("").join(Markup(key).format(color, escape(label)) for label, color in entries)
