"""The truncated unroll in plain torch: every problem and both signs in one batch, on any device.

It is the reference for `numba_engine`, and the engine for GPUs. The update consists of functions of `celo2.rule`; only the MLP is
written again, because here every unroll has its own θ.

Legend: N problems, U unrolls, problem by problem (for PES the signs + and - of each), T steps, B examples, K decays, F channels,
H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from celo2 import rule as rules
from celo2.metatrain.config import (
    Config,
    ConfigError,
    is_fast,
    normalizes,
    start_rule,
    step_bounds,
    text_sizes,
    texts_of,
    whitening,
)
from celo2.metatrain.families import ADAM_BETAS, ADAM_EPS, TINY, Arrays, Family
from celo2.metatrain.problems import Truncation
from celo2.metatrain.tasks import VOCABULARY
from celo2.metatrain.theta import parts
from celo2.orthogonalize import newton_schulz
from celo2.rule import FIRST_LAYER
from celo2.rule_files import LARGEST_WHITENING
from celo2.whitening import WHITENERS, whiten_

WARM_UP = 3  # steps before a CUDA graph is captured: libraries allocate memory in their first steps


@dataclass(frozen=True)
class Expert:
    """A rule that helps the trained rule and uses the same accumulators (ELO, arXiv 2607.06772).

    Attributes:
        theta: (D,), θ of the expert.
        forcing: the expert's share of every step.
        terms: (U, T, 2), filled by the engine: 1 - cosine between the expert's step and the rule's over all weights that the rule
            trains, and the mean difference of their absolute values.
    """

    theta: np.ndarray
    forcing: float
    terms: np.ndarray


Unroll = Callable[[Config, Family, Arrays, np.ndarray, Truncation, Expert | None], np.ndarray]


def choose_unroll(config: Config) -> Unroll:
    """The engine that the configuration asks for.

    Raises:
        ConfigError: the device does not exist, numba is missing, or the compiled engine does not support the sizes.
    """
    device = config.engine.device
    if not is_fast(config):
        return GraphUnroll() if usable(device).type == "cuda" else unroll
    if device != "cpu" or config.images.batch_size % 8:
        raise ConfigError(
            "engine.name=fast needs engine.device=cpu and an images.batch_size divisible by 8; engine.name=plain accepts any"
        )
    try:
        from celo2.metatrain.numba_engine.unroll import unroll as compiled_unroll
    except ImportError:
        raise ConfigError("engine.name=fast needs numba: pip install numba, or engine.name=plain (ten times as slow)") from None
    if texts_of(config):
        for size in text_sizes(config):
            if size.width % (16 * size.heads) or size.context % 16 or size.width >= VOCABULARY:
                raise ConfigError(
                    f"engine.name=fast needs a text.width of 16 to {VOCABULARY - 16}, and text.width / text.heads and "
                    f"text.context divisible by 16; found width {size.width}, {size.heads} heads, context {size.context}; "
                    "engine.name=plain accepts any"
                )
    return compiled_unroll


def usable(device: str) -> torch.device:
    """The device of that name. Raises ConfigError unless it exists and can hold numbers, which `meta` cannot."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):  # unknown name, no driver, or a build without this device
        raise ConfigError(
            f"engine.device is '{device}', expected cpu, or a device of this machine, such as cuda or cuda:1"
        ) from None
    return torch.device(device)


@dataclass
class Unrolls:
    """Everything that a step of all unrolls reads and writes, on the device."""

    live: dict[str, Tensor]  # the current state: weights and accumulators
    scale: dict[str, Tensor]  # the current scale (U, *shape) of each weight
    after: dict[str, Tensor]  # the scales from a reset on
    fresh: dict[str, Tensor]  # the state from a reset on
    reset_at: Tensor  # (U,), the step at which a problem is reset
    rows: Tensor  # (N, T, B), indices of examples
    rate: Tensor  # (T, U), factors of the learning rates
    networks: dict[str, Tensor]  # the rules, from `batched_mlp`
    expert: dict[str, Tensor]  # the expert's networks, equal for all unrolls, and `forcing` (); empty without an expert
    losses: Tensor  # (T, U)
    terms: Tensor  # (T, U, 2), imitation terms
    t: Tensor  # (1,), the next step

    def parameter(self, name: str) -> dict[str, Tensor]:
        """A weight of all unrolls and its accumulators, by their names in the state without the prefix `name.`."""
        return {key.removeprefix(f"{name}."): x for key, x in self.live.items() if key.startswith(f"{name}.")}

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        groups = [field if isinstance(field, dict) else {"": field} for field in vars(self).values()]
        return [tensor for group in groups for tensor in group.values()]


