"""θ: the weights of a rule, its step sizes and its whitening as one vector (352,), the space in which meta-training searches.

Odd rules: -g and -W give -u. Every hand-set optimizer is odd. A learned rule that is not odd pushes every matrix in some fixed
direction, which Newton–Schulz makes as large as any other. The space of odd rules also has half the dimensions, so that it is
easier to search.
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

# The numbers in θ besides the weights: the exponents of step sizes and the logarithm of their factor, and the logarithm of (rate
# of whitening / rate of the start rule).
STEP, WHITENING = "step", "whitening"
SHAPES = weight_shapes(HIDDEN) | {STEP: (STEP_NUMBERS,), WHITENING: (WHITENING_NUMBERS,)}
STARTS, SIZE = {}, 0  # where each weight begins in θ
for _name, _shape in SHAPES.items():
    STARTS[_name] = SIZE
    SIZE += math.prod(_shape)
SMALLEST_WHITENING = 1e-6
BESIDE = SIZE - STARTS[STEP]  # how many numbers of θ are not weights
CHANNELS = sum(group.count for group in CHANNEL_GROUPS)
ODD = {FIRST_LAYER[group.name] for group in CHANNEL_GROUPS if group.odd} | {"w2", "b2"}  # weights whose sign `mirror` flips


def parts(theta: np.ndarray) -> dict[str, np.ndarray]:
    """Views of θ (..., 352) as the rule's weights (..., *shape), its step sizes (..., 4) and its whitening (..., 1), by name."""
    found = {}
    for name, shape in SHAPES.items():
        found[name] = theta[..., STARTS[name] : STARTS[name] + math.prod(shape)].reshape(*theta.shape[:-1], *shape)
    return found


def theta_of(rule: Rule) -> np.ndarray:
    """θ (352,), float32, of a rule: its weights and step sizes; the number for whitening is 0, the rule's own rate."""
    weights = [rule.weights[name].numpy().ravel() for name in weight_shapes(HIDDEN)]
    return np.concatenate([*weights, step_of(rule), np.zeros(WHITENING_NUMBERS, np.float32)])


def step_of(rule: Rule) -> np.ndarray:
    """The numbers in θ for the step sizes of a rule: three exponents and the logarithm of the factor, float32."""
    return np.array([*rule.step_exponents, math.log(rule.step_factor)], np.float32)


def within_bounds(theta: np.ndarray, config: Config) -> np.ndarray:
    """θ (..., 352) with step sizes and whitening clamped to the bounds of a rule, so that a search cannot leave them.

    The lower bound of the whitening rate is SMALLEST_WHITENING: no training run is long enough for such a rate to matter.
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
    """The whitening rate (...) under θ (..., 352), at most what a rule file may hold; zeros without whitening."""
    return np.minimum(whitening(config) * np.exp(parts(theta)[WHITENING][..., 0].astype(np.float64)), LARGEST_WHITENING)


def rule_of(theta: np.ndarray, config: Config, description: str) -> Rule:
    """The rule with the weights, step sizes and whitening of θ, and the other settings from the configuration."""
    theta = within_bounds(theta.astype(np.float32), config)
    weights = {name: torch.from_numpy(part.copy()) for name, part in parts(theta).items()}
    step, start = weights.pop(STEP).numpy(), start_rule(config)
    weights.pop(WHITENING)
    settings = start.settings() | {"variant": config.rule.variant, "normalize_gradient": normalizes(config)}
    settings |= {"whitening": float(whitening_of(theta, config)), "step_bound": start.step_bound}
    if not np.array_equal(step, step_of(start)):  # otherwise keep the start's numbers, which are not rounded to float32
        factor = min(max(math.exp(step[3]), 1 / LARGEST_FACTOR), LARGEST_FACTOR)  # exp of a rounded bound may exceed the bound
        settings |= {"step_exponents": tuple(step[:3].tolist()), "step_factor": factor}
    return Rule(weights, **settings | {"description": description, "source": ""})


def first_theta(config: Config) -> np.ndarray:
    """θ (352,) before the first iteration. `random`: normal weights with standard deviation 1 / sqrt(inputs), biases zero.

    Raises:
        ConfigError: the start rule has another size, or it is not odd although `rule.odd` is set: the nearest odd rule would be
            a different rule.
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
            raise ConfigError(
                f"rule.init is '{init}', which is not odd: use rule.odd=false, or an odd start, such as hand-nesterov"
            )
    theta = theta + config.rule.init_noise * free(config) * rng.standard_normal(SIZE)
    return (odd_part(theta) if config.rule.odd else theta).astype(np.float32)


def expert_theta(config: Config) -> np.ndarray | None:
    """θ (352,) of the expert, or None.

    Raises:
        ConfigError: the expert has another size, or other decays of accumulators than the rule that is trained; or one of the
            two has whitening, whose whiteners follow the directions of a single rule.
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
    """A mask (352,): 1 for the numbers of θ that are trained, 0 for the others."""
    mask = np.ones(SIZE)
    parts(mask)[STEP][...] = config.rule.step_sizes
    parts(mask)[WHITENING][...] = config.rule.train_whitening
    for name in config.rule.frozen:
        parts(mask)[FIRST_LAYER.get(name, name)][...] = 0
    return mask


def useful(config: Config, theta: np.ndarray) -> np.ndarray:
    """A mask (352,) of the free numbers that can change an update of θ, or of a θ that differs from it in free numbers.

    Outputs 1 and 2 of the MLP have no effect on updates. Neither has a unit if all its incoming weights, or all its outgoing
    ones, are frozen at zero.
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
    """The directions (n, 352) of a search: orthogonal, with entries 0, 1 and -1. For odd rules weights change in pairs."""
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
    """(place, sign), both (352,): if θ is a rule u(g, W), then sign · θ[place] is the rule -u(-g, -W).

    Hidden units form pairs: for -g and -W, a unit does the same as its partner does for g and W.
    """
    partner = np.arange(HIDDEN) ^ 1  # of each hidden unit
    place, sign = [], []
    for name, here in parts(np.arange(SIZE)).items():
        if name not in ("b2", STEP, WHITENING):  # permute the axis of hidden units; of w1, that of its inputs
            here = here[:, partner] if name in FIRST_LAYER.values() else here[partner]
        if name == "w1":  # its outputs are hidden units too
            here = here[:, partner]
        place.append(here.ravel())
        sign.append(np.full(here.size, -1.0 if name in ODD else 1.0))
    return np.concatenate(place), np.concatenate(sign)


def odd_noise(noise: np.ndarray) -> np.ndarray:
    """Project standard normal noise (..., 352) onto odd rules, scaled so that free numbers have standard deviation 1 again."""
    place, _ = mirror()
    return np.where(place == np.arange(SIZE), 1.0, math.sqrt(2)) * odd_part(noise)


def odd_part(theta: np.ndarray) -> np.ndarray:
    """Project θ (..., 352) onto the nearest odd rule; half of the dimensions remain."""
    place, sign = mirror()
    return (theta + sign * theta[..., place]) / 2
