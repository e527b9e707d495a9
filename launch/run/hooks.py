"""Points of a training run at which its caller may act. Fault injection disturbs runs there, and tests observe them."""

from __future__ import annotations

from torch import Tensor

from launch.distributed.strategy import Strategy


class Hooks:
    """Gets called by `train.train`. These methods do nothing; a subclass overrides some of them."""

    def before_step(self, step: int, strategy: Strategy) -> None:
        """Step `step`, counted from 1, is about to compute its gradient."""

    def after_backward(self, step: int, strategy: Strategy, loss: Tensor) -> None:
        """The gradients of step `step` are there. `loss` is this rank's share, and may be changed in place."""

    def before_evaluation(self, step: int) -> None:
        """The validation loss after step `step` is about to be computed."""

    def before_save_phase(self, phase: str) -> None:
        """A phase of `launch.checkpoint.save.PHASES` is about to begin, in the thread of this rank that writes."""
