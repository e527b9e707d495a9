"""Optimizers by the name in the configuration. All of them get the same routing (`celo2.param_groups`), so that a
comparison changes the update of the hidden matrices and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from celo2 import Celo2, load_rule, param_groups
from configs.load import ConfigError
from configs.schema import Optimizer as OptimizerConfig

ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True}


class Combined(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters behind the interface of one; groups and state are shared with them."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for optimizer in self.optimizers:
            stop = start + len(optimizer.param_groups)
            optimizer.param_groups, optimizer.state = self.param_groups[start:stop], self.state
            start = stop

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and share the loaded groups and state again."""
        super().load_state_dict(state_dict)
        self._share()


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the trainable parameters of `model`, with `initial_lr` in every group."""
    optimizer = BUILDERS[config.name](config, model)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def routed_groups(config: OptimizerConfig, model: nn.Module, variant: str = "celo2") -> list[dict[str, Any]]:
    """The parameter groups of `model` with the learning rates and decay of `config`."""
    adamw_lr = config.lr if config.adamw_lr is None else config.adamw_lr
    return param_groups(model, config.lr, adamw_lr, config.weight_decay, variant=variant)


def build_celo2(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Celo2 or Celo2-base; a rule that was trained for the other is refused."""
    rule = load_rule(config.rule or config.name)
    if rule.variant != config.name:
        raise ConfigError(f"optimizer.rule '{config.rule}' is a {rule.variant} rule, but optimizer.name is {config.name}")
    return Celo2(routed_groups(config, model, rule.variant), lr=config.lr, rule=rule)


def build_adamw(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW everywhere."""
    return torch.optim.AdamW(plain(routed_groups(config, model)), **ADAMW)


def build_muon(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """torch's Muon on the hidden matrices, at the scale of its authors' match_rms_adamw; AdamW elsewhere."""
    groups = routed_groups(config, model)
    by_muon = [group for group in groups if group["update"] == "celo2"]
    for group in by_muon:
        if group["matrices"] is not None or any(p.ndim != 2 for p in group["params"]):
            name = group["param_names"][0]
            raise ConfigError(f"optimizer.name muon: torch's Muon takes plain matrices only, '{name}' is fused or stacked")
    rest = [group for group in groups if group["update"] == "adamw"]
    muon = torch.optim.Muon(plain(by_muon), adjust_lr_fn="match_rms_adamw")
    return Combined(muon, torch.optim.AdamW(plain(rest), **ADAMW))


def plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups without the keys that only `Celo2` knows."""
    return [{key: value for key, value in group.items() if key not in ("update", "matrices")} for group in groups]


BUILDERS: dict[str, Callable[[OptimizerConfig, nn.Module], torch.optim.Optimizer]] = {
    "celo2": build_celo2,
    "celo2-base": build_celo2,
    "adamw": build_adamw,
    "muon": build_muon,
}
