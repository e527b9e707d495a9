"""How large a checkpoint is and how long it takes, beside the time that a launcher leaves between a signal and SIGKILL."""

from __future__ import annotations

import math
import os
from typing import Any

from launch.distributed.strategy import Strategy

TORCHRUN_SECONDS = 30.0  # torchrun's default
VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # of torchrun, in seconds; the ranks see it, unlike its --shutdown-timeout


def expected_bytes(strategy: Strategy) -> float:
    """About how large a checkpoint is: the weights, and the state by that of the parameters which have theirs on this rank."""
    weights = sum(math.prod(shard.local_shard.shape) for shard in strategy.shards.values())
    states = [(shard.weight, strategy.optimizer.state.get(shard.weight)) for shard in strategy.shards.values()]
    held = sum(weight.numel() for weight, state in states if state)
    size = sum(v.numel() * v.element_size() for _, state in states if state for v in state.values() if hasattr(v, "numel"))
    return weights * (4 + (size / held if held else 8))


class Grace:
    """Says whether a save fits into the time that is left after a signal."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.seconds: float | None = None  # that the last checkpoint took
        self.bytes = 0.0
        self.warned = False
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.limit = float(os.environ.get(VARIABLE, TORCHRUN_SECONDS)) if under_torchrun else math.inf

    def saved(self, record: dict[str, Any]) -> str | None:
        """Learn from the event of a checkpoint. A line that warns, once, where saving takes over half of the launcher's time."""
        if "bytes" not in record:
            return None
        self.seconds, self.bytes = record["stall_seconds"] + record["write_seconds"], record["bytes"]
        if self.warned or self.seconds < self.limit / 2:
            return None
        self.warned = True
        return f"warning: a checkpoint takes {self.seconds:.0f} s, and {self.launcher()}"

    def launcher(self) -> str:
        """What torchrun does after a signal."""
        more = f"{VARIABLE}={max(60, 4 * (self.seconds or 0)):.0f} gives more, or --shutdown-timeout"
        return f"after a signal torchrun kills the ranks within {self.limit:.0f} s unless it was told otherwise ({more})"

    def stopping(self) -> str:
        """The line for the moment of a signal."""
        size = self.bytes or expected_bytes(self.strategy)
        took = "the first one" if self.seconds is None else f"the last one took {self.seconds:.1f} s"
        end = "" if math.isinf(self.limit) else f"; {self.launcher()}"
        return f"a signal: saving about {size / 1e9:.3g} GB, {took}{end}"
