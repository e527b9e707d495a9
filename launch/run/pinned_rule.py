"""Pins a rule of the Hugging Face Hub: to one commit, and to the copy in the run's folder once the run has begun."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from celo2 import load_rule
from celo2.rule_files import HUB
from configs.schema import Config
from launch.checkpoint.state import read_state
from launch.checkpoint.verify import CheckpointError
from launch.run.agreement import RULE_FILE
from launch.run.initialize import begun
from launch.run.setup import run_folder


def with_pinned_rule(config: Config) -> Config:
    """Return `config` with a rule of the Hub pinned to one commit or to the copy in the run's folder.

    A run that has begun with this name resumes with the copy in its folder. It needs no network and ignores changes on the Hub.
    Otherwise the name is pinned to its current commit.

    Raises:
        RuleError: as `load_rule`.
    """
    name = config.optimizer.rule or ""
    if not name.startswith(HUB):
        return config
    rule = str(copy_of_run(config) or load_rule(name, config.optimizer.name).source)
    return replace(config, optimizer=replace(config.optimizer, rule=rule))


def copy_of_run(config: Config) -> Path | None:
    """Return the run's copy of the rule, if the run has begun with the optimizer and rule names of `config`; else None."""
    start = begun(config, run_folder(config))
    copy = start.run / RULE_FILE if start is not None and start.run is not None else None
    if start is None or copy is None or not copy.is_file():
        return None
    try:
        saved = read_state(start.path)["config"]["optimizer"]
    except CheckpointError:  # damaged: resuming raises this error again
        return None
    return copy if all(saved.get(key) == getattr(config.optimizer, key) for key in ("name", "rule")) else None