def on_device(state: Arrays, theta: np.ndarray, truncation: Truncation, expert: Expert | None, device: torch.device) -> Unrolls:
    """The unrolls of a truncation before their first step."""

    def put(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, copy=True)

    copies = len(theta) // len(truncation.rows)

    def of_each(x: np.ndarray) -> np.ndarray:
        return np.repeat(x, copies, axis=0)

    of_expert = {}
    if expert is not None:
        of_expert = {name: put(x) for name, x in batched_mlp(np.repeat(expert.theta[None], len(theta), 0)).items()}
        of_expert["forcing"] = put(np.full((), expert.forcing, np.float32))
    return Unrolls(
        live={key: put(x) for key, x in state.items()},
        scale={name: put(of_each(x)) for name, x in truncation.scale_before.items()},
        after={name: put(of_each(x)) for name, x in truncation.scale_after.items()},
        fresh={key: put(x) for key, x in truncation.fresh.items()},
        reset_at=put(of_each(truncation.reset_at)),
        rows=put(truncation.rows),
        rate=put(of_each(truncation.rate).T),
        networks={name: put(x) for name, x in batched_mlp(theta).items()},
        expert=of_expert,
        losses=torch.empty(truncation.rows.shape[1], len(theta), device=device),
        terms=torch.zeros(truncation.rows.shape[1], len(theta), 2, device=device),
        t=torch.zeros(1, dtype=torch.int64, device=device),
    )


def advance_(config: Config, family: Family, arrays: tuple[Tensor, ...], unrolls: Unrolls) -> None:
    """One step of every unroll: resets, losses, gradients, updates. The host reads no result, so it can be captured in a graph.

    A loss is measured before the update of its step. A problem that is reset at step t gets new weights and accumulators before
    the loss of step t.
    """
    starts = unrolls.reset_at == unrolls.t  # (U,)
    for name in family.shapes:
        replace_(unrolls.scale[name], unrolls.after[name], starts)
        for key, x in unrolls.parameter(name).items():
            replace_(x, unrolls.fresh[f"{name}.{key}"], starts)
    copies = len(starts) // len(unrolls.rows)
    batch = unrolls.rows.index_select(1, unrolls.t)[:, 0].repeat_interleave(copies, 0)  # (U, B)
    rate = unrolls.rate.index_select(0, unrolls.t)[0]  # (U,)
    weights = {name: unrolls.scale[name] * unrolls.live[f"{name}.weight"] for name in family.shapes}
    losses, gradients = loss_and_gradients(family, weights, arrays, batch)
    unrolls.losses.index_copy_(0, unrolls.t, losses[None])
    gradients = {name: unrolls.scale[name] * g for name, g in gradients.items()}
    if config.inner.grad_clip is not None:
        clip_(gradients, config.inner.grad_clip)
    bound, expert_bound = step_bounds(config)
    pairs = []  # for each weight the step of the rule and that of the expert
    for name, g in gradients.items():
        parameter = unrolls.parameter(name)
        if name in family.by_adam:
            adam_(parameter, g, family.options.adam_lr * rate)
            continue
        w = parameter["weight"]
        given = accumulated(config, parameter, g)
        whiteners = {key: parameter[key] for key in WHITENERS if key in parameter}
        step = across(family.options.lr * rate, g) * directed(config, unrolls.networks, given, whiteners, bound)
        if unrolls.expert:
            expert_step = across(config.expert.lr * rate, g) * directed(config, unrolls.expert, given, {}, expert_bound)
            pairs.append((step.flatten(1), expert_step.flatten(1)))
            step = (1 - unrolls.expert["forcing"]) * step + unrolls.expert["forcing"] * expert_step
        w -= step
    if pairs:
        of_rule, of_expert = (torch.cat(steps, 1) for steps in zip(*pairs, strict=True))  # (U, n)
        unrolls.terms.index_copy_(0, unrolls.t, imitation(of_rule, of_expert)[None])
    unrolls.t += 1


