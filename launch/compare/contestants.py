"""What is compared: optimizers by name or dotted path, with options of their own, and where their grids begin."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from celo2 import load_rule
from celo2.rule_files import HUB
from celo2.training.yaml_values import dump_yaml, read_yaml, untyped
from configs.load import ConfigError, build
from configs.schema import Config, Optimizer
from launch.optimizers.build import check_optimizer, rule_of
from launch.optimizers.table import TABLE, decays, entry_of, uses_adamw_lr
from launch.optimizers.third_party import accepted, find_class
from launch.run.agreement import rule_hash


@dataclass(frozen=True)
class Contestant:
    """One optimizer of the comparison."""

    label: str  # its name, with its options if two contestants share the name
    slug: str  # a name for its folder
    overrides: tuple[str, ...]  # section.key=value, without learning rates
    lr: float  # where its grid begins
    special: tuple[str, ...]  # what a reader must know that is not the same for all
    takes_adamw_lr: bool  # whether the common optimizer.adamw_lr changes anything
    section: Optimizer  # of the configuration, with its own options
    rule: str | None  # `rule_hash` of its rule, if it has one


def parse(spec: str, config: Config) -> Contestant:
    """A contestant from `NAME` or `NAME{key: value, ...}`, the keys those of the section `optimizer`.

    Examples: `celo2`, `celo2{rule: mine.safetensors}`, `torch.optim.NAdam`,
    `mypackage.Soap{route: hidden, lr: 3e-3, arguments: {precondition_frequency: 10}}`.

    Raises:
        ConfigError: `spec` is not of this form, has an unknown key, or names an optimizer that cannot be built.
    """
    name, brace, rest = spec.partition("{")
    name = name.strip()
    try:
        own = read_yaml(brace + rest, spec) if brace else {}
    except ConfigError:
        own = None
    if not isinstance(own, dict) or not name or "name" in own:
        raise ConfigError(f"--optimizers '{spec}': expected NAME or NAME{{key: value, ...}}")
    same = name == config.optimizer.name  # then the options of the configuration are meant for it
    own = untyped(own, spec)
    unused: dict[str, Any] = {}  # values of the configuration for others, without effect on this one
    if not same:
        own = {"rule": None, "arguments": None, "route": Optimizer().route} | own
        if not uses_adamw_lr(Optimizer(name=name, route=own["route"])):
            own = {"adamw_lr": None} | own
        if not entry_of(Optimizer(name=name)).takes_rule and config.optimizer.state_dtype != Optimizer().state_dtype:
            own = {"state_dtype": Optimizer().state_dtype} | own  # other optimizers have no other dtype
        if not decays(Optimizer(name=name, route=own["route"])):
            unused = {key: getattr(Optimizer(), key) for key in ("weight_decay", "cautious_weight_decay")}
        if entry_of(Optimizer(name=name)).width_rule == "none":
            unused["base_width"] = None
        own = unused | own
    usual = asdict(config.optimizer) if same else {"weight_decay": config.optimizer.weight_decay}
    section = build({"optimizer": usual | own | {"name": name}}).optimizer
    check_optimizer(section)  # now, not after the trials of the others
    if section.rule is not None and section.rule.startswith(HUB):
        own["rule"] = load_rule(section.rule, name).source  # one commit for every trial
    entry = entry_of(section)
    lr = section.lr if same or "lr" in own else usual_lr(name) * config.optimizer.lr / usual_lr(config.optimizer.name)
    if not lr > 0:
        raise ConfigError(f"{spec}: the search begins at the learning rate {lr:g}; give a positive lr")
    given = [f"optimizer.{key}={flow(value)}" for key, value in own.items() if key != "lr"]
    overrides = (f"optimizer.name={name}", *given, *entry.needs)
    plain = {"optimizer.route=hidden", *(f"optimizer.{key}={flow(value)}" for key, value in unused.items())}
    special = [option for option in overrides[1:] if not option.endswith("=null") and option not in plain]
    if not uses_adamw_lr(section):
        special.append("trains every parameter with its own learning rate, without adamw_lr")
    if name in TABLE and entry.third_party:
        special += [f"{key} {value}" for key, value in entry.arguments.items()]
        special += [f"weight decay of matrices times {entry.decay:g}"] if entry.decay != 1 else []
    label = spec.strip()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")
    takes_adamw_lr = uses_adamw_lr(section) and "adamw_lr" not in own
    rule = rule_hash(rule_of(section)) if entry.takes_rule else None
    return Contestant(label, slug, overrides, lr, tuple(special), takes_adamw_lr, section, rule)


def parse_all(specs: list[str], config: Config) -> list[Contestant]:
    """All contestants, each with a folder of its own."""
    contestants = [parse(spec, config) for spec in specs]
    names = [spec.partition("{")[0].strip() for spec in specs]
    contestants = [replace(c, label=n) if names.count(n) == 1 else c for c, n in zip(contestants, names, strict=True)]
    for attribute in ("label", "slug"):
        values = [getattr(c, attribute) for c in contestants]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"--optimizers names '{twice}' twice")
    return contestants


def usual_lr(name: str) -> float:
    """Where a grid begins: what authors use, or the default of a library's constructor, or 1e-3 where it has none."""
    usual = entry_of(Optimizer(name=name)).usual_lr
    if usual is not None:
        return usual
    parameter = accepted(find_class(name)).get("lr")
    value = getattr(parameter, "default", None)
    return float(value) if isinstance(value, int | float) and value > 0 else 1e-3


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    return dump_yaml(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
