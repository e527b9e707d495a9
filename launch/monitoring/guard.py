"""The guard of a training run: it notices steps that are not finite and spikes of the loss, and tells all ranks of signals.

In every step all ranks add up five numbers and so agree on what happens next. The host waits for the device there. That is short
beside a step of a GPU, and no step that is not finite can reach the weights, nor one whose gradient is another on some rank.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator

from celo2.distributed.collectives import gather_objects
from configs.schema import Train
from launch.monitoring.signals import StopSignals

SPIKE_WINDOW = 50  # a spike is measured against the median loss of so many healthy steps
# Relative standard deviation of the ranks' gradient norms. Every rank computes the norm of the same whole gradient, and the same
# bits come out on equal devices; what kinds of devices may differ by is rounding.
SAME_NORM = 1e-3
NAMED = 8  # ranks that a message names


class Diverged(RuntimeError):
    """Loss or gradient are not finite any more, or rolling back does not help. The message names the step."""


@dataclass
class Verdict:
    """What all ranks agreed on for one step."""

    loss: float  # of the global batch, nats per token
    grad_norm: float
    stop: bool  # some rank got a signal
    save: bool  # the first rank's clock asks for a checkpoint
    healthy: bool = True  # loss and gradient norm are finite, the norm is every rank's: the step may reach the weights
    problem: str = ""  # what a person should know about this step
    roll_back: bool = False


class Guard:
    """Judges every step. `signals` tells whether this rank got one."""

    def __init__(self, accelerator: Accelerator, config: Train, signals: StopSignals | None = None) -> None:
        self.accelerator, self.config, self.signals = accelerator, config, signals or StopSignals()
        self.bad_in_a_row = 0
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def agree(self, *values: torch.Tensor | float) -> list[float]:
        """The sums of `values` over all ranks, and as the last number how many ranks got a signal."""
        device = self.accelerator.device
        mine = []
        for value in (*values, float(self.signals.received)):
            if isinstance(value, torch.Tensor):
                mine.append(value.to(device, torch.float64))
            else:  # `full` is a kernel; a number that is copied to a GPU would make the host wait once more
                mine.append(torch.full((), value, dtype=torch.float64, device=device))
        return self.accelerator.reduce(torch.stack(mine), "sum").tolist()

    def stopping(self) -> bool:
        """Whether some rank got a signal; every rank must ask."""
        return self.agree()[-1] > 0

    def judge(self, loss: torch.Tensor, grad_norm: torch.Tensor, save: bool) -> Verdict:
        """The verdict on a step from this rank's share of the loss and the norm of the whole gradient, before the update.

        The norm counts as every rank has it: a gradient that goes wrong on one rank after the reduction is no other's.

        Raises:
            Diverged: `max_bad_steps` steps in a row were not finite, and rolling back is not allowed.
        """
        norm = grad_norm.to(torch.float64)
        total, norms, squares, saves, stops = self.agree(loss, norm, norm.square(), float(save))
        world = self.accelerator.num_processes
        verdict = Verdict(total, norms / world, stop=stops > 0, save=saves > 0)  # the mean of equal numbers is exact
        may_roll_back = self.config.on_spike == "rollback"
        deviates = squares / world - verdict.grad_norm**2 > (SAME_NORM * verdict.grad_norm) ** 2
        if deviates or not (math.isfinite(verdict.loss) and math.isfinite(verdict.grad_norm)):
            self.bad_in_a_row += 1
            verdict.healthy = False
            whose = self.whose(loss, grad_norm) if world > 1 else ""
            verdict.problem = f"loss {verdict.loss}, gradient norm {verdict.grad_norm}{whose}: the step is skipped"
            verdict.roll_back = may_roll_back and self.bad_in_a_row >= self.config.max_bad_steps
            if self.bad_in_a_row >= self.config.max_bad_steps and not may_roll_back:
                raise Diverged(f"{self.bad_in_a_row} steps in a row were not finite, the last with {verdict.problem}")
        else:
            self.bad_in_a_row = 0
            if self.config.spike and len(self.losses) == SPIKE_WINDOW:
                usual = statistics.median(self.losses)
                if verdict.loss > usual + self.config.spike:
                    verdict.problem = f"loss {verdict.loss:.4f} is a spike above the usual {usual:.4f}"
                    verdict.roll_back = may_roll_back
            self.losses.append(verdict.loss)
        if verdict.roll_back:
            self.bad_in_a_row = 0
            self.losses.clear()
        return verdict

    def whose(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> str:
        """The ranks alone whose loss or norm is not finite, or else the norms that differ, in words. Every rank must ask."""
        everyone = gather_objects((loss.item(), grad_norm.item()), dist.group.WORLD)  # type: ignore[arg-type]
        bad = [str(rank) for rank, values in enumerate(everyone) if not all(map(math.isfinite, values))]
        norms = [norm for _, norm in everyone]
        if 0 < len(bad) < len(everyone):
            return f" (not finite on rank {', '.join(bad[:NAMED])} alone)"
        if bad or min(norms) == max(norms):
            return ""
        low, high = norms.index(min(norms)), norms.index(max(norms))
        return f" (the ranks differ: {norms[low]:.6g} on rank {low}, {norms[high]:.6g} on rank {high})"
