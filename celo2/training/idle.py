"""Settings that do nothing are errors: a table says of each option what must be chosen for it to act.

The loader knows what was written (`configuration.load_written`), so that a default is not mistaken for a wish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from celo2.training.configuration import ConfigError, Written, declared


@dataclass(frozen=True)
class Idle:
    """An option that not every value of another option uses."""

    option: str  # section.key
    choice: str  # the option that decides
    acts: Callable[[Any], bool]  # of the whole configuration
    message: str  # {value} and {choice} stand for the two values
    detail: bool = False  # of the choice: if the command line chooses otherwise than the file, the file's detail is passed over
    wish: bool = False  # the default means something, too, and not "off"


def refuse_idle(config: Any, table: Iterable[Idle], written: Written | None = None) -> list[str]:
    """Refuse what was written and does nothing. Returns notes on the details that are passed over.

    A default in a file is not refused: the `config.yaml` of a training run holds them all. Nor, for that reason, is a detail in a
    section that the file gives whole. Without `written`, details are not looked at.

    Raises:
        ConfigError: an option without effect, naming it.
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
