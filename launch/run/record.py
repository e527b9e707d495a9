"""The line of metrics.jsonl for a logged step."""

from __future__ import annotations

from typing import Any

from configs.schema import Config
from launch.monitoring.guard import Verdict
from launch.optimizers.table import rate_of_the_rest
from launch.run.state import RunState


def training_record(
    state: RunState, since: RunState, verdict: Verdict, config: Config, factor: float, peak_speed: float | None
) -> dict[str, Any]:
    """Return the line of metrics.jsonl for the step of `state`. `since` is the state at the previous line.

    `loss` is the mean over the targets of all steps since the previous line, `step_loss` the mean over those of this step.
    """
    optimizer = config.optimizer
    speed = (state.tokens - since.tokens) / (state.seconds - since.seconds)
    record = {"step": state.step, "tokens": state.tokens, "loss": state.window_loss, "step_loss": verdict.loss}
    record |= {"lr": optimizer.lr * factor, "grad_norm": verdict.grad_norm}
    record["adamw_lr"] = rate_of_the_rest(optimizer) * factor
    record |= {"tokens_per_second": speed, "seconds": state.seconds}
    if peak_speed:
        record["mfu"] = speed / peak_speed
    return record
