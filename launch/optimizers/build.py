"""Build the optimizer that the configuration asks for.

All optimizers get the same groups: `celo2.param_groups` finds the hidden matrices by module. The `role` of a group, "hidden" or
"other", says whether the optimizer treats its parameters as hidden matrices. So a comparison of optimizers changes the update of
the hidden matrices and nothing else, except for optimizers that their authors apply to more parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from celo2 import Celo2, Rule, load_rule, param_groups
from celo2.distributed.shard import local_shard_of
from celo2.training.idle import refuse_idle
from configs.load import ConfigError
from configs.schema import Config, Distributed
from configs.schema import Optimizer as OptimizerConfig
from launch.optimizers.additions import CAUTIOUS, add_options, without_decay
from launch.optimizers.decay import decoupled_arguments, decoupled_groups
from launch.optimizers.idle import IDLE
from launch.optimizers.table import ADAMW, ROUTES, STEPS, OptimizerEntry, entry_of
from launch.optimizers.third_party import ThirdParty, accepted, construct, find_class

Groups = list[dict[str, Any]]
ROLES = {"celo2": "hidden", "adamw": "other"}  # the key `update` of Celo2's groups, as a role
UPDATES = {role: update for update, role in ROLES.items()}
OF_CELO2 = ("role", "matrices", "notes")  # keys that other optimizers do not know
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Combined(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters behind the interface of one. Groups and state are shared with them."""

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
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each optimizer."""
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


def set_mode(optimizer: torch.optim.Optimizer, mode: Literal["train", "eval"]) -> None:
    """Switch to the weights to train on, or to those to evaluate and save, for optimizers that keep both."""
    for part in getattr(optimizer, "optimizers", [optimizer]):
        if hasattr(part, mode):
            getattr(part, mode)()


def optimizer_groups(config: OptimizerConfig, model: nn.Module) -> Groups:
    """The parameter groups of `model`: `params`, `param_names`, `role`, `lr`, `weight_decay`, `matrices` (`celo2.layout`)."""
    entry = entry_of(config)
    if entry.takes_rule:
        rule_of(config)
    adamw_lr = config.lr if config.adamw_lr is None else config.adamw_lr
    variant = "celo2-base" if entry.all_hidden else "celo2"
    groups = param_groups(model, config.lr, adamw_lr, config.weight_decay, variant=variant)
    return [{**group, "role": ROLES[group.pop("update")]} for group in groups]


def as_celo2_groups(groups: Groups) -> Groups:
    """`groups` with the key `update` that `Celo2` and `celo2.routing_table` read, instead of `role`."""
    return [{**without(group, "role"), "update": UPDATES[group["role"]]} for group in groups]


def routed_groups(config: OptimizerConfig, groups: Groups) -> Groups:
    """`groups` as `celo2.routing_table` reads them: each with the name (`update`), rate and decay of its own optimizer."""
    entry = entry_of(config)
    if entry.takes_rule:
        return as_celo2_groups(groups)
    found = []
    for kind, group in by_kind(groups):
        own: dict[str, Any] = {"update": "adamw"}
        if kind in ROUTES[entry.route]:
            lr = config.lr if entry.one_lr else group["lr"]
            own = {"update": config.name, "lr": lr, "weight_decay": group["weight_decay"] * entry.decay}
        found.append({**without(group, "role"), **own})
    return found


def build_optimizer(
    config: OptimizerConfig,
    groups: Groups,
    replicas: dist.ProcessGroup | None = None,
    shard_state: bool = False,
    steps: int = 1,
) -> torch.optim.Optimizer:
    """The optimizer of `config` over the groups of `optimizer_groups`, with `initial_lr` in every group.

    Args:
        config: the section `optimizer`.
        groups: those of `optimizer_groups`; local shards may have replaced their parameters.
        replicas: the ranks that hold the same parameters. Optimizers without a rule do the same work on each of them.
        shard_state: each replica keeps a part of the optimizer state.
        steps: number of steps of the training run, for optimizers that need it (`STEPS`).

    Raises:
        ConfigError: the optimizer cannot be imported, refuses its arguments, or cannot do what the configuration asks for.
    """
    entry = entry_of(config)
    if config.cautious_weight_decay:
        groups = without_decay(groups)
    refuse_idle(Config(optimizer=config, distributed=Distributed(shard_state=shard_state)), IDLE)
    if entry.takes_rule:
        options: dict[str, Any] = {"rule": rule_of(config), "state_dtype": STATE_DTYPES[config.state_dtype]}
        for key in config.arguments or {}:
            if key in options:
                raise ConfigError(f"optimizer.arguments holds '{key}': give it as optimizer.{key}")
            if key in entry.idle_arguments:
                raise ConfigError(f"optimizer.arguments holds '{key}', which has no effect with {config.name}: leave it out")
        if replicas is not None:
            options |= {"replicas": replicas, "shard_state": shard_state}
        celo2: Any = construct(Celo2, as_celo2_groups(groups), options | (config.arguments or {}))
        celo2.allocate_state()  # checkpoints hold the state of every parameter, and a lack of memory shows at the start
        optimizer = celo2
    else:
        optimizer = build_by_class(config, entry, groups, steps)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    add_options(optimizer, config)
    return optimizer


def build_by_class(config: OptimizerConfig, entry: OptimizerEntry, groups: Groups, steps: int) -> torch.optim.Optimizer:
    """The class of `entry` over the kinds of parameters of its route, beside torch's AdamW for the rest."""
    own, rest = [], []
    for kind, group in by_kind(groups):
        if kind in ROUTES[entry.route]:
            lr = config.lr if entry.one_lr else group["lr"]
            own.append({**group, "lr": lr, **entry.options.get(kind, {})})
        else:
            rest.append(group)
    check_matrices(config, own)
    cls, arguments = find_class(entry.path, entry.package), entry.arguments
    if not all(local_shard_of(p).whole for group in groups for p in group["params"]):
        if entry.sharded_path is None:
            raise ConfigError(f"optimizer.name {config.name} does not support sharded parameters: use distributed.strategy=ddp")
        cls = find_class(entry.sharded_path)
        arguments = {key: value for key, value in arguments.items() if key in accepted(cls)}
    rest = [without(group, *OF_CELO2) for group in rest]
    own = [
        {**without(group, *OF_CELO2), **{key: group[key] * entry.decay for key in ("weight_decay", CAUTIOUS) if key in group}}
        for group in own
    ]
    arguments = {
        key: steps if isinstance(value, str) and value == STEPS else value
        for key, value in (decoupled_arguments(cls) | arguments | (config.arguments or {})).items()
    }
    optimizer = construct(cls, decoupled_groups(cls, own, arguments) if entry.third_party else own, arguments)
    if entry.third_party:
        optimizer = ThirdParty(optimizer)
    return Combined(optimizer, torch.optim.AdamW(rest, **ADAMW)) if rest else optimizer


