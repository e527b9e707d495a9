"""θ: the weights of a rule, its step sizes and its whitening as one vector (352,), the space in which meta-training searches.

Odd rules turn -g and -W into -u. Every optimizer set by hand is odd. A learned rule that is not odd pushes every matrix in some
fixed direction, which Newton–Schulz makes as large as any other. Odd rules also have half the dimensions, which eases the search.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from celo2.metatrain.config import (
    HIDDEN,
    STEP_NUMBERS,
    WHITENING_NUMBERS,
    Config,
    ConfigError,
    loaded,
    normalizes,
    start_rule,
    whitening,
)
from celo2.metatrain.problems import START, random
from celo2.rule import CHANNEL_GROUPS, FIRST_LAYER, Rule, weight_shapes
from celo2.rule_files import LARGEST_EXPONENT, LARGEST_FACTOR, LARGEST_WHITENING

# What θ holds beside the weights: the exponents of step sizes and the logarithm of their factor; and the logarithm of the ratio
# of the whitening rate to that of the start.
STEP, WHITENING = "step", "whitening"
SHAPES = weight_shapes(HIDDEN) | {STEP: (STEP_NUMBERS,), WHITENING: (WHITENING_NUMBERS,)}
STARTS, SIZE = {}, 0  # where each weight begins in θ
for _name, _shape in SHAPES.items():
    STARTS[_name] = SIZE
    SIZE += math.prod(_shape)
SMALLEST_WHITENING = 1e-6
BESIDE = SIZE - STARTS[STEP]  # numbers that are no weights
CHANNELS = sum(group.count for group in CHANNEL_GROUPS)
ODD = {FIRST_LAYER[group.name] for group in CHANNEL_GROUPS if group.odd} | {"w2", "b2"}  # weights with the sign -1 in `mirror`


def parts(theta: np.ndarray) -> dict[str, np.ndarray]:
    """Views of θ (..., 352) as the rule's weights (..., *shape), its step sizes (..., 4) and its whitening (..., 1), by name."""
    found = {}
    for name, shape in SHAPES.items():
        found[name] = theta[..., STARTS[name] : STARTS[name] + math.prod(shape)].reshape(*theta.shape[:-1], *shape)
    return found


def theta_of(rule: Rule) -> np.ndarray:
    """θ, float32, of a rule: its weights and the numbers of its step sizes, with the rule's own whitening."""
    weights = [rule.weights[name].numpy().ravel() for name in weight_shapes(HIDDEN)]
    return np.concatenate([*weights, step_of(rule), np.zeros(WHITENING_NUMBERS, np.float32)])


def step_of(rule: Rule) -> np.ndarray:
    """The numbers of step sizes in θ: three exponents and the logarithm of the factor, float32."""
    return np.array([*rule.step_exponents, math.log(rule.step_factor)], np.float32)


def within_bounds(theta: np.ndarray, config: Config) -> np.ndarray:
    """θ (..., 352) with the nearest step sizes and whitening that a rule may have: a search that leaves the bounds stops at them.

    A whitening rate below SMALLEST_WHITENING has no effect in any training run, and so is no better than none.
    """
    theta = theta.copy()
    step = parts(theta)[STEP]
    exponents, factor = step[..., :3], step[..., 3]
    np.clip(exponents, -LARGEST_EXPONENT, LARGEST_EXPONENT, out=exponents)
    np.clip(factor, -math.log(LARGEST_FACTOR), math.log(LARGEST_FACTOR), out=factor)
    if start := whitening(config):
        rate = parts(theta)[WHITENING]
        np.clip(rate, min(0, math.log(SMALLEST_WHITENING / start)), math.log(LARGEST_WHITENING / start), out=rate)
    return theta


def whitening_of(theta: np.ndarray, config: Config) -> np.ndarray:
    """How far whiteners move in a step under θ (..., 352): (...), at most what a rule file may say; zeros without whitening."""
    return np.minimum(whitening(config) * np.exp(parts(theta)[WHITENING][..., 0].astype(np.float64)), LARGEST_WHITENING)


def rule_of(theta: np.ndarray, config: Config, description: str) -> Rule:
    """The rule with the weights θ, as the configuration uses it."""
    theta = within_bounds(theta.astype(np.float32), config)
    weights = {name: torch.from_numpy(part.copy()) for name, part in parts(theta).items()}
    step, start = weights.pop(STEP).numpy(), start_rule(config)
    weights.pop(WHITENING)
    settings = start.settings() | {"variant": config.rule.variant, "normalize_gradient": normalizes(config)}
    settings |= {"whitening": float(whitening_of(theta, config)), "step_bound": start.step_bound}
    if not np.array_equal(step, step_of(start)):  # else they stay as they are, not rounded to float32
        factor = min(max(math.exp(step[3]), 1 / LARGEST_FACTOR), LARGEST_FACTOR)  # exp of a rounded bound may lie beyond it
        settings |= {"step_exponents": tuple(step[:3].tolist()), "step_factor": factor}
    return Rule(weights, **settings | {"description": description, "source": ""})


