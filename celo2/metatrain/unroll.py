"""The truncated unroll in plain torch: every problem and both signs in one batch, on any device. The reference of `fast.py`.

The update is made of the functions of `celo2.rule`; only the MLP is written again, because here every unroll has its own θ.
Legend: N problems, U = 2N unrolls (signs +, - of each problem in turn), T steps, B examples, K decays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from celo2 import rule as rules
from celo2.metatrain.config import Config
from celo2.metatrain.problems import SHAPES, Truncation, Weights
from celo2.metatrain.tasks import Images
from celo2.orthogonalize import newton_schulz
from celo2.rule import Rule
from celo2.weights import weight_shapes

ADAM_BETAS, ADAM_EPS = (0.9, 0.95), 1e-8
RULE_SHAPES = weight_shapes(hidden=8)
THETA_SIZE = sum(int(np.prod(shape)) for shape in RULE_SHAPES.values())

State = dict[str, np.ndarray]


def theta_of(rule: Rule) -> np.ndarray:
    """The weights of a rule as one float32 vector (347,), in the order of `weight_shapes`."""
    return np.concatenate([rule.weights[name].numpy().ravel() for name in RULE_SHAPES])


def rule_of(theta: np.ndarray, variant: str, description: str) -> Rule:
    """The rule with the weights θ (347,)."""
    parts = np.split(theta.astype(np.float32), np.cumsum([int(np.prod(s)) for s in RULE_SHAPES.values()])[:-1])
    weights = {n: torch.from_numpy(p.reshape(s).copy()) for (n, s), p in zip(RULE_SHAPES.items(), parts, strict=True)}
    return Rule(weights, variant=variant, description=description)


def by_adam(variant: str, name: str) -> bool:
    """Whether a weight takes Adam: biases in Celo2, nothing in Celo2-base."""
    return variant == "celo2" and len(SHAPES[name]) < 2


def accumulator_shapes(variant: str, name: str) -> dict[str, tuple[int, ...]]:
    """Accumulators of one weight of one unroll."""
    shape = SHAPES[name]
    if by_adam(variant, name):
        return {"m": shape, "v": shape}
    return rules.accumulator_shapes(shape, rules.factored_axes(shape) if len(shape) > 1 else None)


def initial_state(variant: str, weights: Weights) -> State:
    """Both unrolls of every problem at its initial weights (N, *shape): `NAME.weight` (U, *shape), accumulators (U, ...) zero."""
    state = {}
    for name, w in weights.items():
        state[f"{name}.weight"] = np.repeat(w, 2, axis=0)
        for key, shape in accumulator_shapes(variant, name).items():
            state[f"{name}.{key}"] = np.zeros((2 * len(w), *shape), np.float32)
    return state


def unroll(config: Config, data: Images, state: State, theta: np.ndarray, truncation: Truncation) -> np.ndarray:
    """T steps of every unroll under its own θ (U, 347): inner losses (U, T). Moves `state` in place.

    A loss is measured before the step that learns from it. A problem that starts anew at step t loses its weights and
    accumulators before the loss of step t.
    """
    device = torch.device(config.device)
    put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device)  # noqa: E731
    twice = lambda w: {name: put(np.repeat(x, 2, axis=0)) for name, x in w.items()}  # noqa: E731
    live = {key: put(x) for key, x in state.items()}
    scale, after, fresh = twice(truncation.scale_before), twice(truncation.scale_after), twice(truncation.fresh)
    reset_at = np.repeat(truncation.reset_at, 2)
    pixels, labels, rows = put(data.pixels), put(data.labels), put(truncation.rows)
    networks = batched_mlp(put(theta))
    losses = torch.empty(rows.shape[1], len(theta), device=device)
    for t in range(rows.shape[1]):
        for u in np.flatnonzero(reset_at == t):
            for name in SHAPES:
                scale[name][u] = after[name][u]
                for key, x in live.items():
                    if key.startswith(f"{name}."):
                        x[u] = fresh[name][u] if key == f"{name}.weight" else 0
        batch = rows[:, t].repeat_interleave(2, 0)  # (U, B)
        weights = {name: scale[name] * live[f"{name}.weight"] for name in SHAPES}
        losses[t], gradients = loss_and_gradients(weights, pixels[batch], labels[batch])
        for name in SHAPES:
            parameter = {key.removeprefix(f"{name}."): x for key, x in live.items() if key.startswith(f"{name}.")}
            step_(config, networks, parameter, scale[name] * gradients[name], by_adam(config.variant, name))
    for key, x in live.items():
        state[key][:] = x.cpu().numpy()
    return losses.T.cpu().numpy()


def loss_and_gradients(weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropies (U,) of the networks 64-32-10 on x (U, B, 64), y (U, B), and the gradient of each in its weights."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    h = torch.relu(x @ leaves["w1"] + leaves["b1"][:, None])  # (U, B, 32)
    logits = h @ leaves["w2"] + leaves["b2"][:, None]  # (U, B, 10)
    losses = torch.nn.functional.cross_entropy(logits.mT, y, reduction="none").mean(1)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), dict(zip(leaves, gradients, strict=True))


def batched_mlp(theta: Tensor) -> dict[str, Tensor]:
    """The rules' MLPs from θ (U, 347), ready for `bmm`: w0 (U, F, H), b0, b1 (U, H), w1 (U, H, H), w2 (U, H), b2 (U,)."""
    sizes = [int(np.prod(shape)) for shape in RULE_SHAPES.values()]
    parts = {
        name: part.reshape(-1, *shape) for (name, shape), part in zip(RULE_SHAPES.items(), theta.split(sizes, 1), strict=True)
    }
    first = torch.cat([part for name, part in parts.items() if name.startswith("w0")], 1)
    return {"w0": first, **{n: parts[n] for n in ("b0", "w1", "b1")}, "w2": parts["w2"][..., 0], "b2": parts["b2"][:, 0]}


