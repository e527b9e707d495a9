"""What one step has to do on this rank: whole matrices, odd parameters, and matrices that are split over ranks."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from celo2 import layout as matrices
from celo2.backend import Backend, Options, apply_, backend
from celo2.blocked import Piece, Stack, batches, move_means_, normalized
from celo2.distributed.collectives import broadcast_
from celo2.distributed.shard import LocalShard, local
from celo2.layout import Layout, Region
from celo2.replicas import Replicas
from celo2.rule import RMS_EPS, Rule, update
from celo2.sharded import Part, Split, SplitMatrix, VectorPart, batch_elements, is_full


@dataclass
class Context:
    """What the update of every matrix needs besides the matrix."""

    rule: Rule  # on the device of the matrices
    ns_dtype: torch.dtype
    replicas: Replicas | None

    @property
    def backend(self) -> Backend:
        """The passes of the rule on the device of the matrices."""
        return backend(self.rule.weights["b0"].device)


@dataclass
class Whole:
    """Equal matrices of one parameter, whole on this rank."""

    stack: Stack
    options: Options
    orthogonalize: bool
    owner: int | None  # among replicas


@dataclass
class Odd:
    """A vector, or a batch of matrices whose second moment is factored over a batch axis: whole, and updated by the reference."""

    w: Tensor
    g: Tensor
    state: dict[str, Tensor] | None
    axes: tuple[int, int] | None
    options: Options
    orthogonalize: bool
    owner: int | None


@dataclass
class Work:
    """Everything that the rule has to update on one device in one step."""

    whole: list[Whole] = field(default_factory=list)
    odd: list[Odd] = field(default_factory=list)
    splits: dict[dist.ProcessGroup, Split] = field(default_factory=dict)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (weight that is not contiguous, the run to copy back)

    def add(
        self,
        p: Tensor,
        state: dict[str, Tensor] | None,
        local_shard: LocalShard,
        options: Options,
        orthogonalize: bool,
        split: dict[int, SplitMatrix],
        owner: int | None,
    ) -> None:
        """Add what is here of `p`; `split`: its matrices that no rank holds whole; `state`: None where another rank keeps it."""
        form = form_of(local_shard.shape, options["matrices"], local_shard.start, local_shard.stop, local_shard.whole)
        w, g = local(p).detach(), local(p.grad)
        if form.odd:
            w, g = (w, g) if w.ndim else (w.view(1), g.view(1))
            self.odd.append(Odd(w, g, state, form.axes, options, orthogonalize, owner))
            return
        g, run = g.contiguous(), w.contiguous()
        if run is not w:
            self.copies.append((w, run))
        if form.axes is None:
            self.split(local_shard).vectors.append(
                VectorPart(g.view(-1), run.view(-1), state, math.prod(local_shard.shape), options)
            )
            return
        for which, places in form.whole:
            self.whole.append(Whole(stack_of(g, run, state, form.stack, which, places), options, orthogonalize, owner))
        me = None if local_shard.whole else dist.get_rank(local_shard.group)
        for n, matrix in split.items():
            places = [place_of(region, local_shard.start) for region in matrix.held[me]]
            stack = stack_of(g, run, state, form.stack, slice(n, n + 1), places)
            self.split(local_shard).parts.append(Part(matrix, stack, options, orthogonalize))

    def split(self, local_shard: LocalShard) -> Split:
        """The work that the ranks of the local shard's group do together."""
        return self.splits.setdefault(local_shard.group, Split(local_shard.group))

    def do(self, context: Context) -> int:
        """Update everything; returns how many matrices this rank has orthogonalized."""
        with torch.cuda.device_of(context.rule.weights["b0"]):  # kernels start on the current device
            return self._do(context)

    def _do(self, context: Context) -> int:
        count = update_whole(self.whole, context)
        for odd in self.odd:
            count += update_odd(odd, context)
        for split in self.splits.values():
            split.update(context.rule, context.ns_dtype, context.backend)
            count += sum(part.orthogonalize and part.matrix.owner == dist.get_rank(split.group) for part in split.parts)
        for w, run in self.copies:
            w.copy_(run)
        return count


