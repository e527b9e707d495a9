"""How one parameter is a stack of matrices.

A layout is a plain tuple `(split, order, shape)`: `parameter.view(split).permute(order).reshape(shape)` is the stack (N, R, C)
of matrices that the rule updates, each as if it were a parameter of its own. It is needed where a module fuses several
matrices in one parameter (GPT-2's c_attn), stores them transposed (Conv1D) or flattens them (convolutions). Without a layout,
a parameter (..., R, C) is a batch of matrices as it stands, and its second moment is factored over its two longest axes.

In a step, a `Stack` holds equal matrices as views of gradient, weight and accumulators: what the passes of the rule work on.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from celo2.cutting import Layout, cut, merged_axes
from celo2.rule import factored_axes


def as_layout(value: Any) -> Layout:
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
    if math.prod(split):
        merged_axes((split, order, shape))
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


def is_factored_over_batch(shape: tuple[int, ...], layout: Layout | None) -> bool:
    """Whether the second moment of a stacked `shape` is factored over a batch axis, as of a (64, 8, 8) without a layout."""
    axes = stacked_axes(shape, layout)
    return axes is not None and min(axes) < len(shape) - 2


def matrix_count(shape: tuple[int, ...]) -> int:
    """Matrices in a stacked `shape` (..., R, C); a vector has none."""
    return math.prod(shape[:-2]) if len(shape) >= 2 else 0


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, without importing its module."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """What of `tensor` is on this rank, sharing its memory: a DTensor's local shard, any other tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


class Region(NamedTuple):
    """A block of a stack (N, R, C), and where its elements lie in a local shard of the flattened parameter."""

    matrices: slice
    rows: slice
    cols: slice
    size: tuple[int, int, int]  # (n, r, c)
    strides: tuple[int, int, int]  # between its matrices, rows and columns
    offset: int  # of its first element in the local shard

    def of(self, shard: Tensor) -> Tensor:
        """It (n, r, c) in the elements of the local shard, contiguous and of any shape, without a copy.

        The strides of `shard` say nothing: an axis of size 1 may have any and be contiguous.
        """
        return shard.as_strided(self.size, self.strides, shard.storage_offset() + self.offset)

    def of_each(self, shards: Tensor) -> Tensor:
        """It (n, K, r, c) in K tensors (K, E) of the local shard's elements, each contiguous."""
        (n, *size), (by_n, *strides) = self.size, self.strides
        return shards.as_strided(
            (n, len(shards), *size), (by_n, shards.stride(0), *strides), shards.storage_offset() + self.offset
        )

    def is_full(self, rows: int, cols: int) -> bool:
        """Whether it holds whole matrices of this size."""
        return self.size[1:] == (rows, cols)

    def of_matrix(self, n: int) -> Region:
        """The part of it in matrix `n` of the stack."""
        offset = self.offset + (n - self.matrices.start) * self.strides[0]
        return self._replace(matrices=slice(n, n + 1), size=(1, *self.size[1:]), offset=offset)


def regions(shape: tuple[int, ...], layout: Layout | None, start: int, stop: int) -> list[Region]:
    """The elements [start, stop) of the flattened parameter of `shape` as regions of its stack (N, R, C), each element once."""
    if start >= stop:
        return []
    if layout is None:
        n, rows, cols = math.prod(shape[:-2]), *shape[-2:]
        if stop - start == n * rows * cols:
            return [Region(slice(0, n), slice(0, rows), slice(0, cols), (n, rows, cols), (rows * cols, cols, 1), 0)]
        layout = ((n, rows, cols), (0, 1, 2), (n, rows, cols))
    found = []
    for (matrices, rows_of, cols_of), (by_n, by_r, by_c), first in cut(layout, start, stop):
        n, r, c = (s.stop - s.start for s in (matrices, rows_of, cols_of))
        found.append(Region(matrices, rows_of, cols_of, (n, r, c), (by_n, by_r, by_c), first - start))
    return found


class Form(NamedTuple):
    """What a local shard of a parameter is to the rule."""

    stack: tuple[int, int, int]  # (N, R, C) of the whole parameter; of a vector of E elements (1, 1, E)
    axes: tuple[int, int] | None  # of the factored second moment, in the stacked shape; None for a vector
    by_reference: bool  # `celo2.vectors` updates it: a vector, or a second moment factored over the batch
    whole: tuple[tuple[slice, tuple[Region, ...]], ...] = ()  # equal matrices that lie whole here: which ones, and their regions
    split: Mapping[int, tuple[Region, ...]] = {}  # regions of matrices that other ranks hold parts of, by number


@functools.lru_cache(maxsize=1 << 12)  # the same numbers in every step: computed again they take a fifth of the host's time
def form_of(shape: tuple[int, ...], layout: Layout | None, start: int, stop: int, alone: bool) -> Form:
    """The form of the elements [start, stop) of a parameter of `shape`; `alone`: no other rank holds a part of it."""
    stacked = stacked_shape(shape, layout)
    axes = stacked_axes(stacked, layout)
    if axes is None:
        return Form((1, 1, math.prod(shape)), None, by_reference=True)
    n_matrices, rows, cols = matrix_count(stacked), *stacked[-2:]
    stack = n_matrices, rows, cols
    if is_factored_over_batch(stacked, layout):
        return Form(stack, axes, by_reference=True)
    here = regions(shape, layout, start, stop)
    if alone and all(region.matrices == slice(0, n_matrices) for region in here):
        return Form(stack, axes, False, ((slice(0, n_matrices), tuple(here)),))
    whole = []
    parts: dict[int, list[Region]] = {}
    for region in here:
        if region.is_full(rows, cols):
            whole.append((region.matrices, (region,)))
        else:
            for n in range(region.matrices.start, region.matrices.stop):
                parts.setdefault(n, []).append(region.of_matrix(n))
    cut = {n: tuple(of_matrix) for n, of_matrix in parts.items()}
    if alone:  # in pieces, but all of them are here
        return Form(stack, axes, False, (*whole, *((slice(n, n + 1), of_matrix) for n, of_matrix in cut.items())))
    return Form(stack, axes, False, tuple(whole), cut)


