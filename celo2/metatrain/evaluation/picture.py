"""The gain over training steps: how far each optimizer's training loss is below that of a reference, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

Curves = Mapping[int, list[float]]  # by seed: the means of equal parts of a run's training losses, in order


def gains(curves: Curves, reference: Curves) -> np.ndarray:
    """(seeds, parts): reference minus own loss, for seeds with whole curves in both. Equal seeds see equal batches."""
    whole = [seed for seed in curves if seed in reference and len(curves[seed]) == len(reference[seed])]
    return np.array([np.subtract(reference[seed], curves[seed]) for seed in whole])


def draw(tasks: Mapping[str, Mapping[str, Curves]], steps: int, path: Path) -> None:
    """A panel for each task: the mean gain of each optimizer over the first one, with ± a standard error.

    `tasks`: of each task and optimizer the curves of the seeds that did not diverge.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5 * len(tasks), 3.6), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (task, found) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        (first, reference), *others = found.items()
        axes.axhline(0, color="black", linewidth=0.8)
        for name, curves in others:
            gain = gains(curves, reference)
            if not len(gain):
                continue
            at = (np.arange(gain.shape[1]) + 0.5) * steps / gain.shape[1]
            mean, error = gain.mean(0), gain.std(0) * max(1, len(gain) - 1) ** -0.5
            (line,) = axes.plot(at, mean, label=f"{name} (n = {len(gain)})")
            axes.fill_between(at, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=task, xlabel="step", ylabel=f"training loss of {first} minus own")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
