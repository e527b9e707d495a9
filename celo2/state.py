"""State of the optimizer, and checks of what a user or a saved state gives it: every error names the parameter group."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from celo2.distributed.shard import local_shard_of
from celo2.layout import as_layout, local, stacked_axes, stacked_shape
from celo2.rule import accumulator_shapes

if TYPE_CHECKING:
    from celo2.optimizer import Celo2

UPDATES = ("celo2", "adamw")
GROUP_KEYS = ("params", "param_names", "lr", "weight_decay", "betas", "eps", "update", "orthogonalize", "matrices")
SCHEDULER_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")  # torch's schedulers write them


def new_state(p: Tensor, group: dict[str, Any], by_rule: bool, state_dtype: torch.dtype) -> dict[str, Tensor]:
    """Accumulators of `p`, all zero: the rule's (`celo2.rule.accumulator_shapes`) over what is here of it, or AdamW's."""
    shard, here = local_shard_of(p), local(p)
    size = tuple(here.shape) if shard.whole else (here.numel(),)
    dtypes = {"step": torch.float32, "count": torch.int32}
    if by_rule:
        shape = stacked_shape(shard.shape, group["matrices"])
        axes = stacked_axes(shape, group["matrices"])
        shapes = accumulator_shapes(shape, axes)
        for name in shapes.keys() - {"row", "col"}:
            shapes[name] = (*shapes[name][: len(shapes[name]) - len(shape)], *(size or (1,)))  # a scalar is a vector
        if axes is not None and state_dtype is torch.bfloat16:
            shapes["count"] = ()
            dtypes |= {"momentum": torch.bfloat16, "second_moment": torch.bfloat16}
    else:
        shapes = {"step": (), "exp_avg": size, "exp_avg_sq": size}
        dtypes |= dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.promote_types(p.dtype, torch.float32))
    return {name: torch.zeros(s, dtype=dtypes.get(name, torch.float32), device=here.device) for name, s in shapes.items()}


def check_keys(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for a group key that means nothing here."""
    for key in group:
        if key not in GROUP_KEYS + SCHEDULER_KEYS:
            near = difflib.get_close_matches(key, GROUP_KEYS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys are {', '.join(GROUP_KEYS)}"
            raise ValueError(f"{where}: unknown key '{key}'{hint}")


def check_options(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for an option of a group that is out of range; layouts become tuples."""
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


def check_parameter(p: Tensor, group: dict[str, Any], where: str) -> None:
    """Raise for a parameter that neither update can take, or that the group's layout does not fit."""
    if not p.is_floating_point():
        raise TypeError(f"{where}: a parameter of shape {tuple(p.shape)} is {p.dtype}; only real float parameters can be updated")
    layout = group["matrices"]
    if layout is not None and torch.Size(layout[0]).numel() != torch.Size(local_shard_of(p).shape).numel():
        raise ValueError(f"{where}: matrices {layout} do not fit a parameter of shape {tuple(p.shape)}")


def check_saved_group(group: dict[str, Any], saved: dict[str, Any], where: str) -> None:
    """Raise ValueError if a saved group has other keys, options out of range, or parameters that do not fit `group`."""
    check_keys(saved, where)
    missing = [key for key in GROUP_KEYS if key in group and key not in saved and key != "param_names"]
    if missing:
        raise ValueError(f"{where}: the saved group lacks {', '.join(missing)}")
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(f"{where}: {len(saved['params'])} parameters were saved, expected {len(group['params'])}")
    checked = dict(saved)
    check_options(checked, where)
    for p in group["params"]:
        check_parameter(p, checked, where)


def check_saved_state(optimizer: Celo2, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if the saved groups and state do not fit; torch itself checks the number and size of groups."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
    if len(optimizer.param_groups) != len(state_dict["param_groups"]):
        counts = f"{len(state_dict['param_groups'])} parameter groups, expected {len(optimizer.param_groups)}"
        raise ValueError(f"the saved state has {counts}")
    for index, (group, saved_group) in enumerate(groups):
        where = f"parameter group {index}"
        check_saved_group(group, saved_group, where)
        for p, key in zip(group["params"], saved_group["params"], strict=False):
            own, saved = optimizer.state.get(p, {}), state_dict["state"].get(key, {})
            where = f"parameter group {index}, a parameter of shape {tuple(p.shape)}"
            if (own.keys() ^ saved.keys()) - {"count"}:  # only bfloat16 accumulators have it
                raise ValueError(f"{where}: saved state holds {sorted(saved)}, expected {sorted(own)}")
            for name, value in own.items():
                if name in saved and value.shape != torch.as_tensor(saved[name]).shape:
                    shapes = f"{tuple(torch.as_tensor(saved[name]).shape)}, expected {tuple(value.shape)}"
                    raise ValueError(f"{where}: saved {name} has shape {shapes}")


@contextmanager
def keeping_dtypes(optimizer: Celo2) -> Iterator[None]:
    """While it lasts, torch's `load_state_dict` checks what is saved and fills the optimizer's own state, in its own dtypes."""
    saved: dict[int, dict[str, Any]] = {}
    own = optimizer.state
    ordered = [p for group in optimizer.param_groups for p in group["params"]]

    def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        check_saved_state(optimizer, state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved.update((j, state_dict["state"].get(i, {})) for j, i in enumerate(ids))
        return {**state_dict, "state": {}}

    def restore(_: torch.optim.Optimizer) -> None:
        optimizer.state = own
        for group in optimizer.param_groups:
            if group["matrices"] is not None:
                group["matrices"] = as_layout(group["matrices"])
            group["betas"] = tuple(group["betas"])
        for p, values in zip(ordered, saved.values(), strict=True):
            for name, value in own.get(p, {}).items():
                if name in values:
                    value.copy_(values[name])
                else:
                    value.zero_()

    hooks = [  # `check` after the user's pre-hooks, which may adapt what is saved; `restore` before the user's post-hooks
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
