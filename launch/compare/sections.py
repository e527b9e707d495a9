"""The sections of the page on tuning, target loss and ladder, from results.json: tables and simple charts, without a script."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from launch.compare.charts import Series, chart, legend
from launch.compare.ladder import span

Results = dict[str, Any]
Color = Callable[[str], str]  # of an optimizer's label, as CSS
CURVE = 24  # points of a fit


def sections(results: Results, color: Color) -> Markup:
    """The sections that `results` has; nothing for a report of an earlier version."""
    searched = [row for row in results["optimizers"] if row["search"] and row["search"].get("keys")]
    ladder = results.get("ladder")
    page = environment().get_template("sections.html")
    return Markup(  # the template escapes
        page.render(
            tuning=results.get("tuning") or [],
            planned=results.get("planned"),
            target=results.get("target"),
            ladder=ladder,
            searched=searched if any(len(row["search"]["keys"]) > 1 for row in searched) else [],
            keys=key_charts(searched, color),
            losses=loss_charts(ladder, color) if ladder else [],
            speedups=speedup_charts(ladder, color) if ladder else [],
            legend=legend([(row["label"], color(row["label"])) for row in results["optimizers"]]),
            span=span,
            number=number,
        )
    )


@cache
def environment() -> Environment:
    """The Jinja environment of the page's templates, made once."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )


def number(value: Any, spec: str, missing: str = "–") -> str:
    """A number as text with a true minus; `missing` if there is none."""
    return format(value, spec).replace("-", "−") if isinstance(value, int | float) else missing


def key_charts(searched: list[dict[str, Any]], color: Color) -> list[Markup]:
    """The loss of the search along each key, all others at their best."""
    names = list(dict.fromkeys(entry["key"] for row in searched for entry in row["search"]["keys"]))
    found = []
    for name in names if len(names) > 1 else []:
        series = [
            Series(row["label"], color(row["label"]), entry["curve"], mark=entry["chosen"])
            for row in searched
            for entry in row["search"]["keys"]
            if entry["key"] == name
        ]
        found.append(chart(series, name, "loss of the search"))
    return found


def loss_charts(ladder: dict[str, Any], color: Color) -> list[Markup]:
    """Final loss over tokens at each size, with the fit of the reference."""
    found = []
    for size in dict.fromkeys(rung["size"] for rung in ladder["rungs"]):
        rungs = [rung for rung in ladder["rungs"] if rung["size"] == size]
        series = []
        for label in rungs[0]["losses"]:
            points = [(r["tokens"], mean) for r in rungs if (mean := mean_of(r["losses"][label])) is not None]
            series.append(Series(label, color(label), points))
        fit = ladder["fit"]
        if fit and size in fit["scale"]:
            low, high = rungs[0]["tokens"], rungs[-1]["tokens"]
            xs = [low * (high / low) ** (i / CURVE) for i in range(CURVE + 1)]
            curve = [(x, fit["scale"][size] * (x / fit["unit"]) ** -fit["exponent"] + fit["floor"][size]) for x in xs]
            series.append(Series(f"fit of {ladder['reference']}", color(ladder["reference"]), curve, dashed=True, marks=False))
        found.append(chart(series, f"tokens, {size}", "final loss"))
    return found


def speedup_charts(ladder: dict[str, Any], color: Color) -> list[Markup]:
    """Data speedup over the number of weights at each ratio, with its interval."""
    weights = {rung["size"]: rung["weights"] for rung in ladder["rungs"]}
    found = []
    for ratio in dict.fromkeys(entry["ratio"] for entry in ladder["speedups"]):
        at_ratio = [e for e in ladder["speedups"] if e["ratio"] == ratio and e["value"] is not None]
        series = [
            Series(label, color(label), [(weights[e["size"]], *limits(e)) for e in at_ratio if e["label"] == label])
            for label in dict.fromkeys(e["label"] for e in at_ratio)
        ]
        found.append(chart(series, f"weights, at {number(ratio, 'g')} tokens per weight", "data speedup", log_y=True))
    return found


def limits(entry: dict[str, Any]) -> tuple[float, float | None, float | None]:
    """A speedup and its interval, where it can be drawn."""
    low, high = entry["low"], entry["high"]
    drawn = low is not None and high is not None and low > 1e-3 and high < 1e3
    return entry["value"], low if drawn else None, high if drawn else None


def mean_of(losses: dict[str, float]) -> float | None:
    """The mean over seeds."""
    return math.fsum(losses.values()) / len(losses) if losses else None
