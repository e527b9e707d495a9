"""Checks the options of `eval` for further validation sets and for tasks."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from celo2.training.configuration import ConfigError, expanded
from configs.schema import Config

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
SET = "FOLDER or {dir: FOLDER, split: train}"


class ValidationSet(NamedTuple):
    """A further validation set: a split of a prepared folder."""

    name: str
    dir: str
    split: str


def with_checked_evaluation(config: Config) -> Config:
    """Check `eval.sets`, `eval.tasks` and `eval.tasks_every`, and expand a leading `~` in their paths. Returns `config`.

    Raises:
        ConfigError: an invalid name or entry, or tasks at steps without an evaluation.
    """
    section = config.eval
    if section.sets is not None:
        section.sets = {name: {"dir": folder, "split": split} for name, folder, split in sets_of(config)}
    if section.tasks is not None:
        section.tasks = {named("eval.tasks", key): path_of(f"eval.tasks.{key}", value) for key, value in section.tasks.items()}
    if section.tasks_every and not section.every:
        raise ConfigError(
            f"eval.tasks_every is {section.tasks_every}, but eval.every is 0: tasks are part of an evaluation, and the only "
            "one is at the end; set eval.every, or leave eval.tasks_every out"
        )
    if section.tasks_every and section.tasks_every % section.every:
        raise ConfigError(
            f"eval.tasks_every is {section.tasks_every}, expected a multiple of eval.every {section.every}: tasks are part of an "
            "evaluation"
        )
    return config


def sets_of(config: Config) -> list[ValidationSet]:
    """Return the validation sets of `eval.sets`. Raises ConfigError for an invalid entry."""
    found = []
    for key, value in (config.eval.sets or {}).items():
        option = f"eval.sets.{named('eval.sets', key)}"
        entry = value if isinstance(value, dict) else {"dir": value}
        if unknown := [name for name in entry if name not in ("dir", "split")]:
            raise ConfigError(f"{option} has the unknown key {unknown[0]!r}; a set is {SET}")
        folder, split = path_of(option, entry.get("dir")), entry.get("split", "val")
        if split not in ("train", "val"):
            raise ConfigError(f"{option}.split is {split!r}, expected train or val")
        found.append(ValidationSet(str(key), folder, split))
    return found


def named(option: str, key: Any) -> str:
    """Return the checked name of a set or a task. It becomes a part of keys in metrics.jsonl."""
    if isinstance(key, bool) or not isinstance(key, str | int) or not NAME.fullmatch(str(key)):
        raise ConfigError(f"{option} has the name {key!r}, expected letters, digits, _, . and -")
    return str(key)


def path_of(option: str, value: Any) -> str:
    """Return the path `value` of `option` with a leading `~` expanded."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{option} is {value!r}, expected a path")
    return str(expanded(value, option))
