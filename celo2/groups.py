"""What a user may put into a parameter group of `Celo2`. Every error names the group."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from celo2.distributed.shard import local_shard_of
from celo2.layout import as_layout

UPDATES = ("celo2", "adamw")
GROUP_KEYS = ("params", "param_names", "lr", "weight_decay", "betas", "eps", "update", "orthogonalize", "matrices")
NOTE_KEYS = ("notes",)  # what `celo2.routing_table` says of single parameters
SCHEDULER_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")  # torch's schedulers write them


def add_checked(groups: list[dict[str, Any]], new: dict[str, Any], add: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """`new` as a group with all its options, added to `groups` by `add`, which is torch's own; after an error it is not there."""
    count = len(groups)
    where = f"parameter group {count}"
    if isinstance(new, dict):
        check_keys(new, where)
    try:
        add(new)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None
    group = groups[-1]
    group.pop("differentiable", None)  # a default that torch adds when an optimizer is copied or loaded
    try:
        check_group(group, where)
    except (ValueError, TypeError):
        del groups[count:]
        raise
    return group


def check_keys(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for a group key that means nothing here."""
    for key in group:
        if key not in GROUP_KEYS + NOTE_KEYS + SCHEDULER_KEYS:
            near = difflib.get_close_matches(key, GROUP_KEYS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys are {', '.join(GROUP_KEYS)}"
            raise ValueError(f"{where}: unknown key '{key}'{hint}")


def check_group(group: dict[str, Any], where: str) -> None:
    """Raise ValueError or TypeError for an option out of range, or a parameter that cannot be updated; layouts become tuples."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{where}: lr as a tensor must have one element, not {lr.numel()}")
    for name in ("lr", "weight_decay", "eps"):
        if not isinstance(group[name], (Real, Tensor)) or not float(group[name]) >= 0:
            raise ValueError(f"{where}: {name} must be a number of at least 0, not {group[name]!r}")
    if not isinstance(group["orthogonalize"], bool):
        raise ValueError(f"{where}: orthogonalize must be True or False, not {group['orthogonalize']!r}")
    betas = group["betas"] if isinstance(group["betas"], (tuple, list)) else ()
    if len(betas) != 2 or not all(isinstance(beta, (Real, Tensor)) and 0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"{where}: betas must be two numbers in [0, 1), not {group['betas']}")
    if group["update"] not in (None, *UPDATES):
        raise ValueError(f"{where}: unknown update '{group['update']}', expected one of {', '.join(UPDATES)}")
    if group["matrices"] is not None:
        try:
            group["matrices"] = as_layout(group["matrices"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    layout = group["matrices"]
    for p in group["params"]:
        shape = tuple(p.shape)
        if not p.is_floating_point():
            raise TypeError(f"{where}: a parameter of shape {shape} is {p.dtype}; only real float parameters can be updated")
        if layout is not None and math.prod(layout[0]) != math.prod(local_shard_of(p).shape):
            raise ValueError(f"{where}: matrices {layout} do not fit a parameter of shape {shape}")
