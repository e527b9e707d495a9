"""Loads the configuration of train.py: the loader of `celo2.training.configuration` with the schema of `configs.schema`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from celo2.training import configuration
from celo2.training.configuration import ConfigError, Written, to_yaml
from configs.average import average_of
from configs.evaluation import with_checked_evaluation
from configs.length import with_steps
from configs.mixture import with_checked_mix
from configs.schema import OPTIMIZERS, Config

__all__ = ["ConfigError", "build", "load_config", "load_written", "options", "to_yaml"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a YAML file and apply `overrides`, as `configuration.load` does."""
    return load_written(path, overrides)[0]


def load_written(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Written]:
    """Load a YAML file and apply `overrides`; also return which options were written, as `configuration.load_written` does."""
    config, written = configuration.load_written(Config, path, overrides)
    return checked(config, written), written


def build(tree: Mapping[str, Any]) -> Config:
    """Build a configuration from a mapping, as `configuration.build` does."""
    return checked(configuration.build(Config, tree), Written(set(), set()))


def checked(config: Config, written: Written) -> Config:
    """Check what the types of the options do not express, and compute `train.steps`. Returns the configuration."""
    average_of(config)
    return with_steps(with_checked_evaluation(with_checked_mix(with_known_optimizer(config), written)), written)


def with_known_optimizer(config: Config) -> Config:
    """Check that the optimizer's name is one of the schema's. A dotted path is checked later, when it is imported."""
    if "." not in config.optimizer.name:
        configuration.checked(Literal[OPTIMIZERS], config.optimizer.name, "optimizer.name")
    return config


def options() -> list[tuple[str, Any, str]]:
    """Return every option as (dotted name, default, documentation)."""
    return configuration.options(Config)
