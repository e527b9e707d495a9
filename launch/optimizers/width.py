"""The rule that converts learning rates and weight decays found at one width to a model of another width.

An orthogonalized update of RMS 1 has the spectral norm √max(R, C). Its learning rate therefore falls with the square root of the
width, and its weight decay with the width. For an update like Adam's, the learning rate falls with the width (arXiv 2203.03466)
and the weight decay stays the same. The learning rate of embeddings, output layer and vectors stays the same.

Measured on small transformers (docs/log.md, "Rates and widths"): the exponent of lr between widths 32 and 128 is −0.52
(standard error 0.05) for celo2-lm, −0.52 (0.02) for celo2 and −0.63 (0.08) for Muon, and an adamw_lr of 0.04 to 0.08 is
good at all of them. Measurements of AdamW at three widths agree with an lr that falls with the width. The exponents of the decay,
and those of other optimizers, are assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from configs.load import ConfigError
from configs.schema import Optimizer
from launch.optimizers.table import entry_of, uses_adamw_lr


@dataclass(frozen=True)
class WidthExponents:
    """Exponents by key: a value at width D is its value at width D0 times (D / D0)^exponent. Keys without one stay the same."""

    lr: float
    weight_decay: float
    adamw_lr: float = 0.0


ORTHOGONALIZED = WidthExponents(lr=-0.5, weight_decay=-1.0)
ADAM = WidthExponents(lr=-1.0, weight_decay=0.0)
EXPONENTS = {"orthogonalized": ORTHOGONALIZED, "adam": ADAM, "none": WidthExponents(lr=0.0, weight_decay=0.0)}


def at_width(values: Mapping[str, float], found_at: int, width: int, optimizer: Optimizer) -> dict[str, float]:
    """Convert `values`, found for `optimizer` at the width `found_at`, to those of a model of width `width`, by key."""
    exponents = EXPONENTS[entry_of(optimizer).width_rule]
    return {key: value * (width / found_at) ** getattr(exponents, key, 0.0) for key, value in values.items()}


def at_width_of(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """The section `optimizer` with its rates converted from `base_width`, the width they were found at, to the width of `model`.

    Raises:
        ConfigError: the configuration of the model has no width.
    """
    if optimizer.base_width is None:
        return optimizer
    width = getattr(model.config, "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError("optimizer.base_width: the model's configuration has no hidden_size; leave it out and set the rates")
    found = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if uses_adamw_lr(optimizer):
        found["adamw_lr"] = optimizer.lr if optimizer.adamw_lr is None else optimizer.adamw_lr
    followed: dict[str, Any] = {**at_width(found, optimizer.base_width, width, optimizer)}
    return replace(optimizer, base_width=None, **followed)


def width_note(asked: Optimizer, taken: Optimizer) -> list[str]:
    """A note for the user if the rates in use (`taken`) differ from those of the configuration (`asked`)."""
    if (asked.lr, asked.weight_decay) == (taken.lr, taken.weight_decay):
        return []
    pairs = [(name, getattr(asked, name), getattr(taken, name)) for name in ("lr", "weight_decay")]
    changed = ", ".join(f"{name} {before:g} becomes {now:.3g}" for name, before, now in pairs if before != now)
    return [f"optimizer.base_width={asked.base_width}: at the width of this model {changed}"]


def stated(found_at: str) -> str:
    """The rule as a sentence of the report."""

    def power(value: float) -> str:
        return f"width^{value:g}".replace("-", "−") if value else "unchanged"

    kinds = (("orthogonalized updates", ORTHOGONALIZED), ("scion", EXPONENTS["none"]), ("all others", ADAM))
    said = "; ".join(
        f"{name}: lr {power(e.lr)}, weight decay {power(e.weight_decay)}, adamw_lr {power(e.adamw_lr)}" for name, e in kinds
    )
    return f"The settings found at {found_at} follow to other widths by a rule, without a search ({said}); all else is the same."
