"""State of the optimizer: allocated as zeros, and loaded with the dtypes that it has. Every error names the parameter group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from celo2.distributed.plan import Entry
from celo2.groups import GROUP_KEYS, check_group, meant_by
from celo2.layout import stacked_axes, stacked_shape
from celo2.older_state import upgraded
from celo2.rule import accumulator_shapes
from celo2.stack import local

if TYPE_CHECKING:
    from celo2.optimizer import Celo2


# Every name of `new_state`; wrappers keep things of their own beside them.
STATE_KEYS = {"momentum", "second_moment", "row", "col", "diag", "count", "step", "exp_avg", "exp_avg_sq"}


def new_state(entry: Entry, state_dtype: torch.dtype) -> dict[str, Tensor]:
    """The accumulators of a parameter of shape P and stacked shape S = (..., R, C) (see `celo2.layout`), all zero.

    By the rule: `momentum` (3, *P), `second_moment` P, and `row` and `col`, means over the longer and the shorter axis of a
    matrix, or `diag` (3, *P) for a vector; with bfloat16 accumulators also `count`, int32 (), its steps so far. By AdamW: `step`,
    `exp_avg`, `exp_avg_sq`. For a sharded parameter P is its local shard, and `count` is the same on all ranks. `row` and `col`
    cover all its matrices: every rank updates them for a split matrix, and only the rank that holds it for a whole one.
    """
    shard, here = entry.local_shard, local(entry.p)
    size = tuple(here.shape) if shard.whole else (here.numel(),)
    dtypes = {"step": torch.float32, "count": torch.int32}
    if entry.by_rule:
        shape = stacked_shape(shard.shape, entry.layout)
        axes = stacked_axes(shape, entry.layout)
        shapes = accumulator_shapes(shape, axes)
        for name in shapes.keys() - {"row", "col"}:
            shapes[name] = (*shapes[name][: len(shapes[name]) - len(shape)], *(size or (1,)))  # a scalar is a vector
        if axes is not None and state_dtype is torch.bfloat16:
            shapes["count"] = ()
            dtypes |= {"momentum": torch.bfloat16, "second_moment": torch.bfloat16}
    else:
        shapes = {"step": (), "exp_avg": size, "exp_avg_sq": size}
        dtypes |= dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.promote_types(here.dtype, torch.float32))
    return {name: torch.zeros(s, dtype=dtypes.get(name, torch.float32), device=here.device) for name, s in shapes.items()}


def checked(optimizer: Celo2, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What was saved, as this version writes it; ValueError or TypeError if groups and state do not fit the optimizer."""
    if absent := {"param_groups", "state"} - state_dict.keys():
        raise ValueError(f"no state of an optimizer: it lacks {' and '.join(sorted(absent))}")
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"the saved state has {len(saved_groups)} parameter groups, expected {len(groups)}")
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        where = f"parameter group {index}"
        missing = [key for key in GROUP_KEYS if key in group and key not in saved_group and key != "param_names"]
        if missing:
            near = [f"'{key}', which may mean {meant_by(key)}" for key in saved_group if meant_by(key) in missing]
            raise ValueError(f"{where}: the saved group lacks {', '.join(missing)}{''.join(f'; it has {n}' for n in near)}")
        if len(saved_group["params"]) != len(group["params"]):
            raise ValueError(f"{where}: {len(saved_group['params'])} parameters were saved, expected {len(group['params'])}")
        check_group({**saved_group, "params": group["params"]}, where)
    state_dict = upgraded(groups, state_dict)
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        for p, key in zip(group["params"], saved_group["params"], strict=True):
            own, saved = optimizer.state.get(p, {}), state_dict["state"].get(key, {})
            where = f"parameter group {index}, a parameter of shape {tuple(p.shape)}"
            if (own.keys() ^ saved.keys()) & STATE_KEYS - {"count"}:  # only bfloat16 accumulators have it
                raise ValueError(f"{where}: saved state holds {sorted(saved)}, expected {sorted(own)}")
            for name in (name for name in own if name in saved and name in STATE_KEYS):
                shape, expected = torch.as_tensor(saved[name]).shape, own[name].shape
                if shape != expected:
                    raise ValueError(f"{where}: saved {name} has shape {tuple(shape)}, expected {tuple(expected)}")
    return state_dict


@contextmanager
def keeping_dtypes(optimizer: Celo2) -> Iterator[None]:
    """While it lasts, torch's `load_state_dict` checks what is saved and fills the optimizer's own state, in its own dtypes."""
    own, own_groups = optimizer.state, optimizer.param_groups
    saved: list[dict[str, Any]] = []  # by parameter, in the order of the groups

    def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = checked(optimizer, state_dict)
        saved.extend(state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"])
        return {**state_dict, "state": {}}

    def restore(_: torch.optim.Optimizer) -> None:
        optimizer.state = own
        for index, (group, own_group) in enumerate(zip(optimizer.param_groups, own_groups, strict=True)):
            group |= {key: value for key, value in own_group.items() if key not in group}  # keys of others
            check_group(group, f"parameter group {index}")  # makes tuples of lists
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, values in zip(params, saved, strict=True):
            own_state = own.get(p, {})
            for name, value in own_state.items():
                if name in values and name in STATE_KEYS:
                    value.copy_(values[name])
                elif name in STATE_KEYS:
                    value.zero_()
            if own_state:
                others = {name: value for name, value in values.items() if name not in STATE_KEYS}
                own_state |= {n: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for n, v in others.items()}

    hooks = [  # `check` after the user's pre-hooks, which may adapt what is saved; `restore` before the user's post-hooks
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