def clip_(gradients: dict[str, Tensor], most: float) -> None:
    """Clip the gradients (U, *shape) in place: the norm of each unroll over all weights becomes at most `most`."""
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()  # (U,)
    factor = torch.where(norm > most, most / norm, 1.0)
    for g in gradients.values():
        g *= across(factor, g)


def imitation(step: Tensor, expert_step: Tensor) -> Tensor:
    """Imitation terms (U, 2) of two steps (U, n): 1 - cosine, and the mean difference of their absolute values."""
    norms = step.square().sum(1).sqrt() * expert_step.square().sum(1).sqrt()
    return torch.stack([1 - (step * expert_step).sum(1) / (norms + TINY), (step.abs() - expert_step.abs()).abs().mean(1)], 1)


def replace_(x: Tensor, new: Tensor, where: Tensor) -> None:
    """Replace x (U, ...) by `new`, in place, in the unrolls for which `where` (U,) is true."""
    x.copy_(torch.where(where.view(-1, *[1] * (x.ndim - 1)), new, x))


def unroll(
    config: Config, family: Family, state: Arrays, theta: np.ndarray, truncation: Truncation, expert: Expert | None = None
) -> np.ndarray:
    """Run T steps of every unroll under its own θ (U, D). Returns inner losses (U, T); updates `state` in place."""
    device = torch.device(config.engine.device)
    unrolls = on_device(state, theta, truncation, expert, device)
    arrays = tuple(torch.from_numpy(x).to(device) for x in family.data.arrays)
    for _ in range(len(unrolls.losses)):
        advance_(config, family, arrays, unrolls)
    return results(unrolls, state, expert)


def results(unrolls: Unrolls, state: Arrays, expert: Expert | None) -> np.ndarray:
    """Copy the final state and the imitation terms into `state` and `expert`; returns the inner losses (U, T)."""
    for key, x in unrolls.live.items():
        state[key][:] = x.cpu().numpy()
    if expert is not None:
        expert.terms[:] = unrolls.terms.transpose(0, 1).cpu().numpy()
    return unrolls.losses.T.cpu().numpy()


class GraphUnroll:
    """`unroll` on a GPU: a step is captured in a CUDA graph once, and replayed T times for every truncation.

    A step is about a thousand small kernels. Launched one by one they would be limited by the launch time of the host.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.form: list[torch.Size] = []  # shapes of the tensors that the graph was captured for
        self.unrolls: Unrolls
        self.arrays: tuple[Tensor, ...]

    def __call__(
        self,
        config: Config,
        family: Family,
        state: Arrays,
        theta: np.ndarray,
        truncation: Truncation,
        expert: Expert | None = None,
    ) -> np.ndarray:
        """`unroll` with the same configuration and family in every call. New shapes, or an expert that ends, need a new graph."""
        device = torch.device(config.engine.device)
        unrolls = on_device(state, theta, truncation, expert, device)
        form = [tensor.shape for tensor in unrolls.tensors()]
        if self.graph is None or form != self.form:
            self.graph, self.form = None, form
            self.arrays = tuple(torch.from_numpy(x).to(device) for x in family.data.arrays)
            self.unrolls = on_device(state, theta, truncation, expert, device)
            step = lambda: advance_(config, family, self.arrays, self.unrolls)  # noqa: E731
            self.graph = captured(step, min(WARM_UP, len(unrolls.losses)))
        torch._foreach_copy_(self.unrolls.tensors(), unrolls.tensors())
        for _ in range(len(unrolls.losses)):
            self.graph.replay()
        return results(self.unrolls, state, expert)


def captured(step: Callable[[], object], warm_up: int) -> torch.cuda.CUDAGraph:
    """Capture `step` in a CUDA graph, after `warm_up` runs of it on a separate stream, as capturing requires."""
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
    """Losses (U,) of networks with weights (U, *shape) on the examples `rows` (U, B), and their gradients in the weights."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    losses = family.losses(leaves, arrays, rows)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), dict(zip(leaves, gradients, strict=True))


