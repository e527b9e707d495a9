"""The Celo2 rule as pure functions of tensors: the algorithm alone, without param groups, devices or sharding.

Source: Moudgil, Knyazev, Belilovsky, "Celo2: Towards Learned Optimization Free Lunch", ICLR 2026, arXiv 2602.19142.

`update` at the end of this file is the whole algorithm on one screen. It materializes all thirty channels, so it serves as the
reference and for small parameters. `celo2.blocked` computes the same update of large matrices in bounded memory.

Legend: W weight, g gradient, both (..., R, C): R rows, C columns, leading axes a batch of matrices. K decays (three),
F channels (thirty), H hidden units (eight). Everything is float32, except that momentum and second_moment may be bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from celo2.orthogonalize import newton_schulz
from celo2.rounding import SECOND_MOMENT_SLOT, lerp_, places
from celo2.whitening import WHITENERS, whiten_, whitener_shapes

GRADIENT_CLIP = 1000.0
SMALL_CLIP = 0.1
SQUARE_FLOOR = 1e-30  # added to g² in step 4, and to mean(g²) in step 0
FACTOR_EPS = 1e-9  # added to the mean of the row accumulator; also the lower bound of both factors
RSQRT_EPS = 1e-8  # inside rsqrt(v + eps), rsqrt(row + eps), rsqrt(col + eps)
OUTPUTS = 3  # of the MLP: the direction, and two that have no effect
RMS_EPS = 1e-9  # added to the mean square in every RMS: of the channels, and of the final update

ELEMENT, FACTORED, ROW, COLUMN = "element", "element, row and column", "row", "column"


@dataclass(frozen=True)
class ChannelGroup:
    """Input channels of the MLP with one formula: a single channel, or one for each of the K decays."""

    name: str
    formula: str
    depends_on: str  # ELEMENT, FACTORED, ROW or COLUMN
    count: int
    in_vectors: bool  # vectors have these channels too; FACTORED ones then use `diag` in place of the two factors
    odd: bool  # the channel changes sign when both g and W change sign


# Step 5: the MLP's inputs for each weight, in the order of the first-layer weights w0__0 .. w0__13 of a rule file. Every other
# module takes the names and positions of channels from this table.
CHANNEL_GROUPS = (
    ChannelGroup("gradient", "g", ELEMENT, 1, True, True),
    ChannelGroup("clipped_gradient", "clip(g, -0.1, 0.1)", ELEMENT, 1, True, True),
    ChannelGroup("weight", "W", ELEMENT, 1, True, True),
    ChannelGroup("momentum", "m_k", ELEMENT, 3, True, True),
    ChannelGroup("second_moment", "v", ELEMENT, 1, True, False),
    ChannelGroup("scaled_momentum", "m_k s", ELEMENT, 3, True, True),
    ChannelGroup("scale", "s = rsqrt(v + 1e-8)", ELEMENT, 1, True, False),
    ChannelGroup("factored_gradient", "g row_factor_k col_factor_k", FACTORED, 3, True, True),
    ChannelGroup("scaled_gradient", "g s", ELEMENT, 1, True, True),
    ChannelGroup("row_mean", "row_k", ROW, 3, False, False),
    ChannelGroup("column_mean", "col_k", COLUMN, 3, False, False),
    ChannelGroup("row_scale", "rsqrt(row_k + 1e-8)", ROW, 3, False, False),
    ChannelGroup("column_scale", "rsqrt(col_k + 1e-8)", COLUMN, 3, False, False),
    ChannelGroup("factored_momentum", "m_k row_factor_k col_factor_k", FACTORED, 3, False, True),
)
FIRST_LAYER = {group.name: f"w0__{i}" for i, group in enumerate(CHANNEL_GROUPS)}  # names of weights (count, H) in `Rule.weights`


def groups_of(*depends_on: str) -> list[ChannelGroup]:
    """The channel groups with one of these values of `depends_on`, ordered by the arguments and then by the table."""
    return [group for what in depends_on for group in CHANNEL_GROUPS if group.depends_on == what]


@dataclass(frozen=True, eq=False)
class Rule:
    """A learned update rule: the weights of its MLP, and the settings that are needed to use them.

    Attributes:
        weights: float32 tensors `w0__0` .. `w0__13` (channels, H), `b0` (H,), `w1` (H, H), `b1` (H,), `w2` (H, 3), `b2` (3,).
        variant: "celo2" (hidden matrices, orthogonalized) or "celo2-base" (every parameter, not orthogonalized).
        momentum_decays: the three β of the momenta.
        second_moment_decay: the decay of v.
        factored_decays: the three γ of the factored second moment.
        normalize_gradient: True divides the gradient of a matrix by its RMS over the last two axes before anything else, so
            that the scale of the gradient does not matter to any epsilon or clip. False: as published.
        step_exponents: one for each momentum. The larger an exponent, the longer the step of a matrix whose gradients agree
            from step to step (`step_size_of`). Zeros: every update has RMS 1, as published.
        step_factor: a factor of every step size.
        step_bound: the upper bound of every step size.
        whitening: how far whiteners move in a step (`celo2.whitening`); 0: directions are not whitened, as published.
        description: how the rule was made, as free text.
        source: the file on the Hugging Face Hub that the rule comes from, `hub:OWNER/NAME@COMMIT:FILE`; empty for other rules.
    """

    weights: Mapping[str, Tensor]
    variant: str = "celo2"
    momentum_decays: tuple[float, float, float] = (0.9, 0.99, 0.999)
    second_moment_decay: float = 0.95
    factored_decays: tuple[float, float, float] = (0.9, 0.99, 0.999)
    normalize_gradient: bool = False
    step_exponents: tuple[float, float, float] = (0.0, 0.0, 0.0)
    step_factor: float = 1.0
    step_bound: float = math.inf
    whitening: float = 0.0
    description: str = ""
    source: str = ""

    def __eq__(self, other: object) -> bool:
        """Whether both rules compute the same update: equal weights and settings."""
        if not isinstance(other, Rule) or self.weights.keys() != other.weights.keys():
            return False
        return self.settings() == other.settings() and all(
            torch.equal(w, other.weights[name]) for name, w in self.weights.items()
        )

    def settings(self) -> dict[str, Any]:
        """All settings besides the weights that change an update. Those of step sizes or whitening are left out if unused."""
        others = {"weights", "description", "source"} | (set() if self.has_step_sizes else {"step_exponents", "step_factor"})
        others |= set() if self.has_step_sizes and self.step_bound < math.inf else {"step_bound"}
        others |= set() if self.whitening else {"whitening"}
        return {name: value for name, value in self.__dict__.items() if name not in others}

    @property
    def has_step_sizes(self) -> bool:
        """Whether updates may have an RMS other than 1."""
        return any(self.step_exponents) or self.step_factor != 1 or self.step_bound < 1

    @property
    def hidden(self) -> int:
        """Hidden units H of each of the two hidden layers."""
        return self.weights["b0"].shape[0]

    def to(self, device: torch.device | str) -> Rule:
        """The same rule with its weights on `device`."""
        return Rule(**{**self.__dict__, "weights": {name: w.to(device) for name, w in self.weights.items()}})

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Rule:
        """Load a rule from a folder, by its shipped name, or from the Hugging Face Hub; options: `celo2.hub.from_pretrained`."""
        from celo2 import hub

        return hub.from_pretrained(name, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the rule and a card into a folder; options: `celo2.hub.save_pretrained`."""
        from celo2 import hub

        hub.save_pretrained(self, folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload rule and card to the Hugging Face Hub; returns the commit's URL; options: `celo2.hub.push_to_hub`."""
        from celo2 import hub

        return hub.push_to_hub(self, repo_id, **options)


def weight_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a rule's weights: 347 numbers at hidden = 8."""
    first = {FIRST_LAYER[group.name]: (group.count, hidden) for group in CHANNEL_GROUPS}
    return first | {"b0": (hidden,), "w1": (hidden, hidden), "b1": (hidden,), "w2": (hidden, OUTPUTS), "b2": (OUTPUTS,)}


def places_of(*depends_on: str) -> dict[str, slice]:
    """The slice of each group of `groups_of`, by name, when the channels of these groups alone are concatenated."""
    found, start = {}, 0
    for group in groups_of(*depends_on):
        found[group.name] = slice(start, start + group.count)
        start += group.count
    return found


def place_of(name: str) -> slice:
    """The slice of one group's channels among all thirty; in the fifteen channels of a vector the slice is the same."""
    names = [group.name for group in CHANNEL_GROUPS]
    start = sum(group.count for group in CHANNEL_GROUPS[: names.index(name)])
    return slice(start, start + CHANNEL_GROUPS[names.index(name)].count)


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """(d1, d0): the second longest and the longest of all axes. Of two axes of equal length the later one counts as longer."""
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])  # stable, like the published argsort
    return order[-2], order[-1]


