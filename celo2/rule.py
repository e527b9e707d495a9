"""The Celo2 rule as pure functions of tensors: the algorithm, without optimizer state, groups or devices to think about.

Source: Moudgil, Knyazev, Belilovsky, "Celo2: Towards Learned Optimization Free Lunch", ICLR 2026, arXiv 2602.19142.

`update` at the end of this file is the whole algorithm on one screen. It materializes all thirty channels, so it is the
reference and serves small parameters; `celo2.blocked` computes the same update of large matrices in bounded memory.

Legend: W weight, g gradient, both (..., R, C): R rows, C columns, leading axes a batch of matrices. K decays (three),
F channels (thirty), H hidden units (eight). Everything is float32, but for momentum and second_moment where they are bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from celo2.orthogonalize import newton_schulz
from celo2.rounding import SECOND_MOMENT_SLOT, lerp_, places

GRADIENT_CLIP = 1000.0
SMALL_CLIP = 0.1
SQUARE_FLOOR = 1e-30  # added to g² before the factored means, and to its mean before the gradient is divided by its RMS
FACTOR_EPS = 1e-9  # beside the mean of the row accumulator, and the floor under both factors
RSQRT_EPS = 1e-8  # inside rsqrt(v + eps), rsqrt(row + eps), rsqrt(col + eps)
RMS_EPS = 1e-9  # inside every RMS: of the channels, and of the final update

# Channels in each group of first-layer weights w0__0 .. w0__13; a vector has the first nine groups only.
GROUP_CHANNELS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
VECTOR_GROUPS = 9


@dataclass(frozen=True, eq=False)
class Rule:
    """A learned update rule: the weights of its MLP, and what is needed to use them.

    Attributes:
        weights: float32 tensors `w0__0` .. `w0__13` (channels, H), `b0` (H,), `w1` (H, H), `b1` (H,), `w2` (H, 3), `b2` (3,).
        variant: "celo2" (hidden matrices, orthogonalized) or "celo2-base" (every parameter, not orthogonalized).
        momentum_decays: the three β of the momenta.
        second_moment_decay: the decay of v.
        factored_decays: the three γ of the factored second moment.
        normalize_gradient: the gradient of a matrix is divided by its RMS over the last two axes before anything else, so that
            no epsilon and no clip depends on its scale; False: as published.
        description: how the rule was made, for people.
    """

    weights: Mapping[str, Tensor]
    variant: str = "celo2"
    momentum_decays: tuple[float, float, float] = (0.9, 0.99, 0.999)
    second_moment_decay: float = 0.95
    factored_decays: tuple[float, float, float] = (0.9, 0.99, 0.999)
    normalize_gradient: bool = False
    description: str = field(default="", compare=False)

    def __eq__(self, other: object) -> bool:
        """Equal weights, and everything else but the description."""
        if not isinstance(other, Rule) or self.weights.keys() != other.weights.keys():
            return False
        compared = [f.name for f in fields(self) if f.compare and f.name != "weights"]
        return all(getattr(self, n) == getattr(other, n) for n in compared) and all(
            torch.equal(w, other.weights[name]) for name, w in self.weights.items()
        )

    @property
    def hidden(self) -> int:
        """Hidden units H of each of the two hidden layers."""
        return self.weights["b0"].shape[0]

    def to(self, device: torch.device | str) -> Rule:
        """The same rule with its weights on `device`."""
        return Rule(**{**self.__dict__, "weights": {name: w.to(device) for name, w in self.weights.items()}})


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """(d1, d0): the second longest and the longest axis over all axes, the later one of equals counting as longer."""
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])  # stable, like the published argsort
    return order[-2], order[-1]


def accumulator_shapes(shape: tuple[int, ...], axes: tuple[int, int] | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the accumulators of one parameter; all of them start at zero. `axes` is (d1, d0), or None for a vector.

    momentum (K, *shape); second_moment shape; and row (K, *shape without d0), col (K, *shape without d1), or diag (K, *shape).
    """
    shapes = {"momentum": (3, *shape), "second_moment": tuple(shape)}
    if axes is None:
        return shapes | {"diag": (3, *shape)}
    d1, d0 = axes
    without = lambda axis: tuple(n for i, n in enumerate(shape) if i != axis)  # noqa: E731
    return shapes | {"row": (3, *without(d0)), "col": (3, *without(d1))}


