"""Steps 0 to 7 of the rule for what is no stack of equal matrices, by the reference functions of `celo2.rule`.

These are vectors, which a rule of the variant "celo2-base" updates as well, and matrices whose second moment is factored over the
batch. They are few and small, so all channels exist at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from celo2.layout import Direction, Form, Piece
from celo2.rule import GRADIENT_CLIP, RMS_EPS, SQUARE_FLOOR, Rule, accumulate_, channels, mlp


class Vector(NamedTuple):
    """A vector, or matrices whose second moment is factored over the batch."""

    shape: tuple[int, int, int]  # (N, R, C); of a vector of E elements, over all ranks, (1, 1, E)
    pieces: list[Piece]  # one; momentum and second moment are not used
    g: Tensor  # what is here of the gradient, (..., R, C) or (n,)
    w: Tensor  # the weight, of the same shape
    state: Mapping[str, Tensor]  # accumulators; empty where another rank keeps them
    axes: tuple[int, int] | None  # of the factored second moment; None for a vector


def vector_of(g: Tensor, w: Tensor, state: Mapping[str, Tensor] | None, form: Form) -> Vector:
    """The local shards g and w (contiguous) of a parameter of this form, with its accumulators."""
    n, rows, _ = form.stack
    view = w.shape if form.axes is not None else (-1,)
    g_whole, w_whole = g.view(n, rows, -1), w.view(n, rows, -1)
    # Momentum and second moment of a piece are never read here.
    piece = Piece(g_whole, w_whole, g_whole, g_whole, slice(0, rows), slice(0, w_whole.shape[2]))
    return Vector(form.stack, [piece], g.view(view), w.view(view), state or {}, form.axes)


class VectorPasses:
    """One `Vector` on its way through steps 0 to 7, with the methods of `celo2.step.MatrixPasses`."""

    def __init__(self, vector: Vector) -> None:
        self.vector = vector
        self.last = (-1,) if vector.axes is None else (-2, -1)
        self.numel = vector.shape[1] * vector.shape[2]
        self.g = vector.g.float()

    def gradient_squares(self) -> Tensor:
        """For step 0: the sums of g²."""
        return self.g.square().sum(self.last, keepdim=True)

    def normalize_gradients(self, squares: Tensor) -> None:
        """Step 0, from the complete sums."""
        self.g = self.g * (squares / self.numel + SQUARE_FLOOR).rsqrt()

    def accumulate_(self, rule: Rule) -> Tensor:
        """Steps 1 to 4, which need no sums."""
        self.g = self.g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP)
        accumulate_(self.vector.state, self.g, rule, self.vector.axes)
        return self.g.new_empty(0)

    def move_means_(self, rule: Rule, sums: Tensor) -> None:
        """Nothing is left to do."""

    def square_sums(self, rule: Rule) -> Tensor:
        """Step 5, and for step 6 the sums of the squared channels (F, ...)."""
        self.x = torch.cat(channels(self.vector.state, self.g, self.vector.w.float(), self.vector.axes))
        return self.x.square().sum(self.last, keepdim=True)

    def emit_(self, rule: Rule, square_sums: Tensor, out: Direction) -> None:
        """Steps 6 and 7, from the complete sums."""
        u = mlp(rule, self.x * (square_sums / self.numel + RMS_EPS).rsqrt())
        target = out[0] if isinstance(out, list) else out
        target.copy_(u.view(target.shape))
