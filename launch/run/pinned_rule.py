"""Where a run reads a rule of the Hugging Face Hub: from one commit, and from the copy in its own folder once it has begun."""

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
    """`config` whose rule of the Hub is pinned: it names one commit, or the copy in the run's folder.

    A run that has begun with this name goes on with the copy in its folder, whatever the Hub has now and without a network.
    Otherwise the name stands for the commit that it has now.

    Raises:
        RuleError: as `load_rule`.
    """
    name = config.optimizer.rule or ""
    if not name.startswith(HUB):
        return config
    rule = str(copy_of_run(config) or load_rule(name, config.optimizer.name).source)
    return replace(config, optimizer=replace(config.optimizer, rule=rule))


def copy_of_run(config: Config) -> Path | None:
    """The copy of the rule that `config` names in the folder of the run that goes on, if that has begun with this name."""
    start = begun(config, run_folder(config))
    copy = start.run / RULE_FILE if start is not None and start.run is not None else None
    if start is None or copy is None or not copy.is_file():
        return None
    try:
        saved = read_state(start.path)["config"]["optimizer"]
    except CheckpointError:  # of a damaged checkpoint; resuming says it
        return None
    return copy if all(saved.get(key) == getattr(config.optimizer, key) for key in ("name", "rule")) else None
