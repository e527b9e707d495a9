"""An average of the weights, kept beside them (`train.average`).

The average is sharded like the weights, and is float32 for any dtype of the weights. It is updated after every step by
elementwise operations on the device: nothing is sent, and the host does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from configs.average import AverageOptions


class Average:
    """An average of some weights over the healthy steps since the average began.

    After the n-th of these steps, an average a of a weight w becomes a + (w - a) max(1/n, 1 - decay). So for up to
    1 / (1 - decay) steps it is the mean of the weights since the beginning, and after that an exponential moving average. With a
    decay of 1 it is always the mean. Weights from before the beginning have no part in it.

    Attributes:
        means: the average of each weight by name, float32, with the shape that the weight has on this rank.
        begun: whether there is an average yet; the same on all ranks.
    """

    def __init__(self, options: AverageOptions, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """`weights`: by name, as this rank holds them: whole, or flat local shards."""
        self.options, self.weights, self.begun = options, dict(weights), False
        self.means = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        self.members = torch.zeros((), dtype=torch.int64, device=device)  # number of healthy steps since the beginning

    @torch.no_grad()
    def update(self, step: int, refused: Tensor) -> None:
        """Add the weights after `step` to the average, unless `refused`, a number () on the device, is 1."""
        if step <= self.options.start:
            self.begin_anew()  # when a run is extended, its tail begins later
            return
        self.begun = True
        healthy = refused == 0
        self.members += healthy
        rate = (1 / self.members.clamp(min=1).float()).clamp(min=1 - self.options.decay)
        # Until the first healthy step, the average equals the current weights.
        rate = torch.where(healthy | (self.members == 0), rate, 0.0)
        for name, mean in self.means.items():
            mean.lerp_(self.weights[name].detach().float(), rate)

    def begin_anew(self) -> None:
        """Reset the average: it has not begun."""
        if self.begun:
            self.members.zero_()
        self.begun = False

    def go_on(self, members: int) -> None:
        """Continue with the `means` of a checkpoint, which the caller has filled in, over `members` healthy steps."""
        self.members.fill_(members)
        self.begun = True

    @contextmanager
    def in_place(self, changed: Callable[[], None]) -> Iterator[None]:
        """In this context, the weights hold the average. Afterwards they have their own values again, bit for bit.

        Weights and average are swapped tensor by tensor, so that float32 weights need no further memory. `changed` is called
        whenever the weights have changed.
        """
        rounded = {name: mean.clone() for name, mean in self.means.items() if self.weights[name].dtype != mean.dtype}
        self._change_places()
        changed()
        try:
            yield
        finally:
            self._change_places()
            for name, mean in rounded.items():
                self.means[name] = mean
            changed()

    @torch.no_grad()
    def _change_places(self) -> None:
        for name, weight in self.weights.items():
            before = weight.clone()
            weight.copy_(self.means[name])
            self.means[name].copy_(before)
