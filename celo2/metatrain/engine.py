"""The truncated unroll in plain torch: every problem and both signs in one batch, on any device.

It is the reference of `numba_engine`, and it serves GPUs. The update is made of the functions of `celo2.rule`; only the MLP is
written again, because here every unroll has its own θ.

Legend: N problems, U = 2N unrolls (signs +, - of each problem in turn), T steps, B examples, K decays, F channels, H hidden
units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from celo2 import rule as rules
from celo2.metatrain.config import Config, ConfigError
from celo2.metatrain.families import ADAM_BETAS, ADAM_EPS, Arrays, Family
from celo2.metatrain.problems import Truncation
from celo2.metatrain.theta import parts
from celo2.orthogonalize import newton_schulz
from celo2.rule import FIRST_LAYER, Rule

PUBLISHED = Rule({})  # for its decays; its weights would be those of one rule
WARM_UP = 3  # steps before a CUDA graph is captured: libraries allocate in their first ones

Unroll = Callable[[Config, Family, Arrays, np.ndarray, Truncation], np.ndarray]


def choose_unroll(config: Config) -> Unroll:
    """The engine that the configuration asks for."""
    name, device = config.engine.name, config.engine.device
    if name == "plain" or (name == "auto" and device != "cpu"):
        return GraphUnroll() if torch.device(device).type == "cuda" else unroll
    if device != "cpu" or config.images.batch_size % 8:
        raise ConfigError("engine.name=fast needs engine.device cpu and an images.batch_size that 8 divides; plain takes any")
    try:
        from celo2.metatrain.numba_engine.unroll import unroll as compiled_unroll
    except ImportError:
        raise ConfigError("engine.name=fast needs numba: pip install numba, or engine.name=plain (ten times as slow)") from None
    return compiled_unroll


@dataclass
class Unrolls:
    """Everything that a step of all unrolls reads and writes, on the device."""

    live: dict[str, Tensor]  # `state`
    scale: dict[str, Tensor]  # (U, *shape) of each weight, now
    after: dict[str, Tensor]  # the same, and the weights, from a reset on
    fresh: dict[str, Tensor]
    reset_at: Tensor  # (U,), the step at which a problem starts again
    rows: Tensor  # (N, T, B), examples by number
    rate: Tensor  # (T, U), on the learning rates
    networks: dict[str, Tensor]
    losses: Tensor  # (T, U)
    t: Tensor  # (1,), the next step

    def parameter(self, name: str) -> dict[str, Tensor]:
        """A weight of all unrolls and its accumulators, by their names in the state without that of the weight."""
        return {key.removeprefix(f"{name}."): x for key, x in self.live.items() if key.startswith(f"{name}.")}

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        groups = [field if isinstance(field, dict) else {"": field} for field in vars(self).values()]
        return [tensor for group in groups for tensor in group.values()]


def on_device(state: Arrays, theta: np.ndarray, truncation: Truncation, device: torch.device) -> Unrolls:
    """The unrolls of a truncation before their first step."""

    def put(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, copy=True)

    def twice(weights: Arrays) -> dict[str, Tensor]:
        return {name: put(np.repeat(x, 2, axis=0)) for name, x in weights.items()}

    return Unrolls(
        live={key: put(x) for key, x in state.items()},
        scale=twice(truncation.scale_before),
        after=twice(truncation.scale_after),
        fresh=twice(truncation.fresh),
        reset_at=put(np.repeat(truncation.reset_at, 2)),
        rows=put(truncation.rows),
        rate=put(np.repeat(truncation.rate, 2, axis=0).T),
        networks={name: put(x) for name, x in batched_mlp(theta).items()},
        losses=torch.empty(truncation.rows.shape[1], len(theta), device=device),
        t=torch.zeros(1, dtype=torch.int64, device=device),
    )


def advance_(config: Config, family: Family, arrays: tuple[Tensor, ...], unrolls: Unrolls) -> None:
    """One step of every unroll: resets, losses, gradients, updates. Nothing in it depends on what the host can see.

    A loss is measured before the step that learns from it. A problem that starts again at step t loses its weights and
    accumulators before the loss of step t.
    """
    starts = unrolls.reset_at == unrolls.t  # (U,)
    for name in family.shapes:
        replace_(unrolls.scale[name], unrolls.after[name], starts)
        for key, x in unrolls.parameter(name).items():
            replace_(x, unrolls.fresh[name] if key == "weight" else torch.zeros_like(x), starts)
    batch = unrolls.rows.index_select(1, unrolls.t)[:, 0].repeat_interleave(2, 0)  # (U, B)
    rate = unrolls.rate.index_select(0, unrolls.t)[0]  # (U,)
    weights = {name: unrolls.scale[name] * unrolls.live[f"{name}.weight"] for name in family.shapes}
    losses, gradients = loss_and_gradients(family, weights, arrays, batch)
    unrolls.losses.index_copy_(0, unrolls.t, losses[None])
    for name in family.shapes:
        parameter = unrolls.parameter(name)
        g = unrolls.scale[name] * gradients[name]
        if name in family.by_adam:
            adam_(parameter, g, family.options.adam_lr * rate)
        else:
            step_(config, unrolls.networks, parameter, g, family.options.lr * rate)
    unrolls.t += 1


def replace_(x: Tensor, new: Tensor, where: Tensor) -> None:
    """x (U, ...) becomes `new` in the unrolls `where` (U,) is true, in place."""
    x.copy_(torch.where(where.view(-1, *[1] * (x.ndim - 1)), new, x))


def unroll(config: Config, family: Family, state: Arrays, theta: np.ndarray, truncation: Truncation) -> np.ndarray:
    """T steps of every unroll under its own θ (U, 347): inner losses (U, T). Moves `state` in place."""
    device = torch.device(config.engine.device)
    unrolls = on_device(state, theta, truncation, device)
    arrays = tuple(torch.from_numpy(x).to(device) for x in family.data.arrays)
    for _ in range(len(unrolls.losses)):
        advance_(config, family, arrays, unrolls)
    return results(unrolls, state)


def results(unrolls: Unrolls, state: Arrays) -> np.ndarray:
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
        self.arrays: tuple[Tensor, ...]

    def __call__(self, config: Config, family: Family, state: Arrays, theta: np.ndarray, truncation: Truncation) -> np.ndarray:
        """As `unroll`, with the same configuration and family in every call."""
        device = torch.device(config.engine.device)
        unrolls = on_device(state, theta, truncation, device)
        if self.graph is None:
            self.arrays = tuple(torch.from_numpy(x).to(device) for x in family.data.arrays)
            self.unrolls = on_device(state, theta, truncation, device)
            step = lambda: advance_(config, family, self.arrays, self.unrolls)  # noqa: E731
            self.graph = captured(step, min(WARM_UP, len(unrolls.losses)))
        torch._foreach_copy_(self.unrolls.tensors(), unrolls.tensors())
        for _ in range(len(unrolls.losses)):
            self.graph.replay()
        return results(self.unrolls, state)


def captured(step: Callable[[], object], warm_up: int) -> torch.cuda.CUDAGraph:
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


def loss_and_gradients(
    family: Family, weights: Mapping[str, Tensor], arrays: tuple[Tensor, ...], rows: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (U,) of the networks with weights (U, *shape) on the examples `rows` (U, B), and the gradient of each in its own."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    losses = family.losses(leaves, arrays, rows)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), dict(zip(leaves, gradients, strict=True))


def batched_mlp(theta: np.ndarray) -> dict[str, np.ndarray]:
    """The rules' MLPs from θ (U, 347), ready for `bmm`: w0 (U, F, H), b0, b1 (U, H), w1 (U, H, H), w2 (U, H), b2 (U,)."""
    weights = parts(theta)
    first = np.concatenate([weights[name] for name in FIRST_LAYER.values()], 1)
    return {"w0": first, **{n: weights[n] for n in ("b0", "w1", "b1")}, "w2": weights["w2"][..., 0], "b2": weights["b2"][:, 0]}


