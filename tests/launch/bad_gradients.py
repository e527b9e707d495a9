"""A gradient that is not finite, for tests of what a training run does with it."""

from launch.run.hooks import Hooks


class Poison(Hooks):
    """NaN in one number of the gradient of `steps`, the first time that the run makes them."""

    def __init__(self, steps):
        self.left = set(steps)

    def after_backward(self, step, strategy, loss):
        if step in self.left:
            self.left.discard(step)
            next(strategy.loss_model.parameters()).grad[0] = float("nan")
