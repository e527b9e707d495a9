"""The guard of a training run: it refuses steps that are not finite, and notices spikes of the loss.

In every step all ranks add up five numbers and so agree on what happens next. The device reaches the verdict, and the update
reads it there (`found_inf`). The host does not wait: it reads the numbers of a step while the device works on the next one. So
no step that is not finite reaches the weights, nor a step with different gradients on the ranks, and the device never idles.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from celo2.distributed.collectives import gather_objects
from configs.schema import Train
from launch.monitoring.signals import StopSignals

SPIKE_WINDOW = 50  # a spike is measured against the median loss of this many healthy steps
# Largest relative standard deviation of the ranks' gradient norms. Every rank computes the norm of the same whole gradient: equal
# devices get the same bits, and different kinds of devices differ by rounding alone.
SAME_NORM = 1e-3
NAMED = 8  # a message names at most this many ranks


class Diverged(RuntimeError):
    """Loss or gradient are not finite any more, or rolling back does not help. The message names the step."""


@dataclass
class Verdict:
    """What all ranks agreed on for one step, as the host learns it."""

    step: int  # counted from 1
    loss: float  # of the global batch, nats per token
    grad_norm: float
    stop: bool  # some rank got a signal
    save: bool  # the first rank's clock asks for a checkpoint
    healthy: bool = True  # loss and gradient norm are finite, all ranks have that norm: the step has reached the weights
    problem: str = ""  # what the user should know about this step
    roll_back: bool = False


class Judged:
    """A step whose verdict is on the device.

    Attributes:
        step: its number, counted from 1.
        loss: float32 (), of the global batch.
        found_inf: float32 (), 1 where the step must not reach the weights; named as torch's fused optimizers name it.
    """

    def __init__(self, step: int, numbers: Tensor) -> None:
        """`numbers` (7,), float64: loss, gradient norm, whether refused, save, stop, the loss and the norm of this rank."""
        self.step, self.loss, self.found_inf = step, numbers[0].float(), numbers[2].float()
        on_gpu = numbers.is_cuda
        self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=on_gpu)
        self.numbers.copy_(numbers, non_blocking=True)
        self.copied = torch.cuda.Event() if on_gpu else None
        if self.copied is not None:
            self.copied.record()

    def read(self) -> list[float]:
        """The numbers. The host waits until the device has them, and for nothing that was enqueued later."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()

    @property
    def refused(self) -> bool:
        """Whether the step must not reach the weights, for an optimizer that cannot ask the device."""
        return self.read()[2] > 0


