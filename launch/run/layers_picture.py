"""Draws layers.png: the statistics of every layer over the steps of a training run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data.files import replacing

MAPS = {"weight_norm": "weight", "grad_norm": "gradient", "update_norm": "update", "update_ratio": "update / weight"}
LABELS = 40  # most parameter names beside a map


def draw_layers(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw a map of each norm (parameters down, steps to the right), the largest attention logit of every block, and singular
    values of directions before and after orthogonalization. Draws nothing if no record has statistics."""
    found = [r for r in records if any(key.startswith("weight_norm/") for key in r)]
    if not found:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [key.partition("/")[2] for key in found[0] if key.startswith("weight_norm/")]
    steps = [r["step"] for r in found]
    figure = Figure(figsize=(20, 6 + 0.12 * min(len(names), 4 * LABELS)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, height_ratios=(2, 1))
    every = -(-len(names) // LABELS)
    for i, (key, text) in enumerate(MAPS.items()):
        axes = figure.add_subplot(grid[0, i])
        rows = [[_log(r.get(f"{key}/{name}")) for r in found] for name in names]
        image = axes.imshow(rows, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, label="log10", location="top", shrink=0.7)
        ticks = sorted({round(j * (len(steps) - 1) / 4) for j in range(5)})
        axes.set_xticks(ticks, [str(steps[j]) for j in ticks])
        axes.set_yticks(range(0, len(names), every), names[::every] if i == 0 else [], fontsize=6, parse_math=False)
        axes.set(title=f"norm: {text}" if "/" not in text else text, xlabel="step")
    axes = figure.add_subplot(grid[1, :2])
    for key in (key for key in found[0] if key.startswith("attention_logit/")):
        axes.plot(steps, [_number(r.get(key)) for r in found], label=key.partition("/")[2], linewidth=1)
    axes.set(title="largest attention logit", xlabel="step")
    axes.legend(fontsize=6, ncols=4)
    axes = figure.add_subplot(grid[1, 2:])
    for j, name in enumerate(dict.fromkeys(key.split("/")[1] for key in found[0] if key.startswith("singular_before/"))):
        for when, style in (("before", ":"), ("after", "-")):
            for word in ("max", "median", "min"):
                values = [_number(r.get(f"singular_{when}/{name}/{word}")) for r in found]
                label = f"{name}, {when}" if word == "max" else None
                axes.plot(steps, values, style, color=f"C{j}", linewidth=1, label=label)
    axes.set(title="singular values of directions: largest, median, smallest", xlabel="step", yscale="log")
    if axes.lines:
        axes.legend(fontsize=6)
    figure.suptitle(title, parse_math=False)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _log(value: float | None) -> float:
    return math.log10(value) if value else math.nan
