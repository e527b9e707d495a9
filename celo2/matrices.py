"""How one parameter is a stack of matrices.

A layout is a plain tuple `(split, order, shape)`: `parameter.view(split).permute(order).reshape(shape)` is the stack (N, R, C)
of matrices that the rule updates, each as if it were a parameter of its own. It is needed where a module fuses several
matrices in one parameter (GPT-2's c_attn), stores them transposed (Conv1D) or flattens them (convolutions). Without a layout,
a parameter (..., R, C) is a batch of matrices as it stands, and its second moment is factored over its two longest axes.
"""

from __future__ import annotations

import math
import operator

from torch import Tensor

from celo2.rule import factored_axes

Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[int, int, int]]


def as_layout(value: object) -> Layout:
    """`value` as nested tuples of integers (JSON gives lists); ValueError if it is not a layout."""
    try:
        split, order, shape = (tuple(operator.index(n) for n in part) for part in value)
    except (TypeError, ValueError):
        raise ValueError(f"matrices must be (split, order, shape), three tuples of integers, not {value!r}") from None
    if (
        sorted(order) != list(range(len(split)))
        or len(shape) != 3
        or min(*split, *shape) < 0
        or math.prod(split) != math.prod(shape)
    ):
        raise ValueError(f"matrices (split, order, shape) = {(split, order, shape)} do not fit together")
    return split, order, shape


def stacked_shape(shape: tuple[int, ...], layout: Layout | None) -> tuple[int, ...]:
    """Shape in which the rule sees a parameter of `shape`: the layout's, or the parameter's own (a scalar as a vector)."""
    if layout is not None:
        return layout[2]
    return tuple(shape) or (1,)


def stacked_axes(shape: tuple[int, ...], layout: Layout | None) -> tuple[int, int] | None:
    """Axes (d1, d0) of the factored second moment for a stacked `shape`; None for a vector."""
    if len(shape) < 2:
        return None
    if layout is None:
        return factored_axes(shape)
    d1, d0 = factored_axes(shape[-2:])
    return d1 + 1, d0 + 1


def stack(tensor: Tensor, layout: Layout | None) -> Tensor:
    """`tensor` in its stacked shape: a view where strides allow, else a copy."""
    if layout is None:
        return tensor if tensor.ndim else tensor.view(1)
    split, order, shape = layout
    return tensor.reshape(split).permute(order).reshape(shape)


def unstack_(tensor: Tensor, stacked: Tensor, layout: Layout | None) -> None:
    """Write `stacked` back into `tensor`; nothing to do where `stack` gave a view of it."""
    if stacked.data_ptr() == tensor.data_ptr() and stacked.dtype == tensor.dtype:
        return
    if layout is None:
        tensor.copy_(stacked.view_as(tensor))
        return
    split, order, _ = layout
    inverse = sorted(range(len(order)), key=order.__getitem__)
    tensor.copy_(stacked.reshape([split[axis] for axis in order]).permute(inverse).reshape(tensor.shape))


def matrix_count(shape: tuple[int, ...]) -> int:
    """Matrices in a stacked `shape` (..., R, C); a vector has none."""
    return math.prod(shape[:-2]) if len(shape) >= 2 else 0
