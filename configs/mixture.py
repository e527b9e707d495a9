"""Checks `data.mix`, the sources of a mixture."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from celo2.training.configuration import ConfigError, Written, expanded
from configs.length import is_step, whole
from configs.schema import Config

EXAMPLE = "{dir: FOLDER, weight: 0.7}"


class Source(NamedTuple):
    """A prepared folder and its weights. A key of `weights` is the step from which the weight applies; the first key is 0."""

    dir: str
    weights: dict[int, float]


def with_checked_mix(config: Config, written: Written) -> Config:
    """Check `data.mix`, expand a leading `~` in its paths, and make integers of the steps of its weights. Returns `config`.

    Raises:
        ConfigError: an invalid source, or `data.dir` is given as well.
    """
    if config.data.mix is None:
        return config
    if config.data.dir is not None:
        only_dir = "data.dir" in written.overrides and "data.mix" not in written.overrides
        raise ConfigError(f"data.dir and data.mix are both given: leave one out ({'data.mix' if only_dir else 'data.dir'}=null)")
    config.data.mix = [
        {**item, "dir": source.dir, "weight": source.weights if isinstance(item["weight"], dict) else item["weight"]}
        for item, source in zip(config.data.mix, mix_sources(config), strict=True)
    ]
    return config


def mix_sources(config: Config) -> list[Source]:
    """Return the sources of `data.mix`, which must not be None. Raises ConfigError for an invalid source."""
    mix = config.data.mix or []
    if not mix:
        raise ConfigError(f"data.mix is empty: give it sources, [{EXAMPLE}, ...]")
    found = [_source(item, f"data.mix[{i}]") for i, item in enumerate(mix)]
    for step in sorted({step for source in found for step in source.weights}):
        if not any(source.weights[max(s for s in source.weights if s <= step)] for source in found):
            raise ConfigError(f"data.mix: from step {step} on no source has a weight above 0")
    return found


def _source(item: dict[str, Any], name: str) -> Source:
    if unknown := [key for key in item if key not in ("dir", "weight")]:
        raise ConfigError(f"{name} has the unknown key {unknown[0]!r}; a source is {EXAMPLE}")
    folder, weight = item.get("dir"), item.get("weight")
    if not isinstance(folder, str) or not folder.strip():
        raise ConfigError(f"{name}.dir is {folder!r}, expected the path of a prepared folder")
    if weight is None:
        raise ConfigError(f"{name}.weight is missing: a source is {EXAMPLE}")
    if not isinstance(weight, dict):
        weights = {0: _number(weight, f"{name}.weight")}
        if not weights[0]:
            raise ConfigError(
                f"{name}.weight is 0: leave the source out, or say from which step on it counts, {{0: 0, 9000: 0.3}}; "
                "in a run that resumes, a source ends at a step with {0: 0.3, 9000: 0}"
            )
    else:
        weights = {}
        for given, of_step in weight.items():
            step = whole(given)
            if not is_step(step) or int(step) < 0:
                raise ConfigError(f"{name}.weight has the key {step!r}, expected the step from which on a weight holds")
            if int(step) in weights:
                raise ConfigError(f"{name}.weight has the key {int(step)} twice")
            weights[int(step)] = _number(of_step, f"{name}.weight.{step}")
        weights = dict(sorted(weights.items()))
        if 0 not in weights:
            raise ConfigError(f"{name}.weight does not say what holds from step 0 on: {{0: 0, ...}} if the source comes later")
        if not any(weights.values()):
            raise ConfigError(f"{name}.weight is 0 at every step: leave the source out")
    return Source(expanded(folder, f"{name}.dir"), weights)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} is {value!r}, expected a number, 0 or above")
    return value