class Place(NamedTuple):
    """Where a part of equal matrices lies in the run of a parameter: a region as `as_strided` takes it."""

    rows: slice
    cols: slice
    size: tuple[int, int, int]  # (n, r, c)
    strides: tuple[int, int, int]
    offset: int

    def of(self, run: Tensor) -> Tensor:
        """It (n, r, c) in a contiguous run."""
        return run.as_strided(self.size, self.strides, run.storage_offset() + self.offset)

    def of_each(self, runs: Tensor) -> Tensor:
        """It (n, K, r, c) in K contiguous runs, one after the other."""
        (n, *size), (by_n, *strides) = self.size, self.strides
        return runs.as_strided((n, len(runs), *size), (by_n, runs.stride(0), *strides), runs.storage_offset() + self.offset)


def place_of(region: Region, start: int) -> Place:
    """The place of a region in the run that begins with element `start` of the parameter."""
    size = tuple(s.stop - s.start for s in (region.matrices, region.rows, region.cols))
    return Place(region.rows, region.cols, size, region.strides, region.offset - start)


class Form(NamedTuple):
    """What a run of a parameter is to the rule."""

    stack: tuple[int, int, int]  # (N, R, C); of a vector (0, 0, 0)
    axes: tuple[int, int] | None  # of the factored second moment, in the stacked shape
    odd: bool  # whole, but not matrices one by one
    whole: tuple[tuple[slice, tuple[Place, ...]], ...]  # equal matrices that are whole here: which ones, and where they lie


@functools.lru_cache(maxsize=1 << 12)  # the same numbers in every step; worked out anew they take a fifth of the host's time
def form_of(shape: tuple[int, ...], layout: Layout | None, start: int, stop: int, alone: bool) -> Form:
    """The form of the elements [start, stop) of a parameter of `shape`; `alone`: no other rank holds a part of it."""
    stacked = matrices.stacked_shape(shape, layout)
    axes = matrices.stacked_axes(stacked, layout)
    if axes is None:
        return Form((0, 0, 0), None, alone, ())
    n_matrices, rows, cols = stack = (matrices.matrix_count(stacked), *stacked[-2:])
    if alone and min(axes) < len(stacked) - 2:
        return Form(stack, axes, True, ())
    held = matrices.regions(shape, layout, start, stop)
    if not alone:
        whole = [(r.matrices, [r]) for r in held if is_full(r, rows, cols)]
    elif all(r.matrices == slice(0, n_matrices) for r in held):
        whole = [(slice(0, n_matrices), held)]
    else:  # matrix by matrix
        single = [r.of_matrix(n) for r in held for n in range(r.matrices.start, r.matrices.stop)]
        whole = [(slice(n, n + 1), [r for r in single if r.matrices.start == n]) for n in range(n_matrices)]
    return Form(stack, axes, False, tuple((which, tuple(place_of(r, start) for r in parts)) for which, parts in whole))


def stack_of(
    g: Tensor, w: Tensor, state: dict[str, Tensor] | None, shape: tuple[int, int, int], which: slice, places: Iterable[Place]
) -> Stack:
    """The matrices `which` of the stack of `shape` (N, R, C), of which `places` are here, in the contiguous runs g and w (E,)."""
    n, (total, rows, cols) = which.stop - which.start, shape
    if state is None:  # kept by another rank: of the right shape, without memory, and never read
        nothing = torch.zeros((), device=w.device)
        pieces = [
            Piece(p.of(g), p.of(w), nothing.expand(n, 3, *p.size[1:]), nothing.expand(p.size), p.rows, p.cols) for p in places
        ]
        return Stack((n, rows, cols), pieces, nothing.expand(n, 3, min(rows, cols)), nothing.expand(n, 3, max(rows, cols)))
    m, v = state["momentum"].view(3, -1), state["second_moment"].view(-1)
    pieces = [Piece(p.of(g), p.of(w), p.of_each(m), p.of(v), p.rows, p.cols) for p in places]
    row, col = state["row"].view(3, total, -1).transpose(0, 1), state["col"].view(3, total, -1).transpose(0, 1)
    if n < total:
        row, col = row[which], col[which]
    return Stack((n, rows, cols), pieces, row, col, state["count"].expand(n) if "count" in state else None)


