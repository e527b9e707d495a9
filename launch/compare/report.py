"""The report: one self-contained page, the same as pictures, and its numbers as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from data.files import replace_text
from launch.compare.looks import looks_of
from launch.compare.picture import draw, draw_details
from launch.compare.sections import environment, sections
from launch.compare.setting import differing, setting_of

HERE = Path(__file__).parent
VENDOR = HERE / "vendor"
Results = dict[str, Any]
BEHIND = 6  # an optimizer that would make the strip this many times as wide is not drawn on it


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
    by_loss = sorted(results["optimizers"], key=lambda row: row["loss"]["mean"] if row["loss"] else float("inf"))
    looks = looks_of(row["label"] for row in by_loss)
    drawn = {"title": results["title"], "compared_at_tokens": results["compared_at_tokens"], "optimizers": by_loss}
    drawn["looks"] = {label: look._asdict() for label, look in looks.items()}
    drawn["references"] = results.get("references", [])
    drawn["runs"] = [{k: v for k, v in run.items() if k not in ("config", "command", "folder")} for run in results["runs"]]
    shown, folded = statements(results)
    low, high, crops = span(by_loss)

    def place(loss: float) -> float:
        """Per cent of the way along the strip."""
        return round(min(100.0, 100 * (loss - low) / (high - low)), 2) if high > low else 50.0

    script = f"/*\n{(VENDOR / 'uPlot.LICENSE').read_text(encoding='utf-8')}*/\n"
    script += (VENDOR / "uPlot.iife.min.js").read_text(encoding="utf-8")
    script += "".join((HERE / name).read_text(encoding="utf-8") for name in ("chart.js", "page.js"))
    page = environment()
    page.filters |= {"f": number, "milliseconds": milliseconds, "breakable": breakable, "place": place}
    page.filters["color"] = lambda label: looks[label].color
    return page.get_template("page.html").render(
        results | {"versions": [f"{library} {version}" for library, version in results["versions"].items()]},
        search_commands=results.get("search_commands"),
        sections=sections(results, lambda label: f"var(--c{looks[label].color})"),
        evaluations=[row for row in results.get("evaluations", []) if isinstance(row, dict)],  # old results lack it
        shown=shown,
        folded=folded,
        low=low,
        high=high,
        crops=crops,
        setting=setting_of(results),
        differing=differing(results),
        references=drawn["references"],
        by_loss=by_loss,
        by_cost=sorted(by_loss, key=lambda row: row["to_target"]["tokens"] if row["to_target"] else float("inf")),
        searched=[row for row in by_loss if row["search"] and row["search"]["lr"]],
        style=(VENDOR / "uPlot.min.css").read_text(encoding="utf-8") + (HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=json.dumps(drawn, allow_nan=False).replace("<", "\\u003c"),
    )


def statements(results: Results) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sentences with their kind, in two lists: first the caveats and the sentences on pairs of the optimizer that was named
    first, which is the one asked about; then those on the other pairs."""
    shown: list[tuple[str, str]] = []
    folded: list[tuple[str, str]] = []
    first, pairs, sentences = results["optimizers"][0]["label"], results["pairs"], results["sentences"]
    for pair, text in zip(pairs, sentences, strict=False):  # sentences on single optimizers follow
        asked = first in (pair["a"], pair["b"])
        (shown if asked else folded).append(("claim" if pair["claim"] else "plain", text))
    return [*shown, *(("caveat", text) for text in [*sentences[len(pairs) :], *results["caveats"]])], folded


def span(by_loss: Sequence[Results]) -> tuple[float, float, bool]:
    """The two ends of the strip of final losses, and whether it leaves out optimizers. It leaves out one that is so far behind
    the better ones, which come first, that a reader could not tell these apart beside it."""
    ends: list[float] = []
    for row in by_loss:
        if row["loss"]:
            mean, half = row["loss"]["mean"], row["loss"]["half"] or 0.0
            new = [*row["final"].values(), mean - half, mean + half]
            wide = max(ends, default=0.0) - min(ends, default=0.0)
            if wide > 0 and max(new) - min(ends) > BEHIND * wide:
                return min(ends), max(ends), True
            ends += new
    return min(ends, default=0.0), max(ends, default=0.0), False


def breakable(label: str) -> Markup:
    """A name as HTML in which a line may break within a dotted path, which is one long word."""
    return Markup(re.sub(r"(?<=[._/-])(?=[A-Za-z])", "<wbr>", escape(label)))


def number(value: Any, spec: str, missing: str = "–") -> str:
    """A number as text; `missing` if there is none."""
    return format(value, spec) if isinstance(value, int | float) else missing


def milliseconds(seconds: float | None) -> str:
    """A duration of a step."""
    return "–" if seconds is None else f"{1e3 * seconds:,.1f} ms"
