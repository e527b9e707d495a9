"""Convert state that an older version of this package wrote to the current format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celo2.layout import from_stack


def upgraded(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of `state_dict` in the current format, for the parameters of `groups`.

    The first versions stored momentum and second moment of a parameter with a layout in the shape of its stack. Where the stack
    and the parameter have the same shape (transposed experts with equal sides), old state cannot be recognized and is kept.
    """
    state = dict(state_dict["state"])
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        layout = group["matrices"]
        for p, key in zip(group["params"], saved["params"], strict=True):
            shape, of_p = tuple(p.shape), state.get(key, {})
            if layout is not None and shape != layout[2] and getattr(of_p.get("second_moment"), "shape", None) == layout[2]:
                moved = {name: from_stack(of_p[name], shape, layout) for name in ("momentum", "second_moment")}
                state[key] = {**of_p, **moved}
    return {**state_dict, "state": state}


def upgraded_pickle(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a pickled optimizer in the current format; older ones had an attribute `rule` and another form of plan."""
    if "rule" not in state:
        return state
    kept = {key: value for key, value in state.items() if key not in ("rule", "_planned")}
    return kept | {"_rule": state["rule"], "_rule_on": {}, "_plan_key": [], "_entries": {}}