def normalized_gradient(g: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Step 0 of a rule with `normalize_gradient`: g in float32, divided by its root mean square over `axes`.

    Zeros stay zero. One infinite number makes the others zero and itself NaN: the clip comes too late for it.
    """
    g = g.float()
    return g * (g.square().mean(axes, keepdim=True) + SQUARE_FLOOR).rsqrt()


def accumulate_(state: Mapping[str, Tensor], g: Tensor, rule: Rule, axes: tuple[int, int] | None) -> None:
    """Steps 2 to 4: move every accumulator towards the (clipped) gradient g (*shape), in place. No bias correction."""
    count = state.get("count")
    index = None if count is None else places(slice(0, g.shape[-2]), slice(0, g.shape[-1]), g.shape[-1], g.device)
    for slot, (momentum, beta) in enumerate(zip(state["momentum"], rule.momentum_decays, strict=True)):
        lerp_(momentum, g, 1 - beta, index, count, slot)
    square = g * g
    lerp_(state["second_moment"], square, 1 - rule.second_moment_decay, index, count, SECOND_MOMENT_SLOT)
    square += SQUARE_FLOOR
    for k, gamma in enumerate(rule.factored_decays):
        if axes is None:
            state["diag"][k].lerp_(square, 1 - gamma)
        else:
            d1, d0 = axes
            state["row"][k].lerp_(square.mean(d0), 1 - gamma)
            state["col"][k].lerp_(square.mean(d1), 1 - gamma)


def factors(row: Tensor, col: Tensor, axes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Adafactor's two factors of 1/sqrt(v): row_factor like `row` (K, *shape without d0), col_factor like `col`."""
    d1, d0 = axes
    d1_in_row = 1 + d1 - (d1 > d0)  # the axis d1 of W, in `row`, where K leads and d0 is missing
    relative = row / (row.mean(d1_in_row, keepdim=True) + FACTOR_EPS)
    return relative.clamp_min(FACTOR_EPS).rsqrt(), col.clamp_min(FACTOR_EPS).rsqrt()


def channels(state: Mapping[str, Tensor], g: Tensor, w: Tensor, axes: tuple[int, int] | None) -> list[Tensor]:
    """Step 5: the input channels in their groups, each (channels of the group, *shape)."""
    m, v = state["momentum"].float(), state["second_moment"].float()
    s = (v + RSQRT_EPS).rsqrt()
    clipped = g.clamp(-SMALL_CLIP, SMALL_CLIP)
    groups = [g[None], clipped[None], w[None], m, v[None], m * s, s[None]]
    if axes is None:
        return [*groups, g * (state["diag"] + FACTOR_EPS).clamp_min(FACTOR_EPS).rsqrt(), (g * s)[None]]
    d1, d0 = axes
    row_factor, col_factor = factors(state["row"], state["col"], axes)
    factor = row_factor.unsqueeze(1 + d0) * col_factor.unsqueeze(1 + d1)  # (K, *shape)
    row = state["row"].unsqueeze(1 + d0).expand_as(m)
    col = state["col"].unsqueeze(1 + d1).expand_as(m)
    rsqrt_row, rsqrt_col = (row + RSQRT_EPS).rsqrt(), (col + RSQRT_EPS).rsqrt()
    return [*groups, g * factor, (g * s)[None], row, col, rsqrt_row, rsqrt_col, m * factor]


def rms_normalized(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Steps 6 and 9: x divided by its root mean square over `axes`."""
    return x * (x.square().mean(axes, keepdim=True) + RMS_EPS).rsqrt()


def mlp(rule: Rule, x: Tensor) -> Tensor:
    """Step 7: the direction u (*shape) from normalized channels x (F, *shape). Outputs 1 and 2 have no effect."""
    weights = rule.weights
    w0 = torch.cat([weights[f"w0__{i}"] for i in range(len(GROUP_CHANNELS)) if f"w0__{i}" in weights])[: len(x)]  # (F, H)
    h = torch.relu(w0.T @ x.flatten(1) + weights["b0"][:, None])  # (H, n)
    h = torch.relu(weights["w1"].T @ h + weights["b1"][:, None])  # (H, n)
    u = weights["w2"][:, 0] @ h + weights["b2"][0]  # (n,)
    return u.view(x.shape[1:])


def update(
    rule: Rule,
    state: Mapping[str, Tensor],
    g: Tensor,
    w: Tensor,
    *,
    orthogonalize: bool,
    ns_dtype: torch.dtype = torch.float32,
    axes: tuple[int, int] | None = None,
) -> Tensor:
    """The Celo2 update u (*shape) of one parameter: `W <- W - lr (u + weight_decay W)`; its RMS over a matrix is 1.

    Args:
        rule: the learned rule.
        state: accumulators of `accumulator_shapes`, advanced in place. Of a matrix, momentum and second_moment may be bfloat16,
            rounded stochastically (`celo2.rounding`); they need `count`, int32 (): the number of this step, 1 for the first.
        g: gradient, float32 (*shape), one axis or more.
        w: weight, float32 (*shape).
        orthogonalize: step 8, for parameters with two axes or more; True is Celo2, False is Celo2-base.
        ns_dtype: dtype of the Newton–Schulz products.
        axes: (d1, d0) of the factored second moment; None takes `factored_axes(shape)`.
    """
    is_vector = g.ndim < 2
    if axes is None and not is_vector:
        axes = factored_axes(g.shape)
    last_two = (-1,) if is_vector else (-2, -1)

    if rule.normalize_gradient:
        g = normalized_gradient(g, last_two)
    g = g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP)
    accumulate_(state, g, rule, axes)
    x = torch.cat([rms_normalized(group, last_two) for group in channels(state, g, w, axes)])  # (F, *shape)
    u = mlp(rule, x)
    if orthogonalize and not is_vector:
        u = newton_schulz(u.to(ns_dtype)).float()
    return rms_normalized(u, last_two)
