"""Decoupled weight decay, W <- W - lr λ W, for optimizers of other libraries, some of which add λ W to the gradient (coupled).

An optimizer that divides the gradient by its size, as Adam does, cancels most of a coupled decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from launch.optimizers.third_party import DECAY_BESIDE, accepted, construct

SWITCHES = ("decoupled_weight_decay", "weight_decouple")  # constructor arguments that choose decoupled decay if true
LR, DECAY, STEPS = 1e-2, 0.1, 3  # of the trials in `couples`
SAME = 1e-2  # two trials are equal if they differ by less than this fraction of the change that the decay makes
Groups = list[dict[str, Any]]


def decoupled_arguments(cls: type) -> dict[str, Any]:
    """The arguments that make the constructor of `cls` decouple the decay; empty if it has no such switch."""
    return {key: True for key in SWITCHES if key in accepted(cls)}


def decoupled_groups(cls: type[torch.optim.Optimizer], groups: Groups, arguments: dict[str, Any]) -> Groups:
    """`groups`. If `cls` couples the decay and has no switch, the decay moves to `DECAY_BESIDE`, which `ThirdParty` applies."""
    if not any(group["weight_decay"] for group in groups) or decoupled_arguments(cls) or hasattr(cls, "eval"):
        return groups  # an optimizer with `eval` averages the weights itself, and decays what it averages
    if not couples(cls, arguments, groups[0]["params"][0].device):
        return groups
    return [{**group, "weight_decay": 0.0, DECAY_BESIDE: group["weight_decay"]} for group in groups]


def couples(cls: type[torch.optim.Optimizer], arguments: dict[str, Any], device: torch.device) -> bool:
    """Whether `cls` adds λ W to the gradient, and the result differs from decoupled decay (for SGD without momentum it does not).

    Compares trials on a small matrix. Returns False if the decay of `cls` is of another kind, or if a trial fails.
    """

    def trial(decay: float = 0.0, in_gradient: float = 0.0, beside: float = 0.0) -> Tensor:
        """Weights (8, 8) after some steps, with the optimizer's own decay, one in the gradient, or one beside the optimizer."""
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.linspace(0.5, 1.5, 64).view(8, 8).to(device))
        optimizer = construct(cls, [{"params": [p], "lr": LR, "weight_decay": decay}], arguments)
        torch.manual_seed(0)
        for _ in range(STEPS):
            with torch.no_grad():
                p.grad = torch.randn(8, 8, generator=generator).to(device) + in_gradient * p
                p.mul_(1 - LR * beside)
            optimizer.step()
        return p.detach()

    device = torch.device("cpu") if device.type == "meta" else device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            none, own, coupled, decoupled = trial(), trial(decay=DECAY), trial(in_gradient=DECAY), trial(beside=DECAY)
        except Exception:  # `cls` may need a loss, or parameters of another kind
            return False
    from_coupled, from_decoupled, changed = ((own - other).abs().max().item() for other in (coupled, decoupled, none))
    return from_coupled < SAME * changed and from_decoupled > SAME * changed
