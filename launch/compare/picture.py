"""The report as pictures: report.png has validation loss over tokens and seconds, the final losses and the learning-rate
searches; details.png the same loss over steps and FLOPs, the training loss, gradient norms and updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from data.files import replacing
from launch.compare.looks import looks_of

COLORS = ("#126fb8", "#d65b1d", "#5a9f84", "#b20360", "#a770fb", "#150090", "#4e4a00", "#580934")  # as in page.css
DASHES = ("-", (0, (4, 2)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (3, 1)), (0, (1, 2.4)), (0, (8, 2)))
MARKERS = "os^DvPX"
SMOOTHING = 0.6  # of training records, as on the page
X_NAMES = {"tokens": "tokens", "step": "optimizer steps", "seconds": "seconds in training steps", "flops": "model FLOPs"}
NAME = 28  # letters of an optimizer's name
# Kind of record, column, title, and whether the y axis covers only the values after the first fifth.
VALIDATION = ("validation", "val_loss", "validation loss, nats per token", True)
TRAINING = (
    ("loss", "training loss, nats per token", True),
    ("grad_norm", "norm of the gradient, before clipping", True),
    ("update_rms", "RMS change of a hidden weight in one step", False),
    ("update_ratio", "the same relative to the RMS of the weight", False),
)

Labels = list[str]
Rows = list[dict[str, Any]]
Panel = Callable[[Labels, Axes], None]


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture of the answer."""
    panels = [partial(curves, results["runs"], *VALIDATION, "tokens"), partial(curves, results["runs"], *VALIDATION, "seconds")]
    sheet(path, results, [*panels, partial(final_losses, results["optimizers"]), partial(sensitivity, results["optimizers"])])


def draw_details(results: dict[str, Any], path: Path) -> None:
    """Write the picture of everything else that was logged."""
    panels = [partial(curves, results["runs"], *VALIDATION, x) for x in ("step", "flops")]
    panels += [partial(curves, results["runs"], "training", *quantity, "tokens") for quantity in TRAINING]
    sheet(path, results, panels)


def sheet(path: Path, results: dict[str, Any], panels: Sequence[Panel]) -> None:
    """Panels two by two under one legend."""
    ranked = sorted(results["optimizers"], key=lambda row: row["loss"]["mean"] if row["loss"] else float("inf"))
    labels = [row["label"] for row in ranked]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.9 * rows + 0.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(rows, 2).flat, panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.tick_params(labelsize=9)
        panel(labels, axes)
    proxies = [figure.axes[0].plot([], [], markersize=5, linewidth=1.8, **style(label, labels))[0] for label in labels]
    names = [short(label) for label in labels]
    figure.legend(proxies, names, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, handlelength=3.5)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def style(label: str, labels: Labels) -> dict[str, Any]:
    """Color, dashes and marks of an optimizer."""
    color, dash, mark = looks_of(labels)[label]
    return {"color": COLORS[color], "linestyle": DASHES[dash], "marker": MARKERS[mark]}


def short(label: str) -> str:
    """A name that fits; `$` would begin a formula."""
    return (label if len(label) <= NAME else label[: NAME - 1] + "…").replace("$", r"\$")


def curves(runs: Rows, kind: str, column: str, title: str, tail: bool, x: str, labels: Labels, axes: Axes) -> None:
    """One logged quantity: each seed thin, the mean thick. With `tail`, the y axis covers only values after the first fifth."""
    late: list[float] = []
    for label in labels:
        seeds = [points(run, kind, column, x) for run in runs if run["label"] == label and run["status"] != "diverged"]
        seeds = [seed for seed in seeds if seed]
        for seed in seeds if len(seeds) > 1 else []:
            axes.plot(*zip(*seed.values(), strict=True), linewidth=0.7, alpha=0.4, color=style(label, labels)["color"])
        common = [step for step in seeds[0] if all(step in seed for seed in seeds)] if seeds else []
        if not common:
            continue
        xs = [mean(seed[step][0] for seed in seeds) for step in common]
        ys = [mean(seed[step][1] for seed in seeds) for step in common]
        every = max(1, len(xs) // 8)
        axes.plot(xs, ys, linewidth=1.8, markersize=4.5, markevery=((len(xs) - 1) % every, every), **style(label, labels))
        late += [y for seed in seeds for v, y in seed.values() if not tail or v >= 0.2 * xs[-1]]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.05 * abs(late[0]) or 0.05
        axes.set_ylim(max(0.0, min(late) - margin) if min(late) >= 0 else min(late) - margin, max(late) + margin)
        axes.set_xlim(left=0)
    else:
        axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color="gray")
    if x != "seconds":  # which would be shown in milliseconds below 1
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel=X_NAMES[x], ylabel=title)


