"""How one parameter is a stack of matrices.

A layout is a plain tuple `(dims, order, shape)`: `parameter.view(dims).permute(order).reshape(shape)` is the stack (N, R, C)
of matrices. The rule updates each of them as if it were a separate parameter. A layout is needed where a module fuses several
matrices into one parameter (GPT-2's c_attn), stores them transposed (Conv1D) or flattens them (convolutions). Without a layout,
a parameter (..., R, C) is used unchanged as a batch of matrices, and its second moment is factored over its two longest axes.

This file finds once, as a `Form`, which parts of these matrices a rank holds; `celo2.stack` makes views of them in every step.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from celo2.cutting import Layout, cut, merged_axes
from celo2.rule import factored_axes
from celo2.stack import Region


def as_layout(value: Any) -> Layout:
    """`value` as nested tuples of integers (JSON gives lists). Raises ValueError if it is not a layout."""
    try:
        dims, order, shape = (tuple(operator.index(n) for n in part) for part in value)
    except (TypeError, ValueError):
        raise ValueError(f"matrices must be (dims, order, shape), three tuples of integers, not {value!r}") from None
    sizes_agree = len(shape) == 3 and min(*dims, *shape) >= 0 and math.prod(dims) == math.prod(shape)
    if sorted(order) != list(range(len(dims))) or not sizes_agree:
        raise ValueError(f"matrices (dims, order, shape) = {(dims, order, shape)} do not fit together")
    layout = dims, order, (shape[0], shape[1], shape[2])
    if math.prod(dims):
        merged_axes(layout)
    return layout


def stacked_shape(shape: tuple[int, ...], layout: Layout | None) -> tuple[int, ...]:
    """Shape in which the rule sees a parameter of `shape`: the layout's, or without one `shape` itself; (1,) for a scalar."""
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


def is_factored_over_batch(shape: tuple[int, ...], layout: Layout | None) -> bool:
    """Whether the second moment of a stacked `shape` is factored over a batch axis, as for (64, 8, 8) without a layout."""
    axes = stacked_axes(shape, layout)
    return axes is not None and min(axes) < len(shape) - 2


def matrix_count(shape: tuple[int, ...]) -> int:
    """The number of matrices in a stacked `shape` (..., R, C); 0 for a vector."""
    return math.prod(shape[:-2]) if len(shape) >= 2 else 0


def regions(shape: tuple[int, ...], layout: Layout | None, start: int, stop: int) -> list[Region]:
    """The elements [start, stop) of a flattened parameter of `shape` as regions of its stack (N, R, C), each element once."""
    if layout is None:
        n, rows, cols = stack = math.prod(shape[:-2]), shape[-2], shape[-1]
        if stop - start == n * rows * cols > 0:
            return [Region(slice(0, n), slice(0, rows), slice(0, cols), stack, (rows * cols, cols, 1), 0)]
        layout = stack, (0, 1, 2), stack
    found = []
    for (of_n, of_rows, of_cols), (by_n, by_r, by_c), first in cut(layout, start, stop):
        size = of_n.stop - of_n.start, of_rows.stop - of_rows.start, of_cols.stop - of_cols.start
        found.append(Region(of_n, of_rows, of_cols, size, (by_n, by_r, by_c), first - start))
    return found


class Form(NamedTuple):
    """How the rule sees a local shard of a parameter: as a vector, or as whole matrices and parts of matrices."""

    stack: tuple[int, int, int]  # (N, R, C) of the whole parameter; (1, 1, E) for a vector of E elements
    axes: tuple[int, int] | None  # of the factored second moment, in the stacked shape; None for a vector
    by_reference: bool  # `celo2.vectors` updates it: a vector, or a second moment factored over a batch axis
    whole: tuple[tuple[slice, tuple[Region, ...]], ...] = ()  # the matrices that this rank holds whole, with their regions
    split: Mapping[int, tuple[Region, ...]] = {}  # by matrix number: regions here of matrices that other ranks hold parts of


@functools.lru_cache(maxsize=1 << 12)  # the same in every step; computing it again would take a fifth of the host's time
def form_of(shape: tuple[int, ...], layout: Layout | None, start: int, stop: int, alone: bool) -> Form:
    """The form of the elements [start, stop) of a parameter of `shape`; `alone`: no other rank holds a part of the parameter."""
    stacked = stacked_shape(shape, layout)
    axes = stacked_axes(stacked, layout)
    if axes is None:
        return Form((1, 1, math.prod(shape)), None, by_reference=True)
    n_matrices, rows, cols = stack = matrix_count(stacked), stacked[-2], stacked[-1]
    if is_factored_over_batch(stacked, layout):
        return Form(stack, axes, by_reference=True)
    here = regions(shape, layout, start, stop)
    if alone and all(region.matrices == slice(0, n_matrices) for region in here):
        return Form(stack, axes, False, ((slice(0, n_matrices), tuple(here)),))
    whole: list[tuple[slice, tuple[Region, ...]]] = []
    parts: dict[int, tuple[Region, ...]] = defaultdict(tuple)
    for region in here:
        if region.is_full(rows, cols):
            whole.append((region.matrices, (region,)))
        else:
            for n in range(region.matrices.start, region.matrices.stop):
                parts[n] += (region.of_matrix(n),)
    if alone:  # these matrices are in several pieces, but this rank holds all of them
        whole += [(slice(n, n + 1), of_matrix) for n, of_matrix in parts.items()]
        parts = {}
    return Form(stack, axes, False, tuple(whole), parts)


def to_stack(tensor: Tensor, shape: tuple[int, ...], layout: Layout | None) -> Tensor:
    """Copy `tensor` (..., *shape), which has the shape of a whole parameter, into the stacked shape (..., *stacked)."""
    if layout is None:
        return tensor.clone()
    dims, order, stacked = layout
    lead = tensor.shape[: tensor.ndim - len(shape)]
    permuted = tensor.reshape(*lead, *dims).permute(*range(len(lead)), *(len(lead) + axis for axis in order))
    return permuted.reshape(*lead, *stacked).clone()


def from_stack(tensor: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """The inverse of `to_stack`: copy `tensor` (..., *stacked) into the parameter's shape (..., *shape)."""
    dims, order, stacked = layout
    lead = tensor.shape[: tensor.ndim - len(stacked)]
    places = sorted(range(len(order)), key=order.__getitem__)
    split = tensor.reshape(*lead, *(dims[axis] for axis in order))
    return split.permute(*range(len(lead)), *(len(lead) + place for place in places)).reshape(*lead, *shape).clone()