def accumulator_shapes(
    shape: tuple[int, ...], axes: tuple[int, int] | None, whitened: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shapes of the accumulators of one parameter; all of them start at zero. `axes` is (d1, d0), or None for a vector.

    All have momentum (K, *shape) and second_moment (*shape). Matrices have row (K, *shape without d0) and col (K, *shape without
    d1); vectors have diag (K, *shape). With `whitened` matrices also have whiteners (`celo2.whitening.whitener_shapes`).
    """
    shapes = {"momentum": (3, *shape), "second_moment": tuple(shape)}
    if axes is None:
        return shapes | {"diag": (3, *shape)}
    d1, d0 = axes
    without = lambda axis: tuple(n for i, n in enumerate(shape) if i != axis)  # noqa: E731
    shapes |= {"row": (3, *without(d0)), "col": (3, *without(d1))}
    return shapes | whitener_shapes(shape) if whitened else shapes


def normalized_gradient(g: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Step 0 of a rule with `normalize_gradient`: g in float32, divided by its root mean square over `axes`.

    Zeros stay zero. An infinite element becomes NaN and turns all others into zeros: the clip (step 1) comes too late for it.
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
    """Adafactor's two factors of 1/sqrt(v), (row_factor, col_factor), with the shapes of `row` and `col`."""
    d1, d0 = axes
    d1_in_row = 1 + d1 - (d1 > d0)  # which axis of `row` is the axis d1 of W: K comes first and d0 is missing
    relative = row / (row.mean(d1_in_row, keepdim=True) + FACTOR_EPS)
    return relative.clamp_min(FACTOR_EPS).rsqrt(), col.clamp_min(FACTOR_EPS).rsqrt()


def channels(state: Mapping[str, Tensor], g: Tensor, w: Tensor, axes: tuple[int, int] | None) -> list[Tensor]:
    """Step 5: the input channels, one tensor (count, *shape) for each group."""
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


def step_size_of(rule: Rule, g_square: Tensor, m_square: Tensor) -> Tensor:
    """Step 9 of a rule with step sizes: the RMS of an update, float32 (...).

    Args:
        rule: with `step_exponents`, `step_factor` and `step_bound`.
        g_square: mean square of the clipped gradient (...), one number for each whole matrix or vector.
        m_square: mean square of each momentum (K, ...).

    The step size is step_factor · Π r_k ^ step_exponents_k, but at most step_bound. r_k is RMS(m_k) / RMS(g) divided by n_k =
    sqrt((1 - β_k) / (1 + β_k)), the value of RMS(m_k) / RMS(g) where gradients are independent from step to step. So r_k is n_k
    for gradients that change sign in every step, 1 for noise, and 1 / n_k for constant gradients. r_k is clamped to the range
    n_k .. 1 / n_k; without a gradient it is 1.
    """
    logarithm = torch.zeros_like(g_square)
    for agreement, exponent in zip(agreements(rule, g_square, m_square), rule.step_exponents, strict=True):
        logarithm += exponent * agreement
    return (rule.step_factor * logarithm.exp()).clamp(max=rule.step_bound)


def agreements(rule: Rule, g_square: Tensor, m_square: Tensor) -> list[Tensor]:
    """log(r_k) (...) for each momentum k; `step_size_of` explains r_k and the arguments."""
    found = []
    for square, beta in zip(m_square, rule.momentum_decays, strict=True):
        noise = (1 - beta) / (1 + beta)  # n_k²
        ratio = (square + SQUARE_FLOOR) / (g_square + SQUARE_FLOOR) / noise  # r_k²
        found.append(torch.where(g_square > SQUARE_FLOOR, ratio.clamp(noise, 1 / noise).log() / 2, 0.0))
    return found


def mlp(rule: Rule, x: Tensor) -> Tensor:
    """Step 7: the direction u (*shape) from normalized channels x (F, *shape). Outputs 1 and 2 have no effect."""
    weights = rule.weights
    w0 = torch.cat([weights[name] for name in FIRST_LAYER.values()])[: len(x)]  # (F, H); the channels of a vector come first
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
    """The Celo2 update u (*shape) of one parameter: `W <- W - lr (u + weight_decay W)`; its RMS over a matrix is 1 (step 9).

    Args:
        rule: the learned rule.
        state: accumulators of `accumulator_shapes`, updated in place. Momentum and second_moment of a matrix may be bfloat16 with
            stochastic rounding (`celo2.rounding`). Then state also holds `count`, int32 (), the number of this step, from 1.
        g: gradient, float32 (*shape), one axis or more.
        w: weight, float32 (*shape).
        orthogonalize: whether to do step 8 on parameters with two axes or more; True is Celo2, False is Celo2-base.
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
        u = u.to(ns_dtype)
        if rule.whitening:
            u = whiten_(u, {key: state[key] for key in WHITENERS if key in state}, rule.whitening).to(ns_dtype)
        u = newton_schulz(u).float()
    u = rms_normalized(u, last_two)
    if not rule.has_step_sizes:
        return u
    m = state["momentum"].float()
    return u * step_size_of(rule, g.square().mean(last_two, keepdim=True), m.square().mean(last_two, keepdim=True))