class Guard:
    """Judges every step. `signals` tells whether this rank got a stop signal."""

    def __init__(self, accelerator: Accelerator, config: Train, signals: StopSignals | None = None) -> None:
        self.accelerator, self.config, self.signals = accelerator, config, signals or StopSignals()
        self.bad_in_a_row = 0
        self.has_checkpoint = False  # whether there is one to roll back to; the same on all ranks
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.on_device: deque[Judged] = deque()
        self.arrived: deque[tuple[int, list[float]]] = deque()  # step, and numbers of `Judged`

    def go_on(self, losses: Sequence[float], has_checkpoint: bool) -> None:
        """Resume a run; `losses` are those of its last healthy steps."""
        self.losses.extend(losses)
        self.has_checkpoint = has_checkpoint

    def agree(self, *values: Tensor | float) -> Tensor:
        """The sums of `values` over all ranks, and as the last number how many ranks got a signal; float64, on the device."""
        device = self.accelerator.device
        mine = []
        for value in (*values, float(self.signals.received)):
            if isinstance(value, Tensor):
                mine.append(value.to(device, torch.float64))
            else:  # `full` is a kernel; a number that is copied to a GPU would make the host wait
                mine.append(torch.full((), value, dtype=torch.float64, device=device))
        return self.accelerator.reduce(torch.stack(mine), "sum")

    def stopping(self) -> bool:
        """Whether some rank got a signal; every rank must call it. The host waits."""
        return self.agree()[-1].item() > 0

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor, save: bool) -> Judged:
        """Judge a step from this rank's share of the loss and the norm of the whole gradient, before the update.

        The norms of all ranks count: a gradient that goes wrong on one rank after the reduction shows on no other.
        """
        norm, world = grad_norm.to(self.accelerator.device, torch.float64), self.accelerator.num_processes
        total, norms, squares, saves, stops = self.agree(loss, norm, norm.square(), float(save)).unbind()
        mean = norms / world  # the mean of equal numbers is exact
        deviates = squares / world - mean.square() > (SAME_NORM * mean).square()
        refused = deviates | ~(total.isfinite() & mean.isfinite())
        self.on_device.append(Judged(step, torch.stack([total, mean, refused.double(), saves, stops, loss.to(total), norm])))
        return self.on_device[-1]

    def wait(self, newest: bool) -> None:
        """Wait for the verdicts on all steps but the newest. With `newest`, or if one says stop or save, wait for that, too.

        All ranks must give the same `newest`.
        """
        while len(self.on_device) > (0 if newest else 1):
            judged = self.on_device.popleft()
            numbers = judged.read()
            self.arrived.append((judged.step, numbers))
            newest = newest or any(numbers[3:5])

    def verdicts(self) -> Iterator[Verdict]:
        """Yield the verdicts that `wait` waited for. A verdict to roll back is the last: later steps are undone, too.

        Raises:
            Diverged: `max_bad_steps` steps in a row were not finite, and rolling back is not allowed or not possible.
        """
        while self.arrived:
            verdict = self.conclude(*self.arrived.popleft())
            if verdict.roll_back:
                self.arrived.clear()
                self.on_device.clear()
            yield verdict

    def conclude(self, step: int, numbers: list[float]) -> Verdict:
        """The verdict on `step`, after those on all steps before it. Raises Diverged as `verdicts` does."""
        loss, norm, refused, saves, stops, *of_this_rank = numbers
        verdict = Verdict(step, loss, norm, stop=stops > 0, save=saves > 0)
        asked = self.config.on_spike == "rollback"
        may_roll_back = asked and self.has_checkpoint
        no_checkpoint = ", and there is no checkpoint to roll back to" if asked and not may_roll_back else ""
        if refused:
            self.bad_in_a_row += 1
            verdict.healthy = False
            whose = self.whose(*of_this_rank) if self.accelerator.num_processes > 1 else ""
            verdict.problem = f"loss {verdict.loss}, gradient norm {verdict.grad_norm}{whose}: the step is skipped"
            verdict.roll_back = may_roll_back and self.bad_in_a_row >= self.config.max_bad_steps
            if self.bad_in_a_row >= self.config.max_bad_steps and not may_roll_back:
                raise Diverged(f"{self.bad_in_a_row} steps in a row were not finite{no_checkpoint}; the last: {verdict.problem}")
        else:
            self.bad_in_a_row = 0
            if self.config.spike and len(self.losses) == SPIKE_WINDOW:
                usual = statistics.median(self.losses)
                if verdict.loss > usual + self.config.spike:
                    verdict.problem = f"loss {verdict.loss:.4f} is a spike above the usual {usual:.4f}{no_checkpoint}"
                    verdict.roll_back = may_roll_back
            self.losses.append(verdict.loss)
        if verdict.roll_back:
            self.bad_in_a_row = 0
            self.losses.clear()
        return verdict

    def whose(self, loss: float, grad_norm: float) -> str:
        """In words: the ranks with a loss or norm that is not finite, or else the norms that differ. Every rank must call it."""
        everyone = gather_objects((loss, grad_norm), dist.group.WORLD)  # type: ignore[arg-type]
        bad = [str(rank) for rank, values in enumerate(everyone) if not all(map(math.isfinite, values))]
        norms = [norm for _, norm in everyone]
        if 0 < len(bad) < len(everyone):
            return f" (not finite on rank {', '.join(bad[:NAMED])} alone)"
        if bad or min(norms) == max(norms):
            return ""
        low, high = norms.index(min(norms)), norms.index(max(norms))
        return f" (the ranks differ: {norms[low]:.6g} on rank {low}, {norms[high]:.6g} on rank {high})"