def directions(networks: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Step 7 of the rule for channels x (F, U, *shape), each unroll with its own network: u (U, *shape)."""
    flat = x.flatten(2).transpose(0, 1)  # (U, F, n)
    h = torch.relu(networks["w0"][:, : len(x)].mT @ flat + networks["b0"][..., None])  # (U, H, n)
    h = torch.relu(networks["w1"].mT @ h + networks["b1"][..., None])
    u = (networks["w2"][:, None] @ h)[:, 0] + networks["b2"][:, None]
    return u.view(x.shape[1:])


def adam_(parameter: dict[str, Tensor], g: Tensor, lr: Tensor) -> None:
    """One step of Adam, without bias correction, as `step_`."""
    parameter["m"].lerp_(g, 1 - ADAM_BETAS[0])
    parameter["v"].lerp_(g * g, 1 - ADAM_BETAS[1])
    parameter["weight"] -= across(lr, g) * parameter["m"] / (parameter["v"] + ADAM_EPS).sqrt()


def across(lr: Tensor, g: Tensor) -> Tensor:
    """lr (U,), to be multiplied with g (U, *shape)."""
    return lr.view(-1, *[1] * (g.ndim - 1))


def step_(config: Config, networks: Mapping[str, Tensor], parameter: dict[str, Tensor], g: Tensor, lr: Tensor) -> None:
    """One step of one weight of every unroll by the rule, in place.

    Args:
        networks: what `batched_mlp` made of θ.
        parameter: the weight (U, *shape) and its accumulators.
        g: gradient (U, *shape).
        lr: learning rates (U,).
    """
    w = parameter.pop("weight")
    is_vector = g.ndim < 3  # leading axis U
    d1, d0 = (0, 0) if is_vector else rules.factored_axes(g.shape[1:])
    axes = None if is_vector else (1 + d1, 1 + d0)
    last = (-1,) if is_vector else (-2, -1)
    accumulators = {key: x if key == "second_moment" else x.transpose(0, 1) for key, x in parameter.items()}  # K leads
    if config.rule.normalize_gradient:
        g = rules.normalized_gradient(g, last)
    g = g.clamp(-rules.GRADIENT_CLIP, rules.GRADIENT_CLIP)
    rules.accumulate_(accumulators, g, PUBLISHED, axes)
    groups = [group.expand(-1, *g.shape) for group in rules.channels(accumulators, g, w, axes)]
    u = directions(networks, torch.cat([rules.rms_normalized(group, last) for group in groups]))
    if config.rule.variant == "celo2":
        u = newton_schulz(u)
    w -= across(lr, g) * rules.rms_normalized(u, last)
