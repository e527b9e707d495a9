"""The report: one self-contained page, the same as pictures, and its numbers as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from data.files import replace_text
from launch.compare.picture import draw, draw_details

HERE = Path(__file__).parent
VENDOR = HERE / "vendor"
Results = dict[str, Any]


def write_report(out: Path, results: Results) -> Path:
    """Write results.json, report.png, details.png and report.html into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    page, numbers = render(results), to_json(results)
    draw(results, out / "report.png")
    draw_details(results, out / "details.png")
    replace_text(out / "results.json", numbers)
    replace_text(out / "report.html", page)
    return out / "report.html"


def to_json(results: Results) -> str:
    """The results as JSON with one line for each key, and for each entry of a list."""
    entries = []
    for key, value in results.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def render(results: Results) -> str:
    """The page. Every text from outside is escaped, and no text can end the script that holds the data."""
    labels = [row["label"] for row in results["optimizers"]]
    drawn = {key: results[key] for key in ("title", "compared_at_tokens", "optimizers")}
    drawn["runs"] = [{k: v for k, v in run.items() if k not in ("config", "command", "folder")} for run in results["runs"]]
    shown, folded = statements(results)
    low, high = span(results)

    def place(loss: float) -> float:
        """Per cent of the way from the lowest to the highest final loss."""
        return round(100 * (loss - low) / (high - low), 2) if high > low else 50.0

    script = f"/*\n{(VENDOR / 'uPlot.LICENSE').read_text(encoding='utf-8')}*/\n"
    script += (VENDOR / "uPlot.iife.min.js").read_text(encoding="utf-8") + (HERE / "page.js").read_text(encoding="utf-8")
    page = environment()
    page.filters |= {"f": number, "milliseconds": milliseconds, "breakable": breakable, "place": place}
    page.filters["colour"] = lambda label: labels.index(label) % 8
    return page.get_template("page.html").render(
        results | {"versions": [f"{library} {version}" for library, version in results["versions"].items()]},
        search_commands=results.get("search_commands"),
        evaluations=[row for row in results.get("evaluations", []) if isinstance(row, dict)],  # not in results of former versions
        shown=shown,
        folded=folded,
        low=low,
        high=high,
        by_loss=sorted(results["optimizers"], key=lambda row: row["loss"]["mean"] if row["loss"] else float("inf")),
        searched=[row for row in results["optimizers"] if row["search"] and row["search"]["lr"]],
        style=(VENDOR / "uPlot.min.css").read_text(encoding="utf-8") + (HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=json.dumps(drawn, allow_nan=False).replace("<", "\\u003c"),
    )


@cache
def environment() -> Environment:
    """Where templates are compiled, once."""
    return Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=StrictUndefined)


def statements(results: Results) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sentences with their kind: the caveats and those on pairs of the optimizer that was named first, which is the one asked
    about; and those on the other pairs."""
    shown: list[tuple[str, str]] = []
    folded: list[tuple[str, str]] = []
    first, pairs, sentences = results["optimizers"][0]["label"], results["pairs"], results["sentences"]
    for pair, text in zip(pairs, sentences, strict=False):  # sentences on single optimizers follow
        asked = first in (pair["a"], pair["b"])
        (shown if asked else folded).append(("claim" if pair["claim"] else "plain", text))
    return [*shown, *(("caveat", text) for text in [*sentences[len(pairs) :], *results["caveats"]])], folded


def span(results: Results) -> tuple[float, float]:
    """What the picture of the final losses must have room for: seeds, and intervals of means."""
    ends: list[float] = []
    for row in results["optimizers"]:
        if row["loss"]:
            mean, half = row["loss"]["mean"], row["loss"]["half"] or 0.0
            ends += [*row["final"].values(), mean - half, mean + half]
    return min(ends, default=0.0), max(ends, default=0.0)


def breakable(label: str) -> Markup:
    """A name as HTML that may end a line within a dotted path, which is one long word."""
    return Markup(re.sub(r"(?<=[._/-])(?=[A-Za-z])", "<wbr>", escape(label)))


def number(value: Any, spec: str, missing: str = "–") -> str:
    """A number, or what stands for none."""
    return format(value, spec) if isinstance(value, int | float) else missing


def milliseconds(seconds: float | None) -> str:
    """A duration of a step."""
    return "–" if seconds is None else f"{1e3 * seconds:,.1f} ms"
