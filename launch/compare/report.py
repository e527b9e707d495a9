"""The report: one self-contained page, the same as pictures, and its numbers as JSON."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from launch.compare.picture import draw, draw_details
from launch.compare.summary import asked_about

HERE = Path(__file__).parent
CONTROLS = """<div class="controls" role="group" aria-label="What the charts show">
<label>over <select id="x-axis"><option value="tokens">tokens</option><option value="step">steps</option>
<option value="seconds">seconds</option><option value="flops">FLOPs</option></select></label>
<label><input type="checkbox" id="log-x"> log x</label>
<label><input type="checkbox" id="log-y"> log y</label>
<label><input type="checkbox" id="seeds" checked> each seed</label>
<label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.02" value="0.6"><output>0.60</output></label>
<button type="button" id="reset">whole range</button>
</div>"""
HELP = (
    "Thick: the mean over seeds. Point at or tap a chart for values, with the smallest and the largest seed; drag to zoom, or "
    "Ctrl and the wheel; double-click for the whole range. With the keyboard: arrows move, + and − zoom, Escape shows all. "
    "Smoothing is for what is logged while training. Click a name to hide it."
)


def write_report(out: Path, results: dict[str, Any]) -> Path:
    """Write results.json, report.png, details.png and report.html into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    page, numbers = render(results), json.dumps(results, indent=1, allow_nan=False) + "\n"
    draw(results, out / "report.png")
    draw_details(results, out / "details.png")
    (out / "results.json").write_text(numbers)
    (out / "report.html").write_text(page)
    return out / "report.html"


def render(results: dict[str, Any]) -> str:
    """The page. Every text from outside is escaped, and no text can end the script that holds the data."""
    unused = ("config", "command", "folder")
    drawn = {key: results[key] for key in ("title", "compared_at_tokens", "optimizers")}
    drawn["runs"] = [{k: v for k, v in run.items() if k not in unused} for run in results["runs"]]
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
    kinds = ["claim" if pair["claim"] else "plain" for pair in results["pairs"]]
    asked = asked_about(results)
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
        *finals(results),
        "<h2>Curves</h2>",
        CONTROLS,
        '<div class="legend" role="group" aria-label="Optimizers"></div>',
        '<div class="charts" id="curves"></div>',
        f'<p class="soft" id="help">{escape(HELP)}</p>',
        *costs(results),
        *searches(results),
        *differences(results),
        "<h2>How it was made</h2>",
        f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in results['method'])}</ul>",
        f'<pre class="command">{escape(results["command"])}</pre>',
        "<p>Every run behind the curves, with its whole configuration:</p>",
        *(
            f"<details><summary>{escape(run['label'])}, seed {run['seed']}</summary>"
            f'<pre class="command">{escape(run["command"])}</pre><pre>{escape(run["config"])}</pre></details>'
            for run in results["runs"]
        ),
        *searched(results.get("search_commands", [])),
    ]
    return "\n".join(sections)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table that scrolls by itself where it is wide; the cells are HTML, the first of a row is its name."""
    classes = [re.match(r'<td( class="\w+")', cell) for cell in rows[0]]
    kinds = [found[1] if found else "" for found in classes]
    cells = "".join(f'<th scope="col"{kind}>{title}</th>' for kind, title in zip(kinds, head, strict=True))
    lines = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def name(results: dict[str, Any], label: str) -> str:
    """An optimizer's name with the colour of its lines."""
    key = f'<span class="key" style="background:var(--c{colour(results, label)})"></span>'
    return f'<span class="label">{key}<span>{breakable(label)}</span></span>'


def breakable(label: str) -> str:
    """A name as HTML that may end a line within a dotted path, which is one long word."""
    return re.sub(r"(?<=[._/-])(?=[A-Za-z])", "<wbr>", escape(label))


def colour(results: dict[str, Any], label: str) -> int:
    """The number of an optimizer's colour."""
    return [row["label"] for row in results["optimizers"]].index(label) % 8