def by_kind(groups: Groups) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the kind of the parameters (`ROUTES`) and the group; a group with several kinds is divided."""
    for group in groups:
        pairs = list(zip(group["param_names"], group["params"], strict=True))
        for kind in ROUTES["all"]:
            if mine := [pair for pair in pairs if kind_of(group["role"], pair[1]) == kind]:
                yield kind, {**group, "param_names": [name for name, _ in mine], "params": [p for _, p in mine]}


def kind_of(role: str, p: torch.Tensor) -> str:
    """The kind of a parameter with this role: a hidden matrix, an embedding or output layer, or a vector."""
    return role if role == "hidden" else "embeddings" if len(local_shard_of(p).shape) > 1 else "vectors"


def check_matrices(config: OptimizerConfig, groups: Groups) -> None:
    """Raise ConfigError if `groups` have hidden matrices that the optimizer does not take."""
    for group in groups if entry_of(config).plain_matrices else ():
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if group["role"] == "hidden" and (group["matrices"] is not None or len(local_shard_of(p).shape) != 2):
                raise ConfigError(f"optimizer.name {config.name} supports only plain matrices, but '{name}' is fused or stacked")


def without(group: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A copy of `group` without `keys`, which its optimizer does not know."""
    return {key: value for key, value in group.items() if key not in keys}


def rule_of(config: OptimizerConfig) -> Rule:
    """The rule of `config`, whose variant is the optimizer's name. Raises RuleError if the rule was trained for the other one."""
    return load_rule(config.rule or config.name, config.name)


def normalizes_gradient(config: OptimizerConfig) -> bool:
    """Whether the optimizer has a rule that divides each gradient by its RMS."""
    return entry_of(config).takes_rule and rule_of(config).normalize_gradient


def whitens(config: OptimizerConfig) -> bool:
    """Whether the optimizer has a rule that whitens directions, and orthogonalizes."""
    entry = entry_of(config)
    return entry.takes_rule and entry.orthogonalizes and rule_of(config).whitening > 0


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise ConfigError for an optimizer that cannot be built; no model is needed."""
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "matrices": None}
    groups = [
        common | {"params": [nn.Parameter(torch.zeros(4, 4))], "param_names": ["matrix"], "role": "hidden"},
        common | {"params": [nn.Parameter(torch.zeros(4))], "param_names": ["vector"], "role": "other"},
    ]
    build_optimizer(config, groups)
