"""θ: the weights of a rule as one vector (347,), the space in which meta-training searches.

Odd rules: -g and -W give -u. Every optimizer set by hand is odd. A learned rule that is not odd pushes every matrix in some fixed
direction, which Newton–Schulz makes as large as any other. A space of half the dimensions is also easier to search.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from celo2.metatrain.config import HIDDEN, Config, ConfigError
from celo2.metatrain.problems import START, random
from celo2.rule import CHANNEL_GROUPS, FIRST_LAYER, Rule, weight_shapes
from celo2.rule_files import load_rule

SHAPES = weight_shapes(HIDDEN)
STARTS, SIZE = {}, 0  # where each weight begins in θ
for _name, _shape in SHAPES.items():
    STARTS[_name] = SIZE
    SIZE += math.prod(_shape)
CHANNELS = sum(group.count for group in CHANNEL_GROUPS)
ODD = {FIRST_LAYER[group.name] for group in CHANNEL_GROUPS if group.odd} | {"w2", "b2"}  # weights whose sign turns


def parts(theta: np.ndarray) -> dict[str, np.ndarray]:
    """Views of θ (..., 347) as the rule's weights (..., *shape), by name."""
    found = {}
    for name, shape in SHAPES.items():
        found[name] = theta[..., STARTS[name] : STARTS[name] + math.prod(shape)].reshape(*theta.shape[:-1], *shape)
    return found


def theta_of(rule: Rule) -> np.ndarray:
    """The weights of a rule as θ, float32."""
    return np.concatenate([rule.weights[name].numpy().ravel() for name in SHAPES])


def rule_of(theta: np.ndarray, config: Config, description: str) -> Rule:
    """The rule with the weights θ, as the configuration uses it."""
    weights = {name: torch.from_numpy(part.copy()) for name, part in parts(theta.astype(np.float32)).items()}
    options = config.rule
    return Rule(weights, options.variant, normalize_gradient=options.normalize_gradient, description=description)


def first_theta(config: Config) -> np.ndarray:
    """θ before the first iteration. `random`: normal weights with deviation 1 / sqrt(inputs), biases zero."""
    rng, init = random(config.run.seed, START), config.rule.init
    if init == "random":
        theta = rng.standard_normal(SIZE)
        for name, part in parts(theta).items():
            part *= 0.0 if name[0] == "b" else 1 / math.sqrt(CHANNELS if name in FIRST_LAYER.values() else HIDDEN)
    else:
        theta = theta_of(load_rule(init)).astype(np.float64)
        if theta.shape != (SIZE,):
            raise ConfigError(f"rule.init is '{init}', a rule of {theta.size} weights, expected {SIZE}")
    theta = theta + config.rule.init_noise * free(config) * rng.standard_normal(SIZE)
    return (odd_part(theta) if config.rule.odd else theta).astype(np.float32)


def free(config: Config) -> np.ndarray:
    """(347,): 1 for the weights that are trained, 0 for the frozen ones."""
    mask = np.ones(SIZE)
    for name in config.rule.frozen:
        parts(mask)[FIRST_LAYER.get(name, name)][...] = 0
    return mask


@functools.cache
def mirror() -> tuple[np.ndarray, np.ndarray]:
    """(place, sign), both (347,): sign · θ[place] is the rule u'(g, W) = -u(-g, -W) of θ's u.

    Hidden units go in pairs: one does for the signs turned round what its partner does for the signs as they are.
    """
    partner = np.arange(HIDDEN) ^ 1  # of each hidden unit
    place, sign = [], []
    for name, here in parts(np.arange(SIZE)).items():
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