def batched_mlp(theta: np.ndarray) -> dict[str, np.ndarray]:
    """The rules of θ (U, 352) in the form for batched products: w0 (U, F, H), b0, b1 (U, H), w1 (U, H, H), w2 (U, H), b2 (U,),
    `step` (U, 4) and `whitening` (U, 1)."""
    weights = parts(theta)
    first = np.concatenate([weights[name] for name in FIRST_LAYER.values()], 1)
    return {
        "w0": first,
        **{n: weights[n] for n in ("b0", "w1", "b1", "step", "whitening")},
        "w2": weights["w2"][..., 0],
        "b2": weights["b2"][:, 0],
    }


def directions(networks: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Step 7 of the rule for channels x (F, U, *shape), each unroll with its own network: u (U, *shape)."""
    flat = x.flatten(2).transpose(0, 1)  # (U, F, n)
    h = torch.relu(networks["w0"][:, : len(x)].mT @ flat + networks["b0"][..., None])  # (U, H, n)
    h = torch.relu(networks["w1"].mT @ h + networks["b1"][..., None])
    u = (networks["w2"][:, None] @ h)[:, 0] + networks["b2"][:, None]
    return u.view(x.shape[1:])


def adam_(parameter: dict[str, Tensor], g: Tensor, lr: Tensor) -> None:
    """One step of Adam without bias correction, in place, with learning rates lr (U,)."""
    parameter["m"].lerp_(g, 1 - ADAM_BETAS[0])
    parameter["v"].lerp_(g * g, 1 - ADAM_BETAS[1])
    parameter["weight"] -= across(lr, g) * parameter["m"] / (parameter["v"] + ADAM_EPS).sqrt()


def across(lr: Tensor, g: Tensor) -> Tensor:
    """lr (U,) in a shape that broadcasts to g (U, *shape)."""
    return lr.view(-1, *[1] * (g.ndim - 1))


class Given(NamedTuple):
    """The inputs of a rule's step: its channels (F, U, *shape), and log r_k (K, U) for its step size."""

    channels: Tensor
    agreements: Tensor


def accumulated(config: Config, parameter: dict[str, Tensor], g: Tensor) -> Given:
    """Steps 0 to 6 of the rule for one weight of every unroll, with gradient g (U, *shape).

    Updates the accumulators in `parameter` in place.
    """
    last = last_axes(g)
    d1, d0 = (0, 0) if len(last) == 1 else rules.factored_axes(g.shape[1:])
    axes = None if len(last) == 1 else (1 + d1, 1 + d0)
    own = {key: x for key, x in parameter.items() if key not in ("weight", *WHITENERS)}
    accumulators = {key: x if key == "second_moment" else x.transpose(0, 1) for key, x in own.items()}  # K leads
    if normalizes(config):
        g = rules.normalized_gradient(g, last)
    g = g.clamp(-rules.GRADIENT_CLIP, rules.GRADIENT_CLIP)
    rules.accumulate_(accumulators, g, start_rule(config), axes)
    groups = [group.expand(-1, *g.shape) for group in rules.channels(accumulators, g, parameter["weight"], axes)]
    squares = g.square().mean(last), accumulators["momentum"].square().mean(last)  # (U,), (K, U)
    agreements = torch.stack(rules.agreements(start_rule(config), *squares))
    return Given(torch.cat([rules.rms_normalized(group, last) for group in groups]), agreements)


def directed(
    config: Config, networks: Mapping[str, Tensor], given: Given, whiteners: Mapping[str, Tensor], bound: float
) -> Tensor:
    """Steps 7 to 9: updates (U, *shape) by rules from `batched_mlp`, with step sizes of at most `bound`.

    Updates the whiteners (U, n, n) of a rule with whitening in place.
    """
    u = directions(networks, given.channels)
    if whiteners:
        rate = (whitening(config) * networks["whitening"].exp()).clamp(max=LARGEST_WHITENING)  # (U, 1)
        u = whiten_(u, whiteners, rate[..., None])
    if config.rule.variant == "celo2":
        u = newton_schulz(u)
    exponents, factor = networks["step"][:, :3], networks["step"][:, 3]  # (U, K), (U,)
    step_size = (factor + (exponents.T * given.agreements).sum(0)).exp().clamp(max=bound)
    return across(step_size, u) * rules.rms_normalized(u, last_axes(u))


def last_axes(x: Tensor) -> tuple[int, ...]:
    """The axes of the matrix or vector of each unroll in x (U, *shape)."""
    return (-1,) if x.ndim < 3 else (-2, -1)