def update_whole(items: list[Whole], context: Context) -> int:
    """Steps 0 to 10 on whole matrices, those of one shape together; -> how many this rank has orthogonalized.

    Replicas work on their own matrices first, then everybody sends its results round.
    """
    replicas, count = context.replicas, 0
    if replicas is None:
        for batch in batched(items):
            count += apply_directions(batch, directions(batch, context), context)
        return count
    mine: list[Tensor] = []
    for owner in range(replicas.world):
        for batch in batched([item for item in items if item.owner == owner]):
            if owner == replicas.rank:
                mine.append(directions(batch, context).contiguous())
            elif not replicas.shard_state:
                for stack in normalized(context.rule, [stack for _, stack in batch]):
                    move_means_(context.rule, stack, context.backend.accumulate_(context.rule, stack))
    results = iter(mine)
    for owner in range(replicas.world):
        for batch in batched([item for item in items if item.owner == owner]):
            u = next(results) if owner == replicas.rank else empty_directions(batch, context)
            broadcast_(u, owner, replicas.group)
            n = apply_directions(batch, u, context)
            count += n if owner == replicas.rank else 0
    return count


Batch = list[tuple[Whole, Stack]]  # matrices of one shape: what they belong to, and the part of its stack


def batched(items: list[Whole]) -> Iterator[Batch]:
    """All matrices of `items`, those of one shape together, in batches of at most `batch_elements` or one matrix."""
    buckets: dict[tuple, list[Whole]] = defaultdict(list)
    for item in items:
        buckets[(*item.stack.shape[1:], item.orthogonalize)].append(item)
    for (rows, cols, _), bucket in buckets.items():
        limit = batch_elements(bucket[0].stack.row.device) // (rows * cols)
        for batch in batches([item.stack for item in bucket], max(1, limit)):
            yield [(bucket[i], stack) for i, stack in batch]


def empty_directions(batch: Batch, context: Context) -> Tensor:
    """Room for the directions (N, R, C) of a batch."""
    item, stack = batch[0]
    n = sum(stack.shape[0] for _, stack in batch)
    dtype = context.ns_dtype if item.orthogonalize else torch.float32
    return torch.empty(n, *stack.shape[1:], dtype=dtype, device=stack.row.device)


def directions(batch: Batch, context: Context) -> Tensor:
    """Steps 0 to 8: the orthogonalized directions (N, R, C), not yet of RMS 1."""
    u = empty_directions(batch, context)
    context.backend.directions_(context.rule, normalized(context.rule, [stack for _, stack in batch]), u)
    return context.backend.newton_schulz(u) if batch[0][0].orthogonalize else u


def apply_directions(batch: Batch, u: Tensor, context: Context) -> int:
    """Steps 9 and 10; -> how many matrices were orthogonalized."""
    n, rows, cols = u.shape
    norm = torch.linalg.vector_norm(u, dim=(1, 2), keepdim=True, dtype=torch.float32)  # (N, 1, 1)
    scale = (norm.square() / (rows * cols) + RMS_EPS).rsqrt()
    counts = [stack.shape[0] for _, stack in batch]
    for (item, stack), n_u, n_scale in zip(batch, u.split(counts), scale.split(counts), strict=True):
        for piece in stack.pieces:
            context.backend.apply_(piece.w, n_u[:, piece.rows, piece.cols], n_scale, item.options)
    return n if batch[0][0].orthogonalize else 0


def update_odd(odd: Odd, context: Context) -> int:
    """The reference path; -> how many matrices this rank has orthogonalized."""
    replicas = context.replicas
    alone = replicas is None or not replicas.shard_state or odd.owner == replicas.rank
    u = torch.empty(odd.w.shape, device=odd.w.device)
    if alone:
        options = {"orthogonalize": odd.orthogonalize, "ns_dtype": context.ns_dtype, "axes": odd.axes}
        u = update(context.rule, odd.state, odd.g.float(), odd.w.float(), **options)
    if replicas is not None and replicas.shard_state:
        broadcast_(u, odd.owner, replicas.group)
    apply_(odd.w, u, 1.0, odd.options)
    counts = alone and (replicas is None or odd.owner == replicas.rank) and odd.orthogonalize
    return matrices.matrix_count(tuple(odd.w.shape)) if counts else 0
