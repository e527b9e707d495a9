"""Where the elements of a local shard lie in the stack of matrices that a parameter stands for.

Every sharding scheme leaves a rank a contiguous range of the elements of a flattened parameter. `regions` cuts such a range into
the fewest blocks of the stack (N, R, C) that strided views can show, so that nothing is ever copied into the order of the stack.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[int, int, int]]  # see `celo2.layout`
Range = tuple[int, int]  # first index and the one after the last


class Region(NamedTuple):
    """A block of a stack (N, R, C), and where its elements lie in a local shard of the flattened parameter."""

    matrices: slice
    rows: slice
    cols: slice
    size: tuple[int, int, int]  # (n, r, c)
    strides: tuple[int, int, int]  # between its matrices, rows and columns
    offset: int  # of its first element in the local shard

    def of(self, shard: Tensor) -> Tensor:
        """It (n, r, c) in the elements (E,) of the local shard, without a copy."""
        step = shard.stride(-1)
        strides = self.strides if step == 1 else [step * stride for stride in self.strides]
        return shard.as_strided(self.size, strides, shard.storage_offset() + step * self.offset)

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
    """The elements [start, stop) of the flattened parameter of `shape` as regions of its stack (N, R, C), each element once.

    A whole parameter without a layout is one region. A local shard that begins and ends within rows is up to five: the rest of a
    row, the rest of a matrix, whole matrices, whole rows, the beginning of a row.
    """
    if layout is None:
        stack = (math.prod(shape[:-2]), *shape[-2:])
        layout = (stack, (0, 1, 2), stack)
    if start >= stop:
        return []
    axes = merged_axes(layout)
    return [region for box in boxes(layout[0], start, stop) for region in mergeable(layout[0], axes, box, start)]


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
    """The elements [start, stop) of an array of `dims` in row-major order, as boxes of one range for each axis."""
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


def mergeable(split: tuple[int, ...], axes: list[list[int]], box: list[Range], start: int) -> Iterator[Region]:
    """`box` cut until each of its N, R and C is one slice with one stride; the local shard begins at element `start`."""
    steps = [math.prod(split[i + 1 :]) for i in range(len(split))]
    slices, strides = [], []
    for axis in axes:
        long = [i for i in axis if box[i][1] - box[i][0] > 1]
        inner = axis[axis.index(long[0]) + 1 :] if long else []
        full = all(box[i] == (0, split[i]) for i in inner)
        adjacent = all(steps[a] == steps[b] * split[b] for a, b in itertools.pairwise(long))
        if not (full and adjacent):
            for i in range(*box[long[0]]):
                yield from mergeable(split, axes, [(i, i + 1) if j == long[0] else r for j, r in enumerate(box)], start)
            return
        first = 0
        for i in axis:
            first = first * split[i] + box[i][0]
        slices.append(slice(first, first + math.prod(box[i][1] - box[i][0] for i in axis)))
        strides.append(steps[long[-1]] if long else 1)
    size = tuple(s.stop - s.start for s in slices)
    first = sum(r[0] * step for r, step in zip(box, steps, strict=True))
    yield Region(*slices, size, tuple(strides), first - start)
