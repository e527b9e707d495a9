"""Steps 0 to 7 of the rule for parameters that are not stacks of equal matrices, by the reference functions of `celo2.rule`.

These are vectors, which a rule of the variant "celo2-base" updates too, and matrices whose second moment is factored over a
batch axis. They are few and small, so all channels are computed at once.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from celo2.layout import Form
from celo2.rule import GRADIENT_CLIP, RMS_EPS, SQUARE_FLOOR, Rule, accumulate_, channels, mlp, place_of, step_size_of
from celo2.stack import Direction, Gate, Piece


class Vector(NamedTuple):
    """A vector, or matrices whose second moment is factored over a batch axis."""

    shape: tuple[int, int, int]  # (N, R, C); for a vector of E elements over all ranks (1, 1, E)
    pieces: list[Piece]  # a single one; its momentum and second moment are not used
    g: Tensor  # this rank's part of the gradient, (..., R, C) or (n,)
    w: Tensor  # this rank's part of the weight, of the same shape
    state: Mapping[str, Tensor]  # accumulators; empty if another rank keeps them
    axes: tuple[int, int] | None  # (d1, d0) of the factored second moment; None for a vector
    step_size: Tensor | None = None  # (N,), float32, filled during steps 0 to 7, for a rule with step sizes


def vector_of(g: Tensor, w: Tensor, state: Mapping[str, Tensor] | None, form: Form) -> Vector:
    """A `Vector` of the contiguous local shards g and w of a parameter of this form, with its accumulators."""
    n, rows, _ = form.stack
    view = w.shape if form.axes is not None else (-1,)
    g_whole, w_whole = g.view(n, rows, -1), w.view(n, rows, -1)
    # Momentum and second moment of a piece are never read here.
    piece = Piece(g_whole, w_whole, g_whole, g_whole, slice(0, rows), slice(0, w_whole.shape[2]))
    return Vector(form.stack, [piece], g.view(view), w.view(view), state or {}, form.axes)


def vector_steps(vector: Vector, out: Direction | None, rule: Rule, gate: Gate | None) -> Generator[Tensor, Tensor, None]:
    """Steps 0 to 7 of one `Vector`, a generator like `celo2.step.matrix_steps`."""
    last, numel = (-1,) if vector.axes is None else (-2, -1), vector.shape[1] * vector.shape[2]
    g = vector.g.float()
    if rule.normalize_gradient:
        squares = yield g.square().sum(last, keepdim=True)
        g = g * (squares / numel + SQUARE_FLOOR).rsqrt()
    if gate is not None:
        g = torch.where(gate.taken > 0, g, 0.0)
    g = g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP)
    before = {} if gate is None else {name: value.clone() for name, value in vector.state.items()}
    accumulate_(vector.state, g, rule, vector.axes)
    if gate is not None:
        for name, value in vector.state.items():
            value.copy_(torch.where(gate.taken > 0, value, before[name]))
    yield g.new_empty(0)  # step 4 needs no sums
    if out is None:
        return
    x = torch.cat(channels(vector.state, g, vector.w.float(), vector.axes))  # (F, ...)
    squares = yield x.square().sum(last, keepdim=True)
    if vector.step_size is not None:
        means = squares.flatten(1) / numel  # (F, N)
        vector.step_size.copy_(step_size_of(rule, means[place_of("gradient")][0], means[place_of("momentum")]))
    u = mlp(rule, x * (squares / numel + RMS_EPS).rsqrt())
    target = out[0] if isinstance(out, list) else out
    target.copy_(u.view(target.shape))
