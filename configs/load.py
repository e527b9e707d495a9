"""The configuration of train.py: `configs.schema` with the loader of `celo2.training.configuration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from celo2.training import configuration
from celo2.training.configuration import ConfigError, to_yaml
from configs.schema import OPTIMIZERS, Config

__all__ = ["ConfigError", "build", "load_config", "options", "to_yaml"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """As `configuration.load`."""
    return with_known_optimizer(configuration.load(Config, path, overrides))


def build(tree: Mapping[str, Any]) -> Config:
    """As `configuration.build`."""
    return with_known_optimizer(configuration.build(Config, tree))


def with_known_optimizer(config: Config) -> Config:
    """The configuration, if its optimizer is one of the schema's; a dotted path is judged where it is imported."""
    if "." not in config.optimizer.name:
        configuration.checked(Literal[OPTIMIZERS], config.optimizer.name, "optimizer.name")
    return config


def options() -> list[tuple[str, Any, str]]:
    """Every option as (dotted name, default, documentation)."""
    return configuration.options(Config)
