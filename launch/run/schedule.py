"""What follows from the number of a step alone, so that there is nothing to save: learning rate, random numbers, when to log."""

from __future__ import annotations

import numpy as np
from torch.optim import Optimizer

from celo2.training.schedule import cosine
from configs.schema import Schedule


def due(step: int, every: int, steps: int) -> bool:
    """Whether something happens after `step`: at every multiple of `every` (0: never), and at the last of all `steps`."""
    return step == steps or (every > 0 and step % every == 0)


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The factor on the peak learning rate in optimizer step `step` (from 0) of `steps`; the last step has `schedule.final`.

    Linear warm-up over `schedule.warmup * steps` steps, then constant, linear or cosine decay to `final`; or "wsd": constant, and
    linear decay to `final` over the last `schedule.decay * steps` steps.
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


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """The seed of the random numbers of a micro-batch, counted over all ranks: the same, whichever rank takes it."""
    return int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0])
