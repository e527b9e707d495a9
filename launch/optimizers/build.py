"""Optimizers by the name in the configuration. All of them get the same routing (`celo2.param_groups`), so that a
comparison changes the update of the hidden matrices and nothing else; those that must have every parameter say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from celo2 import Celo2, Rule, load_rule, param_groups
from celo2.distributed.shard import local_shard_of
from configs.load import ConfigError
from configs.schema import Optimizer as OptimizerConfig
from launch.optimizers.sharded_muon import ShardedMuon
from launch.optimizers.third_party import Foreign, construct, find_class

Groups = list[dict[str, Any]]
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True}


class Combined(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters behind the interface of one; groups and state are shared with them."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        for optimizer in optimizers:
            self.state.update(optimizer.state)
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

    def train(self) -> None:
        """Weights to train on, for optimizers that keep others to evaluate."""
        for optimizer in self.optimizers:
            set_mode(optimizer, "train")

    def eval(self) -> None:
        """Weights to evaluate and to keep."""
        for optimizer in self.optimizers:
            set_mode(optimizer, "eval")


@dataclass(frozen=True)
class Library:
    """An optimizer of a library under a short name, set as its authors advise for language models."""

    path: str  # dotted path of the class
    package: str | None = None  # what pip calls the library, if it does not come with torch
    route: str = "hidden"  # see optimizer.route
    arguments: dict[str, Any] = field(default_factory=dict)
    decay: float = 1.0  # factor on the weight decay of what it updates


STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIBRARIES = {
    # arXiv 2302.06675, section 5: these betas for language models, a weight decay 3 to 10 times AdamW's.
    "lion": Library("pytorch_optimizer.Lion", "pytorch_optimizer", arguments={"betas": (0.95, 0.98)}, decay=3.0),
    # arXiv 2409.11321: betas (0.95, 0.95), eigenbases every 10 steps, on the matrices of the layers alone.
    "soap": Library("pytorch_optimizer.SOAP", "pytorch_optimizer", arguments={"precondition_frequency": 10}),
    # arXiv 1804.04235; its learning rate is relative to the RMS of the weight.
    "adafactor": Library("torch.optim.Adafactor"),
    # arXiv 2405.15682: averages the weights, so it must have them all; wants schedule.kind=constant.
    "schedule-free": Library("schedulefree.AdamWScheduleFree", "schedulefree", route="all"),
}


def optimizer_groups(config: OptimizerConfig, model: nn.Module) -> Groups:
    """The parameter groups of `model` with the learning rates and decay of `config`, routed for its optimizer."""
    check_state_dtype(config)
    variant = celo2_rule(config).variant if config.name in ("celo2", "celo2-base") else "celo2"
    adamw_lr = config.lr if config.adamw_lr is None else config.adamw_lr
    return param_groups(model, config.lr, adamw_lr, config.weight_decay, variant=variant)


def build_optimizer(
    config: OptimizerConfig, groups: Groups, replicas: dist.ProcessGroup | None = None, shard_state: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that `config` names over `optimizer_groups`, whose parameters may have become local shards, with
    `initial_lr` in every group. `replicas` and `shard_state`: see `Celo2`; the other optimizers do everything on every rank.
    """
    if config.name in ("celo2", "celo2-base"):
        division = {} if replicas is None else {"replicas": replicas, "shard_state": shard_state}
        own = {"rule": celo2_rule(config), "state_dtype": STATE_DTYPES[config.state_dtype]}
        options = own | division | (config.arguments or {})
        optimizer: torch.optim.Optimizer = construct(Celo2, groups, options)
    elif shard_state:
        raise ConfigError(f"distributed.shard_state divides the state of celo2 and celo2-base, not of {config.name}")
    else:
        optimizer = BUILDERS.get(config.name, build_foreign)(config, groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def celo2_rule(config: OptimizerConfig) -> Rule:
    """The rule of `config`; one that was trained for the other variant is refused."""
    rule = load_rule(config.rule or config.name)
    if rule.variant != config.name:
        raise ConfigError(f"optimizer.rule '{config.rule}' is a {rule.variant} rule, but optimizer.name is {config.name}")
    return rule


def build_adamw(config: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    """torch's fused AdamW everywhere."""
    return construct(torch.optim.AdamW, plain(groups), ADAMW | (config.arguments or {}))


def build_muon(config: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    """Muon on the hidden matrices, at the scale of its authors' match_rms_adamw; AdamW elsewhere."""
    by_muon = [group for group in groups if group["update"] == "celo2"]
    for group in by_muon:
        if group["matrices"] is not None or any(len(local_shard_of(p).shape) != 2 for p in group["params"]):
            name = group["param_names"][0]
            raise ConfigError(f"optimizer.name muon: torch's Muon takes plain matrices only, '{name}' is fused or stacked")
    rest = [group for group in groups if group["update"] == "adamw"]
    if is_sharded(groups):
        muon: torch.optim.Optimizer = construct(ShardedMuon, plain(by_muon), config.arguments or {})
    else:
        muon = construct(torch.optim.Muon, plain(by_muon), {"adjust_lr_fn": "match_rms_adamw"} | (config.arguments or {}))
    return Combined(muon, torch.optim.AdamW(plain(rest), **ADAMW))


def is_sharded(groups: Groups) -> bool:
    """Whether any parameter is a local_shard."""
    return not all(local_shard_of(p).whole for group in groups for p in group["params"])


def build_foreign(config: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    """An optimizer of a library, by short name or dotted path: over everything, or over the hidden matrices beside AdamW."""
    library = library_of(config)
    if is_sharded(groups):
        raise ConfigError(f"optimizer.name {config.name} knows whole parameters only: use distributed.strategy=ddp")
    rest = [group for group in groups if library.route == "hidden" and group["update"] == "adamw"]
    own = [
        group | {"weight_decay": group["weight_decay"] * library.decay}
        for group in groups
        if library.route == "all" or group["update"] == "celo2"
    ]
    cls = find_class(library.path, library.package)
    optimizer = Foreign(construct(cls, plain(own), library.arguments | (config.arguments or {})))
    return Combined(optimizer, torch.optim.AdamW(plain(rest), **ADAMW)) if rest else optimizer


def library_of(config: OptimizerConfig) -> Library:
    """Where the optimizer comes from that is none of this project's or torch's under a short name."""
    return LIBRARIES.get(config.name) or Library(config.name, route=config.route)


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise ConfigError for an optimizer that cannot be had, before any model is built."""
    check_state_dtype(config)
    if config.name in ("celo2", "celo2-base"):
        celo2_rule(config)
    elif config.name not in BUILDERS:
        library = library_of(config)
        group = {"params": [nn.Parameter(torch.zeros(2, 2))], "lr": config.lr, "weight_decay": config.weight_decay}
        construct(find_class(library.path, library.package), [group], library.arguments | (config.arguments or {}))


def check_state_dtype(config: OptimizerConfig) -> None:
    """Raise ConfigError if the optimizer has float32 state only and another is asked for."""
    if config.state_dtype != "fp32" and config.name not in ("celo2", "celo2-base"):
        raise ConfigError(f"optimizer.state_dtype {config.state_dtype} is for celo2 and celo2-base, not for {config.name}")


def set_mode(optimizer: torch.optim.Optimizer, mode: Literal["train", "eval"]) -> None:
    """Put in place the weights to train on, or those to evaluate and keep, for an optimizer that tells them apart."""
    getattr(optimizer, mode, lambda: None)()


def plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups without the keys that only `Celo2` knows."""
    return [{key: value for key, value in group.items() if key not in ("update", "matrices")} for group in groups]


BUILDERS: dict[str, Callable[[OptimizerConfig, Groups], torch.optim.Optimizer]] = {"adamw": build_adamw, "muon": build_muon}
