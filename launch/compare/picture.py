"""The report as a picture: validation loss over tokens and seconds, the final losses, the learning-rate searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#00855f", "#b04f8b", "#a87400", "#2f94cf", "#6b4fc4", "#55606b")  # as in page.css
DASHES = ("-", "--", ":", "-.")


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    (tokens, seconds), (finals, search) = figure.subplots(2, 2)
    labels = [row["label"] for row in results["optimizers"]]
    for axes, x in ((tokens, "tokens"), (seconds, "seconds")):
        losses(axes, results["runs"], labels, x)
        axes.set(xlabel="seconds in training steps" if x == "seconds" else x, ylabel="validation loss, nats per token")
    final_losses(finals, results["optimizers"], labels)
    sensitivity(search, results["optimizers"], labels)
    for axes in (tokens, seconds, finals, search):
        axes.grid(alpha=0.3)
    handles, names = tokens.get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)), frameon=False)
    figure.savefig(path)


def style(label: str, labels: list[str]) -> dict[str, Any]:
    """Colour and dashes of an optimizer."""
    index = labels.index(label)
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}


def losses(axes: Axes, runs: list[dict[str, Any]], labels: list[str], x: str) -> None:
    """Every seed's validation loss; the axis leaves out what the first tenth of training alone shows."""
    late = []
    for run in runs:
        xs, ys = run["validation"][x], run["validation"]["val_loss"]
        if not xs:
            continue
        first = run["label"] not in axes.get_legend_handles_labels()[1]
        axes.plot(xs, ys, linewidth=1.2, label=run["label"] if first else None, **style(run["label"], labels))
        late += [y for value, y in zip(xs, ys, strict=True) if value >= 0.1 * xs[-1]]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.05
        axes.set_ylim(min(late) - margin, max(late) + margin)


def final_losses(axes: Axes, rows: list[dict[str, Any]], labels: list[str]) -> None:
    """Each seed's final loss, with mean and interval."""
    shown = [row for row in rows if row["loss"]]
    for height, row in enumerate(reversed(shown)):
        color, loss = style(row["label"], labels)["color"], row["loss"]
        axes.plot(list(row["final"].values()), [height] * len(row["final"]), "o", color=color, alpha=0.5, markersize=5)
        axes.errorbar(loss["mean"], height, xerr=loss["half"], fmt="|", color=color, markersize=16, capsize=5)
    axes.set_yticks(range(len(shown)), [row["label"] for row in reversed(shown)])
    axes.set(xlabel="final validation loss: seeds, mean, 95 % interval", ylim=(-0.6, max(len(shown), 1) - 0.4))


def sensitivity(axes: Axes, rows: list[dict[str, Any]], labels: list[str]) -> None:
    """Validation loss by learning rate; crosses at the top diverged."""
    searched = [row for row in rows if row["search"] and row["search"]["lr"]]
    for row in searched:
        points = [(p["value"], p["loss"]) for p in row["search"]["lr"] if p["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, **style(row["label"], labels))
    top = axes.get_ylim()[1]
    for row in searched:
        for lost in (p["value"] for p in row["search"]["lr"] if p["loss"] is None):
            axes.plot(lost, top, "x", color=style(row["label"], labels)["color"], clip_on=False)
    if searched:
        axes.set(xscale="log", xlabel="learning rate (crosses: diverged)", ylabel="validation loss of the search")
    else:
        axes.set_axis_off()
