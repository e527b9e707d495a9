"""A configuration from a YAML file and dotted overrides, checked against `configs.schema`, and back to YAML."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from configs.schema import OPTIMIZERS, Config


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The configuration of the YAML file `path` with `section.key=value` overrides.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown key (naming the nearest right one), a wrong type or value.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read configuration '{path}' ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections like 'train:', found a {type(tree).__name__}")
    for override in overrides:
        set_dotted(tree, override)
    config = build(Config, tree, prefix="")
    check(config)
    return config


def set_dotted(tree: dict, override: str) -> None:
    """Apply one `section.key=value`; the value is YAML."""
    dotted, separator, text = override.partition("=")
    if not separator or not all(dotted.split(".")):
        raise ConfigError(f"'{override}': expected section.key=value")
    *parents, last = dotted.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"'{override}': '{parent}' is a value, not a section")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"'{override}': the value is not YAML") from None


def build(cls: type, tree: Any, prefix: str) -> Any:
    """A dataclass from nested mappings; every key known, every value of its type."""
    if not isinstance(tree, dict):
        raise ConfigError(f"'{prefix.rstrip('.')}' is a section: expected keys below it, found {tree!r}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(f"unknown key '{prefix}{key}'{nearest(prefix, key)}")
    values = {}
    for key, value in tree.items():
        kind, name = hints[key], f"{prefix}{key}"
        values[key] = build(kind, value or {}, f"{name}.") if is_dataclass(kind) else checked(kind, value, name)
    return cls(**values)


def nearest(prefix: str, key: str) -> str:
    """A hint at the nearest right key: in the same section first, then in the others, or at the sections."""
    known = [name for name, _, _ in options()] + [f.name for f in fields(Config)]
    own = [name for name in known if name.rpartition(".")[0] == prefix.rstrip(".")]
    near = difflib.get_close_matches(f"{prefix}{key}", own, n=1) or [
        name for name in known if name.rpartition(".")[2] == str(key)
    ]
    near = near or difflib.get_close_matches(f"{prefix}{key}", known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(own)}"


def checked(kind: Any, value: Any, name: str) -> Any:
    """`value` if it is of type `kind`; integers pass for floats, and so do the exponents that YAML reads as text (1e-3)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return checked(kind, value, name)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), arguments, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{name} is '{value}', expected one of {', '.join(arguments)}{hint}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{name} is {value!r}, expected a list")
        return [checked(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value)]
    if kind is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{name} is '{value}', expected a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    plain = origin or kind
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{name} is {value!r}, expected {getattr(plain, '__name__', plain)}")
    return value


def check(config: Config) -> None:
    """Values that types do not exclude."""
    at_least = {
        "train.steps": 1,
        "train.batch_size": 1,
        "train.micro_batch_size": 1,
        "train.grad_clip": 0,
        "train.max_bad_steps": 1,
        "train.spike": 0,
        "optimizer.lr": 0,
        "optimizer.weight_decay": 0,
        "checkpoint.every": 0,
        "checkpoint.minutes": 0,
        "checkpoint.keep": 1,
        "log.every": 1,
        "log.sample_tokens": 0,
        "eval.every": 0,
        "eval.sequences": 1,
    }
    for name, minimum in at_least.items():
        if not get(config, name) >= minimum:
            raise ConfigError(f"{name} is {get(config, name)}, expected at least {minimum}")
    check_optimizer_name(config.optimizer.name)
    if config.optimizer.adamw_lr is not None and not config.optimizer.adamw_lr >= 0:
        raise ConfigError(f"optimizer.adamw_lr is {config.optimizer.adamw_lr}, expected at least 0")
    for name in ("schedule.warmup", "schedule.final", "schedule.decay", "model.dropout"):
        if not 0 <= get(config, name) <= 1:
            raise ConfigError(f"{name} is {get(config, name)}, expected a fraction between 0 and 1")
    for tracker in config.log.trackers:
        if tracker not in ("tensorboard", "wandb"):
            raise ConfigError(f"log.trackers holds '{tracker}', expected tensorboard or wandb")


def check_optimizer_name(name: str) -> None:
    """Raise ConfigError for a name that is none of the schema's; a dotted path is judged where it is imported."""
    if "." not in name:
        checked(Literal[OPTIMIZERS], name, "optimizer.name")


def get(config: Config, dotted: str) -> Any:
    """The value under a dotted name."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def options() -> list[tuple[str, Any, str]]:
    """Every option as (dotted name, default, documentation)."""
    defaults = Config()
    return [
        (f"{s.name}.{f.name}", get(defaults, f"{s.name}.{f.name}"), f.metadata["doc"])
        for s in fields(Config)
        for f in fields(getattr(defaults, s.name))
    ]


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
