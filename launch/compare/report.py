"""The report: one self-contained page, the same as a picture, and its numbers as JSON."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from launch.compare.picture import draw

HERE = Path(__file__).parent
CONTROLS = """<div class="controls" role="group" aria-label="What the charts show">
<label>over <select id="x-axis"><option value="tokens">tokens</option><option value="step">steps</option>
<option value="seconds">seconds</option><option value="flops">FLOPs</option></select></label>
<label><input type="checkbox" id="log-x"> log x</label>
<label><input type="checkbox" id="log-y"> log y</label>
<label><input type="checkbox" id="seeds" checked> each seed</label>
<label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.02" value="0.6"></label>
<button type="button" id="reset">whole range</button>
</div>"""
HELP = (
    "Thick: the mean over seeds. Point at a chart for values; drag to zoom, double-click to zoom out. With the keyboard: "
    "arrows move, + and − zoom, Escape shows all. Smoothing is for what is logged while training."
)


def write_report(out: Path, results: dict[str, Any]) -> Path:
    """Write results.json, report.png and report.html into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    draw(results, out / "report.png")
    (out / "report.html").write_text(render(results))
    return out / "report.html"


def render(results: dict[str, Any]) -> str:
    """The page. Every text from outside is escaped, and no text can end the script that holds the data."""
    drawn = {**results, "runs": [{k: v for k, v in run.items() if k not in ("config", "command")} for run in results["runs"]]}
    parts = {
        "title": escape(results["title"]),
        "style": (HERE / "page.css").read_text(),
        "script": (HERE / "page.js").read_text(),
        "data": json.dumps(drawn, allow_nan=False).replace("<", "\\u003c"),
        "body": body(results),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], (HERE / "page.html").read_text())


def body(results: dict[str, Any]) -> str:
    """All sections, readable without scripts but for the charts."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    first = results["optimizers"][0]["label"]  # the one that was named first is the one that is asked about
    kinds = ["claim" if pair["claim"] else "plain" for pair in results["pairs"]]
    asked = [first in (pair["a"], pair["b"]) for pair in results["pairs"]]
    said, others = [], []
    for index, text in enumerate(results["sentences"]):
        kind = kinds[index] if index < len(kinds) else "caveat"
        (said if index >= len(kinds) or asked[index] else others).append(f'<li class="{kind}">{escape(text)}</li>')
    said += [f'<li class="caveat">{escape(text)}</li>' for text in results["caveats"]]
    rest = f'<details><summary>The other pairs</summary><ul class="said">{"".join(others)}</ul></details>' if others else ""
    tokens = results["compared_at_tokens"]
    sections = [
        f"<h1>{escape(results['title'])}</h1>",
        f'<p class="soft">Compared at {tokens:,.0f} tokens; {escape(results["device"])}; {escape(versions)}</p>',
        f'<ul class="said">{"".join(said)}</ul>{rest}',
        finals(results),
        "<h2>Curves</h2>",
        CONTROLS,
        '<div class="legend" role="group" aria-label="Optimizers"></div>',
        '<div class="charts" id="curves"></div>',
        f'<p class="soft">{escape(HELP)}</p>',
        *searches(results),
        *differences(results),
        "<h2>How it was made</h2>",
        f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in results['method'])}</ul>",
        f"<pre>{escape(results['command'])}</pre>",
        "<p>Every run behind the curves, with its whole configuration:</p>",
        *(
            f"<details><summary>{escape(run['label'])}, seed {run['seed']}</summary><pre>{escape(run['command'])}</pre>"
            f"<pre>{escape(run['config'])}</pre></details>"
            for run in results["runs"]
        ),
    ]
    return "\n".join(sections)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table that scrolls by itself where it is wide; the cells are HTML, the first of a row is its name."""
    texts = {index for row in rows for index, cell in enumerate(row) if cell.startswith("<td")}
    cells = "".join(f'<th scope="col"{" class=text" if i in texts else ""}>{title}</th>' for i, title in enumerate(head))
    lines = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def name(results: dict[str, Any], label: str) -> str:
    """An optimizer's name with the colour of its lines."""
    index = [row["label"] for row in results["optimizers"]].index(label)
    return f'<span class="key" style="background:var(--c{index % 8})"></span>{escape(label)}'