def to_stack(tensor: Tensor, shape: tuple[int, ...], layout: Layout | None) -> Tensor:
    """A copy of `tensor` (..., *shape), elements of a whole parameter of `shape`, in its stacked shape (..., *stacked)."""
    if layout is None:
        return tensor.clone()
    split, order, stacked = layout
    lead = tensor.shape[: tensor.ndim - len(shape)]
    permuted = tensor.reshape(*lead, *split).permute(*range(len(lead)), *(len(lead) + axis for axis in order))
    return permuted.reshape(*lead, *stacked).clone()


Direction = Tensor | list[Tensor]  # of whole matrices (N, R, C); of what is here of a split one, a tensor (1, r, c) a piece


class Piece(NamedTuple):
    """A part of N equal matrices: some of their rows and columns, the same ones of every matrix."""

    g: Tensor  # gradient (N, r, c), any float dtype, before clipping
    w: Tensor  # weight (N, r, c), any float dtype
    m: Tensor  # momenta (N, K, r, c), float32 or bfloat16
    v: Tensor  # second moment (N, r, c), like m
    rows: slice  # which of the R rows
    cols: slice  # which of the C columns


@dataclass(frozen=True)
class Stack:
    """N equal matrices with their accumulators: whole, or those pieces of them that are here.

    `row` holds the means over the longer axis of a matrix, `col` the means over the shorter one, so that `row` runs along
    the R rows, except where R > C: there it runs along the C columns.
    """

    shape: tuple[int, int, int]  # (N, R, C)
    pieces: Sequence[Piece]
    row: Tensor  # (N, K, R), or (N, K, C) where R > C, float32
    col: Tensor  # (N, K, C), or (N, K, R) where R > C, float32
    count: Tensor | None = None  # int32 (N,), the number of this step for each matrix; None where m and v are float32
    scale: Tensor | None = None  # (N,), 1 / RMS of the gradient, for a rule that normalizes it


def whole(g: Tensor, w: Tensor, m: Tensor, v: Tensor, row: Tensor, col: Tensor, count: Tensor | None = None) -> Stack:
    """A stack of matrices that lie in one piece: g, w, v (N, R, C), m (N, K, R, C), row, col and count as in `Stack`."""
    n, rows, cols = g.shape
    return Stack((n, rows, cols), [Piece(g, w, m, v, slice(0, rows), slice(0, cols))], row, col, count)


def stack_of(
    g: Tensor, w: Tensor, state: Mapping[str, Tensor] | None, shape: tuple[int, int, int], which: slice, regions: Sequence[Region]
) -> Stack:
    """The matrices `which` of the stack of `shape` (N, R, C), of which `regions` are here, in contiguous local shards g and w."""
    n, (total, rows, cols) = which.stop - which.start, shape
    if state is None:  # kept by another rank: of the right shape, without memory, and never read
        zero = torch.zeros((), device=w.device)
        pieces = [Piece(r.of(g), r.of(w), zero.expand(n, 3, *r.size[1:]), zero.expand(r.size), r.rows, r.cols) for r in regions]
        return Stack((n, rows, cols), pieces, zero.expand(n, 3, min(rows, cols)), zero.expand(n, 3, max(rows, cols)))
    m, v = state["momentum"].view(3, -1), state["second_moment"].view(-1)
    pieces = [Piece(r.of(g), r.of(w), r.of_each(m), r.of(v), r.rows, r.cols) for r in regions]
    row, col = (state[name].view(3, total, -1).transpose(0, 1) for name in ("row", "col"))
    if n < total:
        row, col = row[which], col[which]
    return Stack((n, rows, cols), pieces, row, col, state["count"].expand(n) if "count" in state else None)


def part_of(stack: Stack, part: slice) -> Stack:
    """The matrices `part` of a stack."""
    _, rows, cols = stack.shape
    pieces = [Piece(p.g[part], p.w[part], p.m[part], p.v[part], p.rows, p.cols) for p in stack.pieces]
    count = None if stack.count is None else stack.count[part]
    return Stack((part.stop - part.start, rows, cols), pieces, stack.row[part], stack.col[part], count)


def gathered(stacks: Sequence[Stack], elements: bool) -> Stack:
    """One stack of copies of stacks whose matrices lie in one piece; without `elements`, of their means alone."""
    _, rows, cols = stacks[0].shape
    pieces = []
    if elements:
        g, w, m, v = (torch.cat(tensors) for tensors in zip(*(stack.pieces[0][:4] for stack in stacks), strict=True))
        pieces = [Piece(g, w, m, v, slice(0, rows), slice(0, cols))]
    counts = [stack.count for stack in stacks if stack.count is not None]
    row, col = torch.cat([stack.row for stack in stacks]), torch.cat([stack.col for stack in stacks])
    return Stack((len(row), rows, cols), pieces, row, col, torch.cat(counts) if counts else None)


def scatter_(together: Stack, stacks: Sequence[Stack]) -> None:
    """Copy accumulators that were `gathered` back to where they belong."""
    moved = [(together.row, [s.row for s in stacks]), (together.col, [s.col for s in stacks])]
    for piece in together.pieces:
        moved += [(piece.m, [s.pieces[0].m for s in stacks]), (piece.v, [s.pieces[0].v for s in stacks])]
    for new, own in moved:
        torch._foreach_copy_(own, list(new.split([s.shape[0] for s in stacks])))
