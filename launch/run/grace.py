"""Compares the time that a checkpoint takes with the time that torchrun leaves between a stop signal and SIGKILL."""

from __future__ import annotations

import math
import os
from typing import Any

from launch.distributed.strategy import Strategy

TORCHRUN_SECONDS = 30.0  # torchrun's default
VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's, in seconds; ranks can read it, unlike torchrun's --shutdown-timeout


def expected_bytes(strategy: Strategy) -> float:
    """Estimate the bytes of a checkpoint: weights in float32, and optimizer state extrapolated from what this rank keeps."""
    weights = sum(math.prod(shard.local_shard.shape) for shard in strategy.shards.values())
    states = [(shard.weight, strategy.optimizer.state.get(shard.weight)) for shard in strategy.shards.values()]
    held = sum(weight.numel() for weight, state in states if state)
    size = sum(v.numel() * v.element_size() for _, state in states if state for v in state.values() if hasattr(v, "numel"))
    return weights * (4 + (size / held if held else 8))


class Grace:
    """Words warnings about the time that is left for a checkpoint after a signal."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.seconds: float | None = None  # duration of the last checkpoint
        self.bytes = 0.0
        self.warned = False
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.limit = float(os.environ.get(VARIABLE, TORCHRUN_SECONDS)) if under_torchrun else math.inf

    def saved(self, record: dict[str, Any]) -> str | None:
        """Record the size and duration of a checkpoint. Returns a warning, once, if it took half of torchrun's time or more."""
        if "bytes" not in record:
            return None
        self.seconds, self.bytes = record["stall_seconds"] + record["write_seconds"], record["bytes"]
        if self.warned or self.seconds < self.limit / 2:
            return None
        self.warned = True
        return f"warning: a checkpoint takes {self.seconds:.0f} s, and {self.launcher()}"

    def launcher(self) -> str:
        """Return a text that says what torchrun does after a signal."""
        more = f"{VARIABLE}={max(60, 4 * (self.seconds or 0)):.0f} allows more, as does that option"
        return f"torchrun kills the ranks {self.limit:.0f} s after a signal unless --shutdown-timeout sets another limit ({more})"

    def stopping(self) -> str:
        """Return the line to show when a signal arrives."""
        size = self.bytes or expected_bytes(self.strategy)
        took = "the first one" if self.seconds is None else f"the last one took {self.seconds:.1f} s"
        end = "" if math.isinf(self.limit) else f"; {self.launcher()}"
        return f"a signal: saving about {size / 1e9:.3g} GB, {took}{end}"