def finals(results: dict[str, Any]) -> list[str]:
    """The section on final losses, the lowest first: each seed, mean and interval as a picture, and the numbers."""
    rows = sorted(results["optimizers"], key=lambda r: r["loss"]["mean"] if r["loss"] else float("inf"))
    ends = [end for row in rows if row["loss"] for end in reach_of(row)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    lines = []
    for row in rows:
        loss, lost = row["loss"], len(row["diverged_seeds"])
        mean, half, sd = (value(loss and loss[key], ".4f") for key in ("mean", "half", "sd"))
        lines.append(
            [
                name(results, row["label"]),
                interval(results, row, low, high),
                mean,
                half if half == "–" else f"± {half}",
                sd,
                f"{loss['n'] if loss else 0}" + (f" ({lost} diverged)" if lost else ""),
                value(row["lr"], "g"),
                value(row["adamw_lr"], "g"),
                str(row["search"]["trials"]) if row["search"] else "–",
            ]
        )
    scale = f'<span class="scale"><span>{low:.3f}</span><span>{high:.3f}</span></span>' if ends else ""
    head = ["optimizer", scale, "mean", "95 % interval", "sd", "seeds", "lr", "adamw_lr", "search trials"]
    note = "Final loss: validation, nats per token, mean over seeds. Dots: seeds; bars: 95 % intervals of the means."
    return ["<h2>Final loss</h2>", table(head, lines), f'<p class="soft">{note}</p>']


def reach_of(row: dict[str, Any]) -> list[float]:
    """What the picture of an optimizer's final losses must have room for."""
    half = row["loss"]["half"] or 0.0
    return [*row["final"].values(), row["loss"]["mean"] - half, row["loss"]["mean"] + half]


def interval(results: dict[str, Any], row: dict[str, Any], low: float, high: float) -> str:
    """The cell that shows seeds, mean and interval between `low` and `high`, without any script."""
    if not row["loss"]:
        return '<td class="plot"></td>'
    at = lambda loss: 100 * (loss - low) / (high - low) if high > low else 50.0  # noqa: E731
    mean, half = row["loss"]["mean"], row["loss"]["half"] or 0.0
    width = at(mean + half) - at(mean - half) if half else 0.0
    dots = "".join(f'<i class="seed" style="left:{at(loss):.2f}%"></i>' for loss in row["final"].values())
    bar = f'<i class="bar" style="left:{at(mean - half):.2f}%;width:{width:.2f}%"></i>'
    style = f"color:var(--c{colour(results, row['label'])})"
    return f'<td class="plot"><span style="{style}">{bar}{dots}<i class="mean" style="left:{at(mean):.2f}%"></i></span></td>'


def costs(results: dict[str, Any]) -> list[str]:
    """The section on what each optimizer costs, and needs to come down to a loss that all of them reach."""
    if results["target_loss"] is None:
        return []
    lines = []
    for index, row in enumerate(results["optimizers"]):
        reached = row["to_target"]
        bound = "≤ " if reached and reached.get("at_most") else ""
        cells = {key: bound + shown(reached[key]) if reached else "never" for key, shown in TO_TARGET.items()}
        if reached and reached["reached"] < reached["asked"]:
            cells["tokens"] += f" ({reached['reached']} of {reached['asked']} runs)"
        asked = [f'<td data-cost="{index} {COLUMNS[key]}">{text}</td>' for key, text in cells.items()]
        own = milliseconds(row["optimizer_seconds"])
        lines.append([name(results, row["label"]), *asked, milliseconds(row["step_seconds"]), own, size(row["state_bytes"])])
    head = ["optimizer", "tokens to loss", "steps", "seconds", "whole step", "optimizer step", "optimizer state"]
    target = results["target_loss"]
    return [
        "<h2>Cost</h2>",
        '<p><label>Loss to reach <input type="number" id="target" step="0.01" min="0" inputmode="decimal" '
        f'value="{target:.4f}"></label></p>',
        table(head, lines),
        f'<p class="soft">{target:.4f} is the highest final loss of any seed of those that never diverged: all of them reach it. '
        "Means over the seeds that do, interpolated between evaluations; ≤: there already at the first one.</p>",
    ]


TO_TARGET = {"tokens": "{:,.0f}".format, "steps": "{:,.0f}".format, "seconds": lambda s: f"{s:,.{2 if s < 10 else 1}f}"}
COLUMNS = {"tokens": "tokens", "steps": "step", "seconds": "seconds"}  # what page.js knows them by


def searched(commands: list[str]) -> list[str]:
    """The commands of the trials that only the search has seen."""
    if not commands:
        return []
    return [
        f"<details><summary>The {len(commands)} trials of the search</summary>",
        f"<pre>{escape(chr(10).join(commands))}</pre></details>",
    ]


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
            share = [f"≤ {text}" for text in share] if r.get("at_most") else share
            share[0] += f", {r['reached']} of {r['asked']} runs" if r["reached"] < r["asked"] else ""
        lines.append(
            [
                f"{breakable(pair['a'])} − {breakable(pair['b'])}",
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
