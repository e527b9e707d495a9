"""The state of a training run, and its form in a checkpoint's state.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from configs.schema import Config
from data.batches import Batches


@dataclass
class RunState:
    """The state of a training run after `step` optimizer steps."""

    step: int = 0
    sequences: int = 0  # sequences taken from the order of the data (data.order), including those that rollbacks skipped
    sources: dict[str, int] = field(default_factory=dict)  # in a mixture: how many of them each source gave, by fingerprint
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # spent in training steps, over all starts; without evaluation and checkpoints
    evaluated: int = 0  # the step of the last evaluation
    val_loss: float | None = None  # validation loss at that step, if it is finite
    best_loss: float | None = None  # the lowest validation loss so far on the set `validation`
    validation: str | None = None  # hash of the set of the last evaluation; None: there was none, or by an earlier version
    bad_steps: int = 0  # refused steps: loss or gradient norm was not finite, or the norm differed between ranks
    rollbacks: int = 0
    rolled_back_to: int = 0  # the step of the last rollback's checkpoint
    rollbacks_in_a_row: int = 0  # rollbacks that did not help: to the same checkpoint again, or with no healthy step in between
    healthy_since: bool = True  # whether a step was healthy after the last rollback
    recent_losses: list[float] = field(default_factory=list)  # of healthy steps; spikes are measured against their median
    window_loss: float | None = None  # mean over the targets of healthy steps since the last logged step; None: no such step
    window_tokens: int = 0  # the number of these targets

    def finish_step(self, sequences: int, tokens: int, seconds: float) -> None:
        """Count one step."""
        self.step, self.sequences = self.step + 1, self.sequences + sequences
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def learn(self, tokens: int, loss: float | None) -> None:
        """Add the loss of a finished step, a mean over its `tokens` targets. `loss` is None if the step was skipped."""
        if loss is None:
            self.bad_steps += 1
            return
        self.healthy_since = True
        self.window_tokens += tokens
        mean = self.window_loss or 0.0
        self.window_loss = mean + (loss - mean) * (tokens / self.window_tokens)  # exactly `loss` for a single step

    def back_at(self, step: int, batches: Batches) -> RunState:
        """Return this state with the step number and the position in the order of the data set back to an earlier step."""
        return replace(self, step=step, sequences=batches.first(step), sources=batches.taken(step))

    def begin_window(self) -> None:
        """Begin a new mean loss, after a step was logged."""
        self.window_loss, self.window_tokens = None, 0

    def finish_evaluation(self, val_loss: float, validation: str) -> bool:
        """Record the loss after `step` on the set with the hash `validation`. Return whether it is the lowest on that set."""
        if self.validation not in (None, validation):
            self.best_loss = None
        self.validation = validation
        self.evaluated, self.val_loss = self.step, val_loss if math.isfinite(val_loss) else None
        best = self.val_loss is not None and (self.best_loss is None or self.val_loss < self.best_loss)
        self.best_loss = self.val_loss if best else self.best_loss
        return best


def to_saved(config: Config, state: RunState, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of state.json. `identity`: what must be equal when the run resumes (`launch.run.agreement`)."""
    return asdict(state) | {"identity": identity, "config": asdict(config)}


def from_saved(saved: dict[str, Any]) -> RunState:
    """Return the state from the contents of a state.json, also of an earlier version."""
    state = RunState(**{f.name: saved[f.name] for f in fields(RunState) if f.name in saved})
    if "sequences" not in saved:  # an earlier version counted batches, and listed the ranges that rollbacks skipped
        batch = state.step
        for start, stop in sorted(saved["skipped"]):
            batch += stop - start if batch >= start else 0
        state.sequences = batch * saved["config"]["train"]["batch_size"]
    return state
