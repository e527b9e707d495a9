"""What can end or disturb a run while it goes: signals, steps that are not finite, spikes of the loss.

Every step, all ranks exchange three numbers and so agree on what happens next. The host waits for the device there; a step of
a GPU is long beside it, and no step that is not finite can reach the weights.
"""

from __future__ import annotations

import math
import signal
import statistics
from collections import deque
from dataclasses import dataclass
from types import FrameType

import torch
from accelerate import Accelerator

from configs.schema import Train

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 75  # exit status (EX_TEMPFAIL): saved after a signal, run the same command again to continue
SPIKE_WINDOW = 50  # finished steps whose median loss a spike is measured against


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step."""


class Diverged(TrainingError):
    """The loss or the gradient does not become finite again, or rolling back does not help."""


@dataclass
class Verdict:
    """What all ranks agreed on for one step."""

    loss: float  # of the global batch, nats per token
    grad_norm: float
    stop: bool  # some rank got a signal
    save: bool  # the first rank's clock asks for a checkpoint
    healthy: bool = True  # loss and gradient norm are finite: the step may reach the weights
    problem: str = ""  # what a person should know about this step
    roll_back: bool = False


class Watch:
    """Holds the signal handlers while it is open; judges every step."""

    def __init__(self, accelerator: Accelerator, config: Train) -> None:
        self.accelerator, self.config = accelerator, config
        self.signalled = False
        self.bad_in_a_row = 0
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Watch:
        self.previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signalled:
            raise KeyboardInterrupt  # the second Ctrl-C: at once
        self.signalled = True

    def agree(self, *values: torch.Tensor | float) -> list[float]:
        """The sums of `values` over all ranks, and last how many ranks got a signal."""
        device = self.accelerator.device
        # `full` is a kernel; a number that is copied to a GPU would make the host wait once more.
        mine = torch.stack(
            [
                v.to(device, torch.float64)
                if isinstance(v, torch.Tensor)
                else torch.full((), v, dtype=torch.float64, device=device)
                for v in (*values, float(self.signalled))
            ]
        )
        return self.accelerator.reduce(mine, "sum").tolist()

    def stopping(self) -> bool:
        """Whether some rank got a signal; every rank must ask."""
        return self.agree()[-1] > 0

    def judge(self, loss: torch.Tensor, grad_norm: torch.Tensor, save: bool) -> Verdict:
        """The verdict on a step from this rank's share of the loss and the norm of the whole gradient, before the update.

        Raises:
            Diverged: `max_bad_steps` steps in a row were not finite, and rolling back is not allowed.
        """
        total, saves, stops = self.agree(loss, float(save))
        verdict = Verdict(total, grad_norm.item(), stop=stops > 0, save=saves > 0)
        may_roll_back = self.config.on_spike == "rollback"
        if not (math.isfinite(verdict.loss) and math.isfinite(verdict.grad_norm)):
            self.bad_in_a_row += 1
            verdict.healthy = False
            verdict.problem = f"loss {verdict.loss}, gradient norm {verdict.grad_norm}: the step is skipped"
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
