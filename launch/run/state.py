"""Where a training run stands, and its form in a checkpoint's state.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from configs.schema import Config
from data.shards import TokenShards


@dataclass
class RunState:
    """The state of a training run after `step` optimizer steps."""

    step: int = 0
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # in training steps, over all starts; without evaluation and checkpoints
    evaluated: int = 0  # the step of the last evaluation
    bad_steps: int = 0  # steps that were skipped because loss or gradient norm was not finite
    rollbacks: int = 0
    skipped: list[tuple[int, int]] = field(default_factory=list)  # ranges of batches that rollbacks left out (data.order)
    window_loss: float | None = None  # mean over the targets of the healthy steps since the last logged one; None: no such step
    window_tokens: int = 0  # those targets

    def finish_step(self, tokens: int, seconds: float, loss: float | None) -> None:
        """Count one step, with its mean loss, or None if it was skipped."""
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        if loss is None:
            self.bad_steps += 1
            return
        self.window_tokens += tokens
        mean = self.window_loss or 0.0
        self.window_loss = mean + (loss - mean) * (tokens / self.window_tokens)  # exactly `loss` where it is the only step

    def begin_window(self) -> None:
        """The step is logged: the next mean begins after it."""
        self.window_loss, self.window_tokens = None, 0


def to_saved(config: Config, state: RunState, shards: TokenShards) -> dict[str, Any]:
    """The contents of state.json."""
    return asdict(state) | {"identity": identity(config, shards), "config": asdict(config)}


def from_saved(saved: dict[str, Any]) -> RunState:
    """The state in the contents of a state.json."""
    state = RunState(**{f.name: saved[f.name] for f in fields(RunState) if f.name in saved})  # an earlier version had fewer
    state.skipped = [(start, stop) for start, stop in state.skipped]
    return state


def identity(config: Config, shards: TokenShards) -> dict[str, Any]:
    """What must be the same at every start of one run, because otherwise its steps would see other data."""
    return {
        "data set": shards.fingerprint,
        "run.seed": config.run.seed,
        "train.batch_size": config.train.batch_size,
        "model.context": config.model.context,
        "optimizer.name": config.optimizer.name,
    }
