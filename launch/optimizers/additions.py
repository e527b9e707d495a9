"""Options that every optimizer can get, as hooks around its step: cautious weight decay and EMA-Nesterov.

They are hooks and not a wrapper, so that the optimizer keeps its own class for code that checks it. A refused step (`found_inf`
on the device, or no step at all) changes neither weights nor state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs.load import ConfigError
from configs.schema import Optimizer as OptimizerConfig

CAUTIOUS = "cautious_weight_decay"  # key of a group: its weight decay, which the optimizer itself does not see
EMA = "ema_nesterov"  # key of the state: the average of a parameter's changes, in the weight's shape
# When the lookahead is on, as fractions of train.steps. The authors turn it off at the beginning and while the learning rate
# decays to its end. Theirs is on in steps 500 to 2,400 of 3,150 with Muon and 300 to 1,950 of 2,900 with Aurora
# (modded-nanogpt, track 3).
WINDOW = (0.15, 0.75)
Groups = list[dict[str, Any]]


def without_decay(groups: Groups) -> Groups:
    """`groups` without the optimizer's own weight decay; `CautiousDecay` applies it instead."""
    return [{**group, "weight_decay": 0.0, CAUTIOUS: group["weight_decay"]} for group in groups]


def add_options(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Give `optimizer` the hooks that `config` asks for.

    Raises:
        ConfigError: `optimizer` swaps the weights between training and evaluation itself; its step then changes other weights.
    """
    asked = [key for key, value in (("cautious_weight_decay", config.cautious_weight_decay), (EMA, config.ema_nesterov)) if value]
    own = getattr(optimizer, "optimizers", [optimizer])[0]
    if asked and hasattr(getattr(own, "inner", own), "eval"):
        raise ConfigError(
            f"optimizer.{asked[0]} cannot be combined with {config.name}, which averages the weights itself: leave it out"
        )
    if config.cautious_weight_decay:
        decay = CautiousDecay()
        optimizer.register_step_pre_hook(decay.before_step)
        optimizer.register_step_post_hook(decay.after_step)
    if config.ema_nesterov:  # registered last, so that the step that it sees includes the decay
        lookahead = EmaNesterov(optimizer, config.ema_nesterov, config.ema_nesterov_decay)
        optimizer.register_step_pre_hook(lookahead.before_step)
        optimizer.register_step_post_hook(lookahead.after_step)
        optimizer.lookahead = lookahead  # type: ignore[attr-defined]


class CautiousDecay:
    """Decoupled weight decay only where it pushes a weight in the same direction as the update (arXiv 2510.12402).

    W <- W - lr (u + λ [u W >= 0] W), where -lr u is the optimizer's own step without decay and λ the group's weight decay.
    Where the step is lost in the rounding of W, u counts as 0. Memory: a copy of the weights during a step.
    """

    def __init__(self) -> None:
        self.old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Remember the weights that the step begins with."""
        decaying = [group for group in optimizer.param_groups if group[CAUTIOUS]]
        self.old = {p: p.clone() for group in decaying for p in group["params"] if p.grad is not None}

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Apply the decay."""
        refused = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in self.old:
                    decay_cautiously_(p, self.old.pop(p), group["lr"] * group[CAUTIOUS], refused)


def decay_cautiously_(w: Tensor, old: Tensor, rate: float | Tensor, refused: Tensor | None = None) -> None:
    """w <- w - rate old, where the step from `old` to w did not move away from 0. If `refused`, float32 (), is 1: nothing."""
    agree = (old - w) * old >= 0
    if refused is not None:
        agree &= refused == 0
    w.sub_(torch.where(agree, rate * old, 0.0))


class EmaNesterov:
    """Makes each step from a point ahead of the weights, along an average of their changes (EMA-Nesterov, arXiv 2605.25395).

    With an optimizer's step A, weights x and their average change m, which begins at 0:

        x' = A(x + β m)
        m' = γ m + (1 - γ) (x' - x)

    Within `WINDOW`, β is `beta` times the learning rate as a fraction of its peak; outside it is 0. The gradient is computed at
    x + β m: `enter` moves the weights there before the forward pass. Memory: m and x, 8 bytes a weight.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, beta: float, gamma: float) -> None:
        self.optimizer, self.beta, self.gamma = optimizer, beta, gamma
        self.x: dict[Tensor, Tensor] = {}  # the weights at the beginning of a step, kept until it ends
        self.m: dict[Tensor, Tensor] = {}  # filled during a step: libraries take all state that they find for their own
        for group in optimizer.param_groups:
            for p in group["params"]:
                if optimizer.state.get(p):  # made at construction: a checkpoint then needs this entry, too
                    optimizer.state[p][EMA] = torch.zeros_like(p)

    @torch.no_grad()
    def enter(self, progress: float) -> bool:
        """Move the weights ahead, after a fraction `progress` of all steps; returns whether they moved."""
        inside = WINDOW[0] <= progress < WINDOW[1]
        for group in self.optimizer.param_groups if inside else ():
            beta = self.beta * group["lr"] / group["initial_lr"] if group["initial_lr"] else 0.0
            for p in group["params"]:
                if EMA in self.optimizer.state.get(p, {}):
                    self.x[p] = p.clone()
                    p.add_(self.optimizer.state[p][EMA], alpha=beta)
        return bool(self.x)

    @torch.no_grad()
    def leave(self) -> bool:
        """Restore the weights that no step has updated since `enter`; returns whether there were any."""
        moved = bool(self.x)
        for p, x in self.x.items():
            p.copy_(x)
        self.x.clear()
        return moved

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Take the averages out of the state."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.x:
                    self.x[p] = p.clone()
                state = optimizer.state.get(p, {})
                self.m[p] = state.pop(EMA) if EMA in state else torch.zeros_like(p)
                if p in optimizer.state and not state:
                    del optimizer.state[p]

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Update the averages of the parameters that were updated, and put them back into the state."""
        refused = getattr(optimizer, "found_inf", None)
        for p, m in self.m.items():
            x = self.x.pop(p)
            change = p - x
            if refused is not None:
                change = torch.where(refused > 0, m, change)
                p.copy_(torch.where(refused > 0, x, p))
            optimizer.state[p][EMA] = m.lerp_(change, 1 - self.gamma)
        self.m.clear()
