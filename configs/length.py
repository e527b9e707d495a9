"""The number of steps of a training run and of sequences in each step: `train.steps`, `train.tokens`, `train.ramp`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celo2.training.configuration import ConfigError, Written
from configs.schema import LARGEST_BATCH, Config
from data.batch_sizes import BatchSizes


def batch_sizes(train: Mapping[str, Any]) -> BatchSizes:
    """Return the batch sizes of all steps.

    `train` is the configuration's section `train` as a mapping. It may come from a state.json, where steps are texts.

    Raises:
        ConfigError: an invalid step or size in `train.ramp`.
    """
    ramp = {}
    for given, sequences in (train.get("ramp") or {}).items():
        step, size = whole(given), whole(sequences)
        if not is_step(step) or int(step) < 1:
            raise ConfigError(
                f"train.ramp has the key {step!r}, expected a step from which on a batch size holds, 1 or above; "
                "before the first one train.batch_size holds"
            )
        if type(size) is not int or size < 1:
            raise ConfigError(f"train.ramp.{step} is {size!r}, expected a number of sequences, 1 or above")
        if size > LARGEST_BATCH:
            raise ConfigError(f"train.ramp.{step} is {size}, expected at most {LARGEST_BATCH} sequences")
        if int(step) in ramp:
            raise ConfigError(f"train.ramp has the key {int(step)} twice")
        ramp[int(step)] = size
    return BatchSizes(train["batch_size"], ramp)


def is_step(value: Any) -> bool:
    """Return whether `value` is an integer, or a text of digits, as the keys of mappings are in JSON."""
    return type(value) is int or (isinstance(value, str) and value.isdecimal())


def whole(value: Any) -> Any:
    """Return `value`, as an int if it is a float without a fraction, such as 1e3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def with_steps(config: Config, written: Written) -> Config:
    """Check `train.ramp`, and compute `train.steps` from `train.tokens` if that is given. Returns `config`.

    The result is the smallest number of steps that takes `train.tokens`. An override on the command line has priority over the
    file. The config.yaml that a run writes has both options; there `train.tokens` decides.

    Raises:
        ConfigError: the command line gives both options and they differ; the context is not known; or the ramp is invalid.
    """
    train = config.train
    sizes = batch_sizes(vars(train))
    if train.ramp is not None:
        train.ramp = dict(sorted((int(step), int(size)) for step, size in train.ramp.items()))  # type: ignore[misc]
    if train.tokens is None:
        return config
    if "train.steps" in written.overrides and "train.tokens" not in written.overrides:
        train.tokens = None
        return config
    from models.sizes import SIZES  # here, because this imports transformers, which takes a second

    size = SIZES.get(str(config.model.size))
    context = config.model.context or (size.context if size else None)
    if context is None:
        raise ConfigError("train.tokens needs model.context: say how many tokens a training sequence has")
    steps = sizes.steps_for(-(-train.tokens // context))
    keys = {"train.steps", "train.tokens"}
    if keys <= written.overrides and steps != train.steps:
        raise ConfigError(f"train.steps is {train.steps}, but train.tokens={train.tokens} are {steps} steps: give one of them")
    train.steps = steps
    return config
