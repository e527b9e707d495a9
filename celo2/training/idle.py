"""Refuse settings without effect: for some options a table says which value of another option they need to have an effect.

The loader reports which options were written (`configuration.load_written`), so that a default does not count as a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from celo2.training.configuration import ConfigError, Written, declared


@dataclass(frozen=True)
class Idle:
    """An option that has an effect only with some values of another option, `choice`."""

    option: str  # section.key
    choice: str  # the option that decides
    acts: Callable[[Any], bool]  # takes the whole configuration; whether the option has an effect
    message: str  # {value} and {choice} are replaced by the values of the two options
    detail: bool = False  # the option refines `choice`: if the command line sets another choice, the file's value is ignored
    wish: bool = False  # the default does not mean "off": writing it on the command line is a request, too


def refuse_idle(config: Any, table: Iterable[Idle], written: Written | None = None) -> list[str]:
    """Raise an error for options that were set but have no effect. Returns notes on details that are ignored instead.

    A default value in a file is accepted, because the `config.yaml` of a training run holds all options. For the same reason a
    detail is accepted if the file gives all options of its section. Without `written`, details are not checked.

    Raises:
        ConfigError: an option without effect; the message names it.
    """
    notes, defaults = [], type(config)()
    for row in table:
        section, _, key = row.option.partition(".")
        siblings = {name for name, part, _ in declared(type(config)) if part == section}
        value, default = (getattr(getattr(whole, section), key) for whole in (config, defaults))
        wanted = row.wish and written is not None and row.option in written.overrides - written.file
        if (value == default and not wanted) or row.acts(config) or (row.detail and written is None):
            continue
        choice_section, _, choice_key = row.choice.partition(".")
        choice = getattr(getattr(config, choice_section), choice_key)
        message = f"{row.option} {row.message.format(value=value, choice=choice)}"
        passed_over = written is not None and (row.choice in written.overrides or siblings <= written.file)
        if not (row.detail and passed_over) or (written is not None and row.option in written.overrides):
            raise ConfigError(f"{message}: leave it out")
        notes.append(f"{message}: not used")
    return notes
