"""Cut a range of elements of a flattened parameter into the fewest blocks of its stack (N, R, C) that strided views can show.

Every sharding scheme gives a rank such a range (`celo2.distributed.shard`), and a layout (`celo2.layout`) may store the matrices
in any order. Thanks to these blocks nothing is ever copied into the order of the stack.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[int, int, int]]  # see `celo2.layout`
Range = tuple[int, int]  # [start, stop)
Block = tuple[list[slice], list[int], int]  # slices and strides along N, R and C; position of its first element in the parameter


def cut(layout: Layout, start: int, stop: int) -> Iterator[Block]:
    """The elements [start, stop) as blocks of the stack, each element once.

    A range that begins and ends within rows gives up to five boxes: the rest of a row, the rest of a matrix, whole matrices,
    whole rows, and the beginning of a row.
    """
    if start >= stop:
        return
    axes = merged_axes(layout)
    for box in boxes(layout[0], start, stop):
        yield from strided(layout[0], axes, box)


def merged_axes(layout: Layout) -> list[list[int]]:
    """The axes of `dims` that make up N, R and C. Raises ValueError if `shape` does not merge adjacent permuted axes."""
    dims, order, shape = layout
    left, axes = list(order), []
    for size in shape:
        axis: list[int] = []
        while math.prod(dims[i] for i in axis) < size and left:
            axis.append(left.pop(0))
        if math.prod(dims[i] for i in axis) != size:
            raise ValueError(f"matrices {layout}: {shape} does not merge adjacent axes of {tuple(dims[i] for i in order)}")
        axes.append(axis)
    return axes


def boxes(dims: tuple[int, ...], start: int, stop: int) -> Iterator[list[Range]]:
    """The elements [start, stop) of an array of `dims` in row-major order, as boxes: one range for each axis."""
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


def strided(dims: tuple[int, ...], axes: list[list[int]], box: list[Range]) -> Iterator[Block]:
    """Cut `box` into blocks that are one slice with one stride along each of N, R and C."""
    steps = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    slices, strides = [], []
    for axis in axes:
        long = [i for i in axis if box[i][1] - box[i][0] > 1]
        inner = axis[axis.index(long[0]) + 1 :] if long else []
        full = all(box[i] == (0, dims[i]) for i in inner)
        adjacent = all(steps[a] == steps[b] * dims[b] for a, b in itertools.pairwise(long))
        if not (full and adjacent):
            for i in range(*box[long[0]]):
                yield from strided(dims, axes, [(i, i + 1) if j == long[0] else r for j, r in enumerate(box)])
            return
        first = 0
        for i in axis:
            first = first * dims[i] + box[i][0]
        slices.append(slice(first, first + math.prod(box[i][1] - box[i][0] for i in axis)))
        strides.append(steps[long[-1]] if long else 0)  # 1 would hide from compiled kernels how addresses are aligned
    yield slices, strides, sum(r[0] * step for r, step in zip(box, steps, strict=True))