def finals(results: dict[str, Any]) -> str:
    """The tables of final losses, and of what each optimizer costs and needs to come to the common target."""
    losses, costs = [], []
    for row in sorted(results["optimizers"], key=lambda r: r["loss"]["mean"] if r["loss"] else float("inf")):
        loss, reached, lost = row["loss"], row["to_target"], len(row["diverged_seeds"])
        title = name(results, row["label"])
        mean, half, sd = (value(loss and loss[key], ".4f") for key in ("mean", "half", "sd"))
        seeds = f"{loss['n'] if loss else 0}" + (f" ({lost} diverged)" if lost else "")
        trials = str(row["search"]["trials"]) if row["search"] else "–"
        losses.append(
            [
                title,
                mean,
                half if half == "–" else f"± {half}",
                sd,
                seeds,
                value(row["lr"], "g"),
                value(row["adamw_lr"], "g"),
                trials,
            ]
        )
        to_target = [format(reached[key], spec) if reached else "never" for key, spec in TO_TARGET.items()]
        if reached and reached["reached"] < reached["asked"]:
            to_target[0] += f" ({reached['reached']} of {reached['asked']} runs)"
        own = milliseconds(row["optimizer_seconds"])
        costs.append([title, *to_target, milliseconds(row["step_seconds"]), own, size(row["state_bytes"])])
    results_head = ["optimizer", "final loss", "95 % interval", "sd", "seeds", "lr", "adamw_lr", "search trials"]
    costs_head = ["optimizer", "tokens to target", "steps", "seconds", "whole step", "optimizer step", "optimizer state"]
    note = ""
    if results["target_loss"] is not None:
        note = f"Target: {results['target_loss']:.4f}, the highest final loss of any seed of those that never diverged."
    return "\n".join(
        [
            "<h2>Results</h2>",
            table(results_head, losses),
            '<p class="soft">Final loss: validation, nats per token, mean over seeds.</p>',
            table(costs_head, costs),
            f'<p class="soft">{note}</p>',
        ]
    )


TO_TARGET = {"tokens": ",.0f", "steps": ",.0f", "seconds": ",.1f"}


def searches(results: dict[str, Any]) -> list[str]:
    """The section on the learning-rate searches; empty where there were none."""
    rows = [row for row in results["optimizers"] if row["search"] and row["search"]["lr"]]
    if not rows:
        return []
    lines = []
    for row in rows:
        tried = [f"{point['value']:g}: {value(point['loss'], '.4f', 'diverged')}" for point in row["search"]["lr"]]
        adamw = [f"{point['value']:g}: {value(point['loss'], '.4f', 'diverged')}" for point in row["search"]["adamw_lr"]]
        text = "; ".join(tried) + (f"; adamw_lr {'; '.join(adamw)}" if adamw else "")
        notes = " ".join(f"{note[0].upper()}{note[1:]}." for note in row["search"]["notes"]) or "The first grid was enough."
        chosen = value(row["lr"], "g", "none")
        lines.append(
            [
                name(results, row["label"]),
                chosen,
                str(row["search"]["trials"]),
                f'<td class="text">{escape(text)}</td>',
                f'<td class="text">{escape(notes)}</td>',
            ]
        )
    return [
        "<h2>Search</h2>",
        '<div class="charts" id="sensitivity"></div>',
        table(["optimizer", "chosen lr", "trials", "loss by learning rate", "extensions"], lines),
    ]


def differences(results: dict[str, Any]) -> list[str]:
    """The section on all pairs; empty for a single optimizer."""
    if not results["pairs"]:
        return []
    lines = []
    for pair in results["pairs"]:
        r = pair["reach"]
        share = ["never", "never"]
        if r["reached"]:
            share = [f"{r[key]:.2f} ({r[f'{key}_range'][0]:.2f} to {r[f'{key}_range'][1]:.2f})" for key in ("tokens", "seconds")]
            share[0] += f", {r['reached']} of {r['asked']} runs" if r["reached"] < r["asked"] else ""
        lines.append(
            [
                f"{escape(pair['a'])} − {escape(pair['b'])}",
                f"{pair['mean']:.4f}".replace("-", "−"),
                "–" if pair["half"] is None else f"± {pair['half']:.4f}",
                f"{pair['n']} {'paired' if pair['paired'] else 'each'}",
                value(pair["p_corrected"], ".3g"),
                "yes" if pair["claim"] else "no",
                *share,
            ]
        )
    head = ["pair", "difference", "95 % interval", "seeds", "p (corrected)", "claim", "share of tokens", "share of time"]
    note = (
        "Shares: what the first needs to come down to the second's final loss, of what the second needed for it; mean over "
        "seeds, smallest and largest."
    )
    return ["<h2>Differences</h2>", table(head, lines), f'<p class="soft">{note}</p>']


def value(number: float | None, spec: str, missing: str = "–") -> str:
    """A number, or what stands for none."""
    return missing if number is None else format(number, spec)


def milliseconds(seconds: float | None) -> str:
    """A duration of a step."""
    return "–" if seconds is None else f"{1e3 * seconds:,.1f} ms"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "–"
    for unit, letter in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {letter}"
    return f"{count} B"
