"""Points of a training run at which its caller may act. Fault injection disturbs runs there; tests observe runs there."""

from __future__ import annotations

from torch import Tensor

from launch.distributed.strategy import Strategy


class Hooks:
    """The hooks that train.py calls. These methods do nothing; a subclass overrides some of them."""

    def before_step(self, step: int, strategy: Strategy) -> None:
        """Called before step `step`, counted from 1, computes its gradient."""

    def after_backward(self, step: int, strategy: Strategy, loss: Tensor) -> None:
        """Called when the gradients of step `step` are computed. `loss` is this rank's share; it may be changed in place."""

    def before_evaluation(self, step: int) -> None:
        """Called before the evaluation after step `step`."""

    def before_save_phase(self, phase: str) -> None:
        """Called before a phase of `launch.checkpoint.save.PHASES`, in this rank's checkpoint thread."""
