"""Rules with hand-set weights, the baselines for learned rules. They run through the same code as every rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from celo2.rule import FIRST_LAYER, Rule, weight_shapes


def hand_set(channels: Mapping[str, tuple[float, ...]], description: str, variant: str = "celo2") -> Rule:
    """A rule whose direction u is a weighted sum of RMS-normalized channels, which the ReLU MLP passes through exactly.

    Two hidden units per layer carry the positive and the negative part of the sum; all other weights are zero.

    Args:
        channels: factors of the channels, by the name of their group in `celo2.rule.CHANNEL_GROUPS`; missing ones are zero.
    """
    weights = {name: torch.zeros(shape, dtype=torch.float32, device="cpu") for name, shape in weight_shapes(hidden=8).items()}
    for unit, sign in enumerate((1.0, -1.0)):
        for group, factors in channels.items():
            weights[FIRST_LAYER[group]][: len(factors), unit] = sign * torch.tensor(factors, dtype=torch.float32, device="cpu")
        weights["w1"][unit, unit] = 1.0
        weights["w2"][unit, 0] = sign
    return Rule(weights, variant=variant, description=f"hand-set, not learned: {description}")


def hand_momentum(variant: str = "celo2") -> Rule:
    """The momentum of decay 0.9. Orthogonalized, it is Muon without Nesterov momentum, normalized to RMS 1."""
    return hand_set({"momentum": (1.0,)}, "passes the momentum of decay 0.9", variant)


def hand_nesterov() -> Rule:
    """The momentum of decay 0.9 plus 0.8 of the gradient, both over the root of Adafactor's second moment of decay 0.9.

    After 400 steps of a two-layer byte-level GPT none of 25 sums of channels was better. After 1,500 steps at width 32 a longer
    momentum gains 0.01 to 0.02, but not at width 64 (docs/log.md).
    """
    return hand_set(
        {"factored_momentum": (1.0,), "factored_gradient": (0.8,)},
        "Nesterov's momentum of decay 0.9, over Adafactor's second moment",
    )


def hand_agreement() -> Rule:
    """`hand_nesterov` with a decay of 0.95, twice the gradient, normalized gradients and step sizes.

    The step size of a matrix is RMS(momentum) / RMS(gradient), divided by the value that independent gradients would give. So
    steps become shorter where successive gradients oppose each other because the steps are too long (docs/log.md).
    """
    rule = hand_set(
        {"factored_momentum": (1.0,), "factored_gradient": (1.6,)},
        "Nesterov's momentum of decay 0.95, over Adafactor's second moment, gradients normalized, with step sizes",
    )
    decays = (0.95, 0.99, 0.999)
    return replace(rule, momentum_decays=decays, factored_decays=decays, normalize_gradient=True, step_exponents=(1.0, 0.0, 0.0))


def hand_whitened() -> Rule:
    """`hand_agreement` with directions that are whitened before Newton–Schulz (`celo2.whitening`, docs/whitening.md)."""
    return replace(hand_agreement(), whitening=0.1, description="hand-set, not learned: hand-agreement, whitened")


HAND_SET = {
    "hand-momentum": hand_momentum,
    "hand-nesterov": hand_nesterov,
    "hand-agreement": hand_agreement,
    "hand-whitened": hand_whitened,
}
