"""An average of the weights beside them: `train.average`.

It is divided over the ranks as the weights are, in float32 whatever they are in, and moves after every step by elementwise
operations on the device alone: nothing is sent, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from configs.average import AverageOptions


class Average:
    """An average of some weights over the healthy steps since it began.

    After the n-th of them each number is a + (w - a) max(1/n, 1 - decay). So it is the mean of all weights since the beginning
    as long as there are fewer than 1 / (1 - decay), and then an exponential average; with a decay of 1 always the mean. It never
    holds a part of the weights from before its beginning.

    Attributes:
        means: the average of each weight by name, float32, of its shape here.
        begun: whether there is an average yet; the same on all ranks.
    """

    def __init__(self, options: AverageOptions, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """`weights` by name, as this rank holds them: whole, or flat local shards."""
        self.options, self.weights, self.begun = options, dict(weights), False
        self.means = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        self.members = torch.zeros((), dtype=torch.int64, device=device)  # healthy steps since the beginning

    @torch.no_grad()
    def update(self, step: int, refused: Tensor) -> None:
        """Take in the weights after `step`, unless it was `refused`: a number () on the device, 0 or 1."""
        if step <= self.options.start:
            self.begin_anew()  # a run that was made longer: its tail begins later
            return
        self.begun = True
        healthy = refused == 0
        self.members += healthy
        rate = (1 / self.members.clamp(min=1).float()).clamp(min=1 - self.options.decay)
        # While no step was healthy, the average is the weights as they are.
        rate = torch.where(healthy | (self.members == 0), rate, 0.0)
        for name, mean in self.means.items():
            mean.lerp_(self.weights[name].detach().float(), rate)

    def begin_anew(self) -> None:
        """Forget everything."""
        if self.begun:
            self.members.zero_()
        self.begun = False

    def go_on(self, members: int) -> None:
        """Go on with `means`, which somebody has filled."""
        self.members.fill_(members)
        self.begun = True

    @contextmanager
    def in_place(self, changed: Callable[[], None]) -> Iterator[None]:
        """Until the end of the context the weights are the average; then they have their bits again.

        They change places tensor by tensor, so that float32 weights take no memory for it. `changed` is called whenever the
        weights have changed.
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
