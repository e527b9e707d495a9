"""A signal in the middle of a training run, for tests of what it saves."""

import os
import signal

from launch.run.hooks import Hooks


class StopIn(Hooks):
    """SIGTERM when one of `steps` begins."""

    def __init__(self, *steps):
        self.steps = steps

    def before_step(self, step, strategy):
        if step in self.steps:
            os.kill(os.getpid(), signal.SIGTERM)
