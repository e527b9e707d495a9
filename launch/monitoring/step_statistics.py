"""Statistics of the optimizer's steps: seconds, and how far they move the hidden weights. `launch.compare` reports them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from celo2 import param_groups
from celo2.stack import local

SAMPLE = 1 << 16  # elements of a matrix that are compared; a copy of all weights would not fit everywhere


class StepStatistics:
    """Observes an optimizer through its hooks: `begin` a step, let it happen, and `record` the steps since the last record.

    A step of the training run may be several of the optimizer: DeepSpeed calls the optimizer once for each group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], device: torch.device) -> None:
        """`weights` are the hidden matrices; under sharding, their local shards."""
        self.weights, self.device = weights, device
        self.before: list[Tensor] = []
        self.started: Any = None
        self.steps, self.seconds = 0, 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        optimizer.register_step_pre_hook(self._started)
        optimizer.register_step_post_hook(self._ended)

    def begin(self, measure: bool) -> None:
        """Begin a step of the run. With `measure`, the next record says how far this step moved the weights."""
        self.steps += 1
        self.before = [sample(weight).clone() for weight in self.weights] if measure else []

    def record(self) -> dict[str, float]:
        """Mean `optimizer_seconds` of a step. If the last step was measured, also its `update_rms`, the RMS change of a hidden
        weight, and its `update_ratio`, the same relative to the RMS of the weights."""
        if self.events:
            self.events[-1][1].synchronize()
            self.seconds += sum(start.elapsed_time(end) for start, end in self.events) / 1e3
        result = {"optimizer_seconds": self.seconds / self.steps} if self.steps else {}
        if self.before:
            pairs = [(before, sample(weight)) for before, weight in zip(self.before, self.weights, strict=True)]
            sums = [((after - before).double().square().sum(), before.double().square().sum()) for before, after in pairs]
            moved, size = torch.stack([x for pair in sums for x in pair]).view(-1, 2).sum(0).tolist()  # the host waits once
            count = sum(before.numel() for before, _ in pairs)
            result["update_rms"] = (moved / count) ** 0.5 if count else 0.0
            result["update_ratio"] = (moved / size) ** 0.5 if size else 0.0
        self.steps, self.seconds, self.events, self.before = 0, 0.0, [], []
        return result

    def _started(self, *_: object) -> None:
        self.started = self._clock()

    def _ended(self, *_: object) -> None:
        ended = self._clock()
        if self.device.type == "cuda":
            self.events.append((self.started, ended))
        else:
            self.seconds += ended - self.started

    def _clock(self) -> Any:
        """The time now; on a GPU, an event in the device's own queue, so that the host does not wait."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def hidden_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are hidden matrices, whatever optimizer they get; `model` is not sharded yet."""
    groups = param_groups(model, 0.0, 0.0)
    return [name for group in groups if group["update"] == "celo2" for name in group["param_names"]]


def sample(weight: Tensor) -> Tensor:
    """Up to about `SAMPLE` elements of a weight, evenly spread. An odd stride meets every column of even width."""
    here = local(weight).detach()
    return here.reshape(-1)[:: max(1, here.numel() // SAMPLE) | 1]
