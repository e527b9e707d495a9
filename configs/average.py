"""Checks `train.average`, the option for an average of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

from celo2.training.configuration import ConfigError
from configs.schema import Config

DEFAULTS = {"ema": ("decay", 0.999), "tail": ("fraction", 0.2)}  # the key of each kind beside `kind`, and its default
EXAMPLES = "{kind: ema, decay: 0.999} or {kind: tail, fraction: 0.2}"


class AverageOptions(NamedTuple):
    """Which average of the weights a training run keeps."""

    kind: str  # "ema" or "tail"
    decay: float  # of the average in each step; 1 for a tail average, which weights all its steps equally
    start: int  # the average begins after this step


def average_of(config: Config) -> AverageOptions | None:
    """Return the checked options of `train.average`; None if it is not set.

    Raises:
        ConfigError: an unknown kind or key, or a number out of its range.
    """
    given: dict[str, Any] | None = config.train.average
    if given is None:
        return None
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ConfigError(f"train.average.kind is {kind!r}, expected one of {', '.join(DEFAULTS)}: {EXAMPLES}")
    key, default = DEFAULTS[kind]
    if unknown := [name for name in given if name not in ("kind", key)]:
        raise ConfigError(f"train.average has the key {unknown[0]!r}, which {kind} does not have: {EXAMPLES}")
    value = given.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= 1 or (kind == "ema" and value == 1):
        raise ConfigError(
            f"train.average.{key} is {value!r}, expected {'between 0 and 1' if kind == 'ema' else 'above 0, at most 1'}"
        )
    steps = config.train.steps
    return AverageOptions(kind, value, 0) if kind == "ema" else AverageOptions(kind, 1.0, steps - max(1, round(value * steps)))