def first_theta(config: Config) -> np.ndarray:
    """θ before the first iteration. `random`: normal weights with deviation 1 / sqrt(inputs), biases zero.

    Raises:
        ConfigError: the start has another size; or it is not odd although rule.odd is true, and the nearest odd rule differs.
    """
    rng, init = random(config.run.seed, START), config.rule.init
    if init == "random":
        theta = np.concatenate([rng.standard_normal(STARTS[STEP]), np.zeros(SIZE - STARTS[STEP])])
        for name, part in parts(theta).items():
            part *= 0.0 if name[0] == "b" else 1 / math.sqrt(CHANNELS if name in FIRST_LAYER.values() else HIDDEN)
    else:
        theta = theta_of(start_rule(config)).astype(np.float64)
        if theta.shape != (SIZE,):
            raise ConfigError(f"rule.init is '{init}', a rule of {theta.size - BESIDE} weights, expected {STARTS[STEP]}")
        if config.rule.odd and not np.allclose(odd_part(theta), theta, rtol=0, atol=1e-6 * np.abs(theta).max()):
            raise ConfigError(f"rule.init is '{init}', which is not odd: take rule.odd=false, or an odd start, as hand-nesterov")
    theta = theta + config.rule.init_noise * free(config) * rng.standard_normal(SIZE)
    return (odd_part(theta) if config.rule.odd else theta).astype(np.float32)


def expert_theta(config: Config) -> np.ndarray | None:
    """θ (352,) of the expert, or None.

    Raises:
        ConfigError: the expert has another size or other accumulators than the rule that it helps; or one of the two has
            whitening: whiteners follow the directions of one rule.
    """
    if config.expert.rule is None:
        return None
    expert, own = loaded(config.expert.rule), start_rule(config)
    theta = theta_of(expert)
    if theta.shape != (SIZE,):
        raise ConfigError(
            f"expert.rule is '{config.expert.rule}', a rule of {theta.size - BESIDE} weights, expected {STARTS[STEP]}"
        )
    for name in ("momentum_decays", "second_moment_decay", "factored_decays"):
        if getattr(expert, name) != getattr(own, name):
            raise ConfigError(
                f"expert.rule has {name} {getattr(expert, name)}, expected {getattr(own, name)}, as the rule that is trained"
            )
    whose = "rule.init has whitening" if config.rule.whitening is None else "rule.whitening is"
    for what, rule in (("expert.rule has whitening", expert), (whose, own)):
        if rule.whitening:
            raise ConfigError(f"{what} {rule.whitening}, expected 0 where an expert helps")
    return theta


def free(config: Config) -> np.ndarray:
    """(352,): 1 for the numbers that are trained, 0 for the others."""
    mask = np.ones(SIZE)
    parts(mask)[STEP][...] = config.rule.step_sizes
    parts(mask)[WHITENING][...] = config.rule.train_whitening
    for name in config.rule.frozen:
        parts(mask)[FIRST_LAYER.get(name, name)][...] = 0
    return mask


def useful(config: Config, theta: np.ndarray) -> np.ndarray:
    """(352,): 1 for the free numbers that can change an update of the rule θ, or of a rule that differs from it in free numbers.

    Outputs 1 and 2 never can; nor can a unit whose weights to the next layer, or from the one before, are frozen zeros.
    """
    trained = parts(free(config))
    on = {name: (part != 0) | (trained[name] != 0) for name, part in parts(theta).items()}
    fed_1 = on["b0"] | np.concatenate([on[name] for name in FIRST_LAYER.values()]).any(0)
    fed_2 = on["b1"] | (on["w1"] & fed_1[:, None]).any(0)
    heard_2 = on["w2"][:, 0]
    heard_1 = (on["w1"] & heard_2).any(1)
    mask = np.zeros(SIZE)
    at = parts(mask)
    for name in (*FIRST_LAYER.values(), "b0"):
        at[name][...] = heard_1
    at["w1"][...] = fed_1[:, None] & heard_2
    at["b1"][...], at["w2"][:, 0], at["b2"][0], at[STEP][...], at[WHITENING][...] = heard_2, fed_2, 1, 1, 1
    return mask * free(config)


def directions_of(config: Config, theta: np.ndarray) -> np.ndarray:
    """The directions (n, 352) of a search: orthogonal, with entries 0, 1 and -1. An odd rule changes weights in pairs."""
    unit, found = np.eye(SIZE), []
    place, sign = mirror()
    for i in np.flatnonzero(useful(config, theta)):
        if not config.rule.odd:
            found.append(unit[i])
        elif i < place[i] or (i == place[i] and sign[i] > 0):
            found.append(unit[i] if i == place[i] else unit[i] + sign[i] * unit[place[i]])
    if not found:
        raise ConfigError("rule.frozen leaves nothing to search for")
    return np.array(found)


@functools.cache
def mirror() -> tuple[np.ndarray, np.ndarray]:
    """(place, sign), both (352,): sign · θ[place] is the rule u'(g, W) = -u(-g, -W) of θ's u.

    Hidden units form pairs: one does for the opposite signs what its partner does for the signs as they are.
    """
    partner = np.arange(HIDDEN) ^ 1  # of each hidden unit
    place, sign = [], []
    for name, here in parts(np.arange(SIZE)).items():
        if name not in ("b2", STEP, WHITENING):  # the axis of the unit that a weight leads from, if that is a hidden unit
            here = here[:, partner] if name in FIRST_LAYER.values() else here[partner]
        if name == "w1":  # the axis of the unit that it leads to
            here = here[:, partner]
        place.append(here.ravel())
        sign.append(np.full(here.size, -1.0 if name in ODD else 1.0))
    return np.concatenate(place), np.concatenate(sign)


def odd_noise(noise: np.ndarray) -> np.ndarray:
    """Normal noise (..., 352) of deviation 1, made odd and scaled so that its free numbers have deviation 1 again."""
    place, _ = mirror()
    return np.where(place == np.arange(SIZE), 1.0, math.sqrt(2)) * odd_part(noise)


def odd_part(theta: np.ndarray) -> np.ndarray:
    """The nearest θ (..., 352) of an odd rule; half of the dimensions remain."""
    place, sign = mirror()
    return (theta + sign * theta[..., place]) / 2