def points(run: dict[str, Any], kind: str, column: str, x: str) -> dict[int, tuple[float, float]]:
    """(x, y) by step; training records are smoothed as on the page."""
    table = run[kind]
    xs, ys = table.get("tokens" if x == "flops" else x, []), table.get(column, [])
    if x == "flops":
        xs = [v * run["flops_per_token"] for v in xs] if run["flops_per_token"] else []
    weight, total, norm = SMOOTHING if kind == "training" else 0.0, 0.0, 0.0
    found = {}
    for step, v, y in zip(table["step"], xs, ys, strict=False):
        if v is None or y is None:
            continue
        total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        found[step] = (v, total / norm)
    return found


def final_losses(rows: Rows, labels: Labels, axes: Axes) -> None:
    """Each seed's final loss, with mean and interval; the lowest is on top."""
    shown = sorted((row for row in rows if row["loss"]), key=lambda row: -row["loss"]["mean"])
    for height, row in enumerate(shown):
        color, loss = style(row["label"], labels)["color"], row["loss"]
        if loss["half"] is not None:
            axes.barh(height, 2 * loss["half"], left=loss["mean"] - loss["half"], height=0.3, color=color, alpha=0.25)
        axes.plot(list(row["final"].values()), [height] * len(row["final"]), "o", color=color, alpha=0.75, markersize=4.5, mew=0)
        axes.plot([loss["mean"]] * 2, [height - 0.26, height + 0.26], "-", color=color, linewidth=2)
        axes.annotate(f"{loss['mean']:.3f}", (loss["mean"], height + 0.28), ha="center", va="bottom", fontsize=9, color=color)
    axes.set_yticks(range(len(shown)), [short(row["label"]) for row in shown])
    axes.grid(visible=False, axis="y")
    axes.use_sticky_edges = False  # otherwise bars would end at the frame
    axes.margins(x=0.08)
    axes.set(xlabel="final validation loss: seeds, mean, 95 % interval", ylim=(-0.5, max(len(shown), 1) - 0.35))


def sensitivity(rows: Rows, labels: Labels, axes: Axes) -> None:
    """Validation loss by learning rate; the chosen one is hollow, crosses at the top diverged."""
    searched = [row for row in rows if row["search"] and row["search"]["lr"]]
    if not searched:
        axes.set_axis_off()
        return
    for row in searched:
        tried = [(p["value"], p["loss"]) for p in row["search"]["lr"] if p["loss"] is not None]
        if tried:
            own = style(row["label"], labels)
            axes.plot(*zip(*tried, strict=True), markersize=5, **own)
            chosen = [point for point in tried if point[0] == row["search"].get("chosen_lr", row["lr"])]
            if chosen:
                axes.plot(*chosen[0], **own, markersize=9, markerfacecolor="white", markeredgewidth=2)
    top = axes.get_ylim()[1]
    for row in searched:
        for lost in (p["value"] for p in row["search"]["lr"] if p["loss"] is None):
            axes.plot(lost, top, "x", color=style(row["label"], labels)["color"], clip_on=False, markeredgewidth=2)
    axes.set(xscale="log", xlabel="learning rate (hollow: chosen; ×: diverged)", ylabel="validation loss of the search")
    tried = [p["value"] for row in searched for p in row["search"]["lr"]]
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(tried) < 300 * min(tried) else (1,), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(6))
