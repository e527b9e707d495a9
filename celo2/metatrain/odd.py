"""Odd rules: -g and -W give -u. Every optimizer set by hand is odd; a learned rule that is not pushes every matrix in some fixed
direction, which Newton–Schulz makes as large as any other. A space of half the dimensions is also easier to search.

Hidden units go in pairs: one does for the signs turned round what its partner does for the signs as they are.
"""

from __future__ import annotations

import functools

import numpy as np

from celo2.metatrain.unroll import RULE_SHAPES, THETA_SIZE
from celo2.rule import CHANNEL_GROUPS, FIRST_LAYER

ODD = {FIRST_LAYER[group.name] for group in CHANNEL_GROUPS if group.odd} | {"w2", "b2"}  # weights whose sign turns


@functools.cache
def mirror() -> tuple[np.ndarray, np.ndarray]:
    """(place, sign), both (347,): sign · θ[place] is the rule u'(g, W) = -u(-g, -W) of θ's u."""
    places = np.split(np.arange(THETA_SIZE), np.cumsum([int(np.prod(shape)) for shape in RULE_SHAPES.values()])[:-1])
    partner = np.arange(8) ^ 1  # of each hidden unit
    place, sign = [], []
    for (name, shape), here in zip(RULE_SHAPES.items(), places, strict=True):
        here = here.reshape(shape)
        if name != "b2":  # the axis of what a weight comes from, where that is a hidden unit
            here = here[:, partner] if name in FIRST_LAYER.values() else here[partner]
        if name == "w1":  # the axis of what it leads to
            here = here[:, partner]
        place.append(here.ravel())
        sign.append(np.full(here.size, -1.0 if name in ODD else 1.0))
    return np.concatenate(place), np.concatenate(sign)


def odd_part(theta: np.ndarray) -> np.ndarray:
    """The nearest weights (..., 347) of an odd rule; half of the dimensions remain."""
    place, sign = mirror()
    return (theta + sign * theta[..., place]) / 2
