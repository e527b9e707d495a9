"""The learning rate as a pure function of the step: nothing to save, nothing that could step twice."""

from __future__ import annotations

from torch.optim import Optimizer

from celo2.training.schedule import cosine
from configs.schema import Schedule


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Factor on the peak learning rate in optimizer step `step` (from 0) of `steps`; the last step has `schedule.final`.

    Linear warm-up over `schedule.warmup * steps` steps, then constant, linear or cosine decay to `final`, or "wsd": constant,
    then linear decay to `final` over the last `schedule.decay * steps` steps.
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    start = max(warmup, steps - round(schedule.decay * steps)) if schedule.kind == "wsd" else warmup
    if step < start:
        return 1.0
    progress = (step + 1 - start) / (steps - start)  # in (0, 1]
    if schedule.kind == "cosine":
        return cosine(progress, schedule.final)
    return schedule.final + (1 - schedule.final) * (1 - progress)


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rate of every group to its peak (`initial_lr`) times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
