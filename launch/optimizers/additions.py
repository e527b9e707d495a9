"""Options that every optimizer can get, as hooks around its step: cautious weight decay and EMA-Nesterov.

Hooks and no wrapper, so that the optimizer stays of its own class for all that asks what it is. A refused step (`found_inf` on
the device, or no step at all) changes neither weights nor state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs.load import ConfigError
from configs.schema import Optimizer as OptimizerConfig

CAUTIOUS = "cautious_weight_decay"  # of a group: its weight decay, which the optimizer itself is not told
EMA = "ema_nesterov"  # of the state: the average of a parameter's changes, like the weight
# Where the lookahead acts, as fractions of train.steps. The authors leave it out at the beginning and while the learning rate
# decays to its end: steps 500 to 2,400 of 3,150 with Muon, 300 to 1,950 of 2,900 with Aurora (modded-nanogpt, track 3).
WINDOW = (0.15, 0.75)
Groups = list[dict[str, Any]]


def without_decay(groups: Groups) -> Groups:
    """Groups whose optimizer does not decay; `CautiousDecay` does."""
    return [{**group, "weight_decay": 0.0, CAUTIOUS: group["weight_decay"]} for group in groups]


def add_options(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Give `optimizer` the hooks that `config` asks for.

    Raises:
        ConfigError: it moves the weights between training and evaluation itself, so that they are not what its step changes.
    """
    asked = [key for key, value in (("cautious_weight_decay", config.cautious_weight_decay), (EMA, config.ema_nesterov)) if value]
    own = getattr(optimizer, "optimizers", [optimizer])[0]
    if asked and hasattr(getattr(own, "inner", own), "eval"):
        raise ConfigError(f"optimizer.{asked[0]} does not go with {config.name}, which averages the weights itself: leave it out")
    if config.cautious_weight_decay:
        decay = CautiousDecay()
        optimizer.register_step_pre_hook(decay.before_step)
        optimizer.register_step_post_hook(decay.after_step)
    if config.ema_nesterov:  # its hook after the step comes last: decay is part of the step that it looks at
        lookahead = EmaNesterov(optimizer, config.ema_nesterov, config.ema_nesterov_decay)
        optimizer.register_step_pre_hook(lookahead.before_step)
        optimizer.register_step_post_hook(lookahead.after_step)
        optimizer.lookahead = lookahead  # type: ignore[attr-defined]


class CautiousDecay:
    """Decoupled weight decay only where it pushes a weight the way that the update does (arXiv 2510.12402).

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
        """Decay."""
        refused = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in self.old:
                    decay_cautiously_(p, self.old.pop(p), group["lr"] * group[CAUTIOUS], refused)


def decay_cautiously_(w: Tensor, old: Tensor, rate: float | Tensor, refused: Tensor | None = None) -> None:
    """w <- w - rate old, where a step from `old` to w did not push away from 0; nothing where `refused`, float32 (), is 1."""
    agree = (old - w) * old >= 0
    if refused is not None:
        agree &= refused == 0
    w.sub_(torch.where(agree, rate * old, 0.0))


class EmaNesterov:
    """Each step from a point ahead of the weights, along an average of their changes (EMA-Nesterov, arXiv 2605.25395).

    With an optimizer's step A, weights x and their average change m, which begins at 0:

        x' = A(x + β m)
        m' = γ m + (1 - γ) (x' - x)

    β is `beta` times the learning rate's fraction of its peak within `WINDOW`, else 0. The gradient is that at x + β m: `enter`
    goes there before the forward pass. Memory: m and x, 8 bytes a weight.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, beta: float, gamma: float) -> None:
        self.optimizer, self.beta, self.gamma = optimizer, beta, gamma
        self.x: dict[Tensor, Tensor] = {}  # the weights that a step begins with, as long as it lasts
        self.m: dict[Tensor, Tensor] = {}  # during a step, since libraries take state that is there for their own
        for group in optimizer.param_groups:
            for p in group["params"]:
                if optimizer.state.get(p):  # made at construction: then a checkpoint must hold all of it
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
        """Put back what no step has updated since `enter`; returns whether anything was."""
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
        """Move the averages of the parameters that were updated, and put them back."""
        refused = getattr(optimizer, "found_inf", None)
        for p, m in self.m.items():
            x = self.x.pop(p)
            change = p - x
            if refused is not None:
                change = torch.where(refused > 0, m, change)
                p.copy_(torch.where(refused > 0, x, p))
            optimizer.state[p][EMA] = m.lerp_(change, 1 - self.gamma)
        self.m.clear()
