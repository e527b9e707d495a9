"""Functions of the step number alone, which need no saved state: learning rate, random seeds, and when to log or save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
from torch.optim import Optimizer

from celo2.training.schedule import cosine
from configs.load import ConfigError
from configs.schema import Config, Schedule

JUMP = 0.05  # relative change of the learning rate on resume above which a note is shown


def due(step: int, every: int, steps: int) -> bool:
    """Return whether something is due after `step`: at every multiple of `every` (0: never), and at the last step, `steps`."""
    return step == steps or (every > 0 and step % every == 0)


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Return the factor on the peak learning rate in optimizer step `step` (from 0) of `steps`.

    Linear warm-up over `schedule.warmup * steps` steps. Then, by `schedule.kind`: constant; linear or cosine decay to
    `schedule.final` at the last step; or "wsd": constant, then linear decay to `final` over the last `schedule.decay * steps`
    steps. The whole schedule begins at step `schedule.start`, and `steps` counts from there in these products.
    """
    warmup = warmup_steps(schedule, steps)
    step, steps = step - schedule.start, steps - schedule.start
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


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Return the number of warm-up steps of a run of `steps`. The last of them has the peak learning rate."""
    return round(schedule.warmup * (steps - schedule.start))


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rate of every group to its peak (`initial_lr`) times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def with_cooldown(config: Config, step: int) -> Config:
    """Return `config` for a line that begins after `step`; with `schedule.cooldown`, the run decays from there and ends."""
    if not config.schedule.cooldown:
        return config
    schedule = replace(config.schedule, kind="linear", warmup=0.0, start=step)
    return replace(config, schedule=schedule, train=replace(config.train, steps=step + config.schedule.cooldown, tokens=None))


def rate_after(saved: Mapping[str, Any], config: Config) -> str:
    """Return a note if the learning rate jumps after a checkpoint, else "". `saved` is the checkpoint's state.json.

    Raises:
        ConfigError: the schedule begins after the checkpoint, or a cooldown begins at a rate below the peak.
    """
    step, now, there = saved["step"], config.schedule, saved["config"]
    if now.start > step:
        raise ConfigError(f"schedule.start is {now.start}, but the run resumes after step {step}: take {step} or less")
    was = Schedule(**{f.name: there["schedule"][f.name] for f in fields(Schedule) if f.name in there["schedule"]})
    total, peak, before = there["train"]["steps"], there["optimizer"]["lr"], 0.0
    if step:
        before = lr_factor(was, step - 1, total)
        if now.cooldown and now.start == step and before != 1:
            raise ConfigError(
                f"schedule.cooldown: the learning rate of the checkpoint of step {step} is {before:.3g} of its peak, by "
                f"schedule.kind={was.kind} over {total} steps; a cooldown begins at the peak of a constant or wsd schedule"
            )
    if step >= config.train.steps or now.cooldown or (was, total) == (now, config.train.steps):
        return ""
    expected = peak * (lr_factor(was, step, total) if step < total else before)
    rate = config.optimizer.lr * lr_factor(now, step, config.train.steps)
    if abs(rate - expected) <= JUMP * max(rate, expected):
        return ""
    ended = f"which ended at step {total}" if step >= total else f"over {total} steps"
    scaled = "" if config.optimizer.base_width is None else " (before optimizer.base_width)"
    return (
        f"the learning rate is now {rate:.3g}{scaled}: {described(asdict(now))} over {config.train.steps} steps. With the "
        f"schedule of the checkpoint, {described(asdict(was))} {ended}, it would be {expected:.3g} "
        f"(schedule.start={step} starts the new schedule at this step)"
    )


def described(schedule: Mapping[str, Any]) -> str:
    """Return a schedule in a few words."""
    start = f" from step {schedule['start']} on" if schedule["start"] else ""
    return f"{schedule['kind']}{start}"


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Return the random seed of a micro-batch. `micro_batch` is counted over all ranks, so the rank does not matter."""
    return int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0])
