"""The truncated unroll in plain torch: every problem and both signs in one batch, on any device. The reference of `fast.py`.

The update is made of the functions of `celo2.rule`; only the MLP is written again, because here every unroll has its own θ.
Legend: N problems, U = 2N unrolls (signs +, - of each problem in turn), T steps, B examples, K decays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
WARM_UP = 3  # steps before a CUDA graph is captured: libraries allocate in their first ones
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


@dataclass
class Unrolls:
    """Everything that a step of all unrolls reads and writes, on the device."""

    live: dict[str, Tensor]  # `state`
    scale: dict[str, Tensor]  # (U, *shape) of each weight, now
    after: dict[str, Tensor]  # the same, and the weights, from a reset on
    fresh: dict[str, Tensor]
    reset_at: Tensor  # (U,), the step at which a problem starts anew
    rows: Tensor  # (N, T, B), examples by number
    networks: dict[str, Tensor]
    losses: Tensor  # (T, U)
    t: Tensor  # (1,), the next step

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        groups = [field if isinstance(field, dict) else {"": field} for field in vars(self).values()]
        return [tensor for group in groups for tensor in group.values()]


def on_device(state: State, theta: np.ndarray, truncation: Truncation, device: torch.device) -> Unrolls:
    """The unrolls of a truncation before their first step."""
    put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device, copy=True)  # noqa: E731
    twice = lambda w: {name: put(np.repeat(x, 2, axis=0)) for name, x in w.items()}  # noqa: E731
    rows = put(truncation.rows)
    return Unrolls(
        live={key: put(x) for key, x in state.items()},
        scale=twice(truncation.scale_before),
        after=twice(truncation.scale_after),
        fresh=twice(truncation.fresh),
        reset_at=put(np.repeat(truncation.reset_at, 2)),
        rows=rows,
        networks=batched_mlp(put(theta)),
        losses=torch.empty(rows.shape[1], len(theta), device=device),
        t=torch.zeros(1, dtype=torch.int64, device=device),
    )


def advance_(config: Config, images: tuple[Tensor, Tensor], unrolls: Unrolls) -> None:
    """One step of every unroll: resets, losses, gradients, updates. Nothing in it depends on what the host can see.

    A loss is measured before the step that learns from it. A problem that starts anew at step t loses its weights and
    accumulators before the loss of step t.
    """
    pixels, labels = images
    starts = unrolls.reset_at == unrolls.t  # (U,)
    for name in SHAPES:
        own = {key: x for key, x in unrolls.live.items() if key.startswith(f"{name}.")}
        news = {key: unrolls.fresh[name] if key == f"{name}.weight" else torch.zeros_like(x) for key, x in own.items()}
        for old, new in [(unrolls.scale[name], unrolls.after[name]), *((own[key], news[key]) for key in own)]:
            old.copy_(torch.where(starts.view(-1, *[1] * (old.ndim - 1)), new, old))
    batch = unrolls.rows.index_select(1, unrolls.t)[:, 0].repeat_interleave(2, 0)  # (U, B)
    weights = {name: unrolls.scale[name] * unrolls.live[f"{name}.weight"] for name in SHAPES}
    losses, gradients = loss_and_gradients(weights, pixels[batch], labels[batch])
    unrolls.losses.index_copy_(0, unrolls.t, losses[None])
    for name in SHAPES:
        parameter = {key.removeprefix(f"{name}."): x for key, x in unrolls.live.items() if key.startswith(f"{name}.")}
        step_(config, unrolls.networks, parameter, unrolls.scale[name] * gradients[name], by_adam(config.variant, name))
    unrolls.t += 1


def unroll(config: Config, data: Images, state: State, theta: np.ndarray, truncation: Truncation) -> np.ndarray:
    """T steps of every unroll under its own θ (U, 347): inner losses (U, T). Moves `state` in place."""
    device = torch.device(config.device)
    unrolls = on_device(state, theta, truncation, device)
    images = torch.from_numpy(data.pixels).to(device), torch.from_numpy(data.labels).to(device)
    for _ in range(len(unrolls.losses)):
        advance_(config, images, unrolls)
    return results(unrolls, state)


def results(unrolls: Unrolls, state: State) -> np.ndarray:
    """The inner losses (U, T), once `state` holds what the unrolls have come to."""
    for key, x in unrolls.live.items():
        state[key][:] = x.cpu().numpy()
    return unrolls.losses.T.cpu().numpy()


class GraphUnroll:
    """`unroll` on a GPU: a step is captured in a CUDA graph once, and replayed T times for every truncation.

    A step is about a thousand small kernels; started one by one they would take as long as the host needs to start them.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.unrolls: Unrolls
        self.images: tuple[Tensor, Tensor]

    def __call__(self, config: Config, data: Images, state: State, theta: np.ndarray, truncation: Truncation) -> np.ndarray:
        """As `unroll`, with the same configuration and data in every call."""
        device = torch.device(config.device)
        unrolls = on_device(state, theta, truncation, device)
        if self.graph is None:
            self.images = torch.from_numpy(data.pixels).to(device), torch.from_numpy(data.labels).to(device)
            self.unrolls = on_device(state, theta, truncation, device)
            self.graph = captured(lambda: advance_(config, self.images, self.unrolls), min(WARM_UP, len(unrolls.losses)))
        torch._foreach_copy_(self.unrolls.tensors(), unrolls.tensors())
        for _ in range(len(unrolls.losses)):
            self.graph.replay()
        return results(self.unrolls, state)


def captured(step: Callable[[], None], warm_up: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `step`, which runs `warm_up` times before, on a stream of its own as capturing wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


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
