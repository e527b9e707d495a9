"""Counts where a training run reads what a device has computed, so that the host would wait for a GPU; here all is on the CPU."""

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from torch.overrides import TorchFunctionMode

from launch.private import DispatchMode
from launch.run.hooks import Hooks

ROOT = Path(__file__).parents[2]
LAST = "launch/monitoring/guard.py: read"  # the verdict on the step before, which was copied to the host in the background
# Operators whose result, or its shape, is known to the host: `item`, `float`, `bool` and `if` end in the first.
OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
METHODS = {"tolist", "numpy", "cpu", "__array__", "__reduce_ex__", "pin_memory"}  # read or copy memory without such an operator


def reader() -> str:
    """The innermost function of the project, or of DeepSpeed, that runs."""
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/deepspeed/" in name:
            return "deepspeed"
        if name.startswith(str(ROOT)) and "/tests/" not in name and "/.venv/" not in name:
            return f"{Path(name).relative_to(ROOT)}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class HostWaits(Hooks):
    """A context to run a training run in, and its hooks; afterwards `of_step` has each step and its reads, by who reads.

    A step begins before its gradient is computed and ends before the next one's, with all that `train.py` does in between.
    """

    def __init__(self, hooks=None):
        self.hooks = hooks or Hooks()  # what else is to happen
        self.of_step = [(0, Counter())]
        self.stack = ExitStack()

    def before_step(self, step, strategy):
        self.of_step.append((step, Counter()))
        self.hooks.before_step(step, strategy)

    def after_backward(self, step, strategy, loss):
        self.hooks.after_backward(step, strategy, loss)

    def count(self):
        self.of_step[-1][1][reader()] += 1

    def __enter__(self):
        waits = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if getattr(function, "__name__", "") in METHODS:
                    waits.count()
                return function(*args, **(kwargs or {}))

        class Operators(DispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function.overloadpacket.__name__ in OPERATORS:
                    waits.count()
                return function(*args, **(kwargs or {}))

        self.stack.enter_context(Functions())
        self.stack.enter_context(Operators())
        return self

    def __exit__(self, *exception):
        self.stack.__exit__(*exception)
