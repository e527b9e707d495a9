"""State that an older version of this package wrote, as this one keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celo2.layout import from_stack


def upgraded(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` as this version writes it, for the parameters of `groups`; the old one stays as it is.

    The first versions stored momentum and second moment of a parameter with a layout in the shape of its stack. They cannot be
    told from today's where that is also the parameter's shape: experts stored transposed with equal sides.
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
    """What a pickled optimizer holds, as this version does; `rule` was once an attribute, and the plan had another form."""
    if "rule" not in state:
        return state
    kept = {key: value for key, value in state.items() if key not in ("rule", "_planned")}
    return kept | {"_rule": state["rule"], "_rule_on": {}, "_plan_key": [], "_entries": {}}
