"""How one parameter is a stack of matrices, and where the elements of a part of it lie.

A layout is a plain tuple `(split, order, shape)`: `parameter.view(split).permute(order).reshape(shape)` is the stack (N, R, C)
of matrices that the rule updates, each as if it were a parameter of its own. It is needed where a module fuses several
matrices in one parameter (GPT-2's c_attn), stores them transposed (Conv1D) or flattens them (convolutions). Without a layout,
a parameter (..., R, C) is a batch of matrices as it stands, and its second moment is factored over its two longest axes.

Nothing is ever copied into the order of the stack: `regions` names the strided views of the parameter's own elements that
make it up. A run of those elements, which is what sharding leaves on a rank, is made up of such views as well.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from celo2.rule import factored_axes

Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[int, int, int]]
Range = tuple[int, int]  # first index and the one after the last


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


def matrix_count(shape: tuple[int, ...]) -> int:
    """Matrices in a stacked `shape` (..., R, C); a vector has none."""
    return math.prod(shape[:-2]) if len(shape) >= 2 else 0


class Region(NamedTuple):
    """A block of a stack (N, R, C), and where its elements lie in the flattened parameter."""

    matrices: slice
    rows: slice
    cols: slice
    offset: int  # of its first element
    strides: tuple[int, int, int]  # between its matrices, rows and columns

    def view(self, run: Tensor, start: int) -> Tensor:
        """The region (..., n, r, c) in `run` (..., E), which holds the E elements of the flattened parameter from `start` on."""
        size = [s.stop - s.start for s in (self.matrices, self.rows, self.cols)]
        unit = run.stride(-1)
        strides = [*run.stride()[:-1], *(unit * stride for stride in self.strides)]
        return run.as_strided([*run.shape[:-1], *size], strides, run.storage_offset() + unit * (self.offset - start))

    def of_matrix(self, n: int) -> Region:
        """The part of it in matrix `n` of the stack."""
        return self._replace(matrices=slice(n, n + 1), offset=self.offset + (n - self.matrices.start) * self.strides[0])


def regions(shape: tuple[int, ...], layout: Layout | None, start: int, stop: int) -> list[Region]:
    """What the elements [start, stop) of the flattened parameter of `shape` are in its stack (N, R, C), each exactly once.

    A whole parameter without a layout is one region. A run that begins and ends within rows is up to five: the rest of a
    row, the rest of a matrix, whole matrices, whole rows, the beginning of a row.
    """
    if layout is None:
        stack = (math.prod(shape[:-2]), *shape[-2:])
        layout = (stack, (0, 1, 2), stack)
    if start >= stop:
        return []
    axes = merged_axes(layout)
    return [region for box in boxes(layout[0], start, stop) for region in mergeable(layout[0], axes, box)]


def to_stack(tensor: Tensor, shape: tuple[int, ...], layout: Layout | None) -> Tensor:
    """A copy of `tensor` (..., *shape), elements of a whole parameter of `shape`, in its stacked shape (..., *stacked)."""
    if layout is None:
        return tensor.clone()
    lead = tensor.shape[: tensor.ndim - len(shape)]
    stack = tensor.new_empty(*lead, *layout[2])
    run = tensor.reshape(*lead, -1)
    for region in regions(shape, layout, 0, math.prod(shape)):
        stack[..., region.matrices, region.rows, region.cols] = region.view(run, 0)
    return stack


def merged_axes(layout: Layout) -> list[list[int]]:
    """Which axes of `split` make up N, R and C; ValueError where `shape` is not a merging of adjacent permuted axes."""
    split, order, shape = layout
    left, axes = list(order), []
    for size in shape:
        axis: list[int] = []
        while math.prod(split[i] for i in axis) < size and left:
            axis.append(left.pop(0))
        if math.prod(split[i] for i in axis) != size:
            raise ValueError(f"matrices {layout}: {shape} does not merge adjacent axes of {tuple(split[i] for i in order)}")
        axes.append(axis)
    return axes


def boxes(dims: tuple[int, ...], start: int, stop: int) -> Iterator[list[Range]]:
    """The run [start, stop) of the elements of an array of `dims` in row-major order, as boxes of one range for each axis."""
    if start >= stop:
        return
    if not dims:
        yield []
        return
    inner = math.prod(dims[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        yield from ([(first, first + 1), *box] for box in boxes(dims[1:], head, tail))
        return
    if head:
        yield from ([(first, first + 1), *box] for box in boxes(dims[1:], head, inner))
        first += 1
    if first < last:
        yield [(first, last), *((0, n) for n in dims[1:])]
    yield from ([(last, last + 1), *box] for box in boxes(dims[1:], 0, tail))


def mergeable(split: tuple[int, ...], axes: list[list[int]], box: list[Range]) -> Iterator[Region]:
    """`box` cut until each of its N, R and C is one slice with one stride."""
    steps = [math.prod(split[i + 1 :]) for i in range(len(split))]
    slices, strides = [], []
    for axis in axes:
        long = [i for i in axis if box[i][1] - box[i][0] > 1]
        inner = axis[axis.index(long[0]) + 1 :] if long else []
        full = all(box[i] == (0, split[i]) for i in inner)
        adjacent = all(steps[a] == steps[b] * split[b] for a, b in itertools.pairwise(long))
        if not (full and adjacent):
            for i in range(*box[long[0]]):
                yield from mergeable(split, axes, [(i, i + 1) if j == long[0] else r for j, r in enumerate(box)])
            return
        first = 0
        for i in axis:
            first = first * split[i] + box[i][0]
        slices.append(slice(first, first + math.prod(box[i][1] - box[i][0] for i in axis)))
        strides.append(steps[long[-1]] if long else 1)
    yield Region(*slices, sum(r[0] * step for r, step in zip(box, steps, strict=True)), tuple(strides))