def directions(networks: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Step 7 of the rule for channels x (F, U, *shape), each unroll with its own network: u (U, *shape)."""
    flat = x.flatten(2).transpose(0, 1)  # (U, F, n)
    h = torch.relu(networks["w0"][:, : len(x)].mT @ flat + networks["b0"][..., None])  # (U, H, n)
    h = torch.relu(networks["w1"].mT @ h + networks["b1"][..., None])
    u = (networks["w2"][:, None] @ h)[:, 0] + networks["b2"][:, None]
    return u.view(x.shape[1:])


def step_(config: Config, networks: Mapping[str, Tensor], parameter: dict[str, Tensor], g: Tensor, adam: bool) -> None:
    """One step of one weight of every unroll, in place: `parameter` holds its weight and accumulators, g (U, *shape)."""
    w = parameter.pop("weight")
    if adam:
        parameter["m"].lerp_(g, 1 - ADAM_BETAS[0])
        parameter["v"].lerp_(g * g, 1 - ADAM_BETAS[1])
        w -= config.inner_adam_lr * parameter["m"] / (parameter["v"] + ADAM_EPS).sqrt()
        return
    is_vector = g.ndim < 3  # leading axis U
    axes = None if is_vector else tuple(1 + axis for axis in rules.factored_axes(g.shape[1:]))
    last = (-1,) if is_vector else (-2, -1)
    accumulators = {key: x if key == "second_moment" else x.transpose(0, 1) for key, x in parameter.items()}  # K leads
    g = g.clamp(-rules.GRADIENT_CLIP, rules.GRADIENT_CLIP)
    rules.accumulate_(accumulators, g, Rule, axes)  # the class carries the published decays
    groups = [group.expand(-1, *g.shape) for group in rules.channels(accumulators, g, w, axes)]
    u = directions(networks, torch.cat([rules.rms_normalized(group, last) for group in groups]))
    if config.variant == "celo2":
        u = newton_schulz(u)
    w -= config.inner_lr * rules.rms_normalized(u, last)
