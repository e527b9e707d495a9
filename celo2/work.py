"""What one step has to do on this rank: whole matrices, odd parameters, and matrices that are split over ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from celo2 import matrices
from celo2.backend import Backend, Options, apply_, backend
from celo2.blocked import Piece, Stack, batches, move_means_, normalized
from celo2.exchange import broadcast_
from celo2.fragment import Fragment, local
from celo2.matrices import Region
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
        fragment: Fragment,
        options: Options,
        orthogonalize: bool,
        split: dict[int, SplitMatrix],
        owner: int | None,
    ) -> None:
        """Add what is here of `p`; `split`: its matrices that no rank holds whole; `state`: None where another rank keeps it."""
        layout = options["matrices"]
        shape = matrices.stacked_shape(fragment.shape, layout)
        axes = matrices.stacked_axes(shape, layout)
        w, g = local(p).detach(), local(p.grad)
        if fragment.whole and (axes is None or min(axes) < len(shape) - 2):
            w, g = (w, g) if w.ndim else (w.view(1), g.view(1))
            self.odd.append(Odd(w, g, state, axes, options, orthogonalize, owner))
            return
        run = w.contiguous().view(-1)
        if not w.is_contiguous():
            self.copies.append((w, run))
        if axes is None:
            self.split(fragment).vectors.append(VectorPart(g.reshape(-1), run, state, math.prod(fragment.shape), options))
            return
        source = Source(g.reshape(-1), run, state, fragment.start, (matrices.matrix_count(shape), *shape[-2:]))
        held = matrices.regions(fragment.shape, layout, fragment.start, fragment.stop)
        if fragment.whole:
            stacks = source.whole(held)
        else:
            stacks = [source.stack(r.matrices, [r]) for r in held if is_full(r, *shape[-2:])]
            me = dist.get_rank(fragment.group)
            for n, matrix in split.items():
                stack = source.stack(slice(n, n + 1), matrix.held[me])
                self.split(fragment).parts.append(Part(matrix, stack, options, orthogonalize))
        self.whole += [Whole(stack, options, orthogonalize, owner) for stack in stacks]

    def split(self, fragment: Fragment) -> Split:
        """The work that the ranks of the fragment's group do together."""
        return self.splits.setdefault(fragment.group, Split(fragment.group))

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
            w.copy_(run.view(w.shape))
        return count


@dataclass
class Source:
    """The run of a parameter that is here, with its gradient and accumulators, and views of it as parts of its stack."""

    g: Tensor  # (E,)
    w: Tensor  # (E,)
    state: dict[str, Tensor] | None
    start: int  # of the run in the flattened parameter
    shape: tuple[int, int, int]  # (N, R, C)

    def stack(self, which: slice, regions: list[Region]) -> Stack:
        """The matrices `which` of the stack, of which `regions` are here."""
        n, (_, rows, cols) = which.stop - which.start, self.shape
        if self.state is None:  # kept by another rank: of the right shape, without memory, and never read
            nothing = torch.zeros((), device=self.w.device)
            m, v = nothing.expand(3, len(self.w)), nothing.expand(len(self.w))
            row, col = nothing.expand(n, 3, min(rows, cols)), nothing.expand(n, 3, max(rows, cols))
            count = None
        else:
            m, v = self.state["momentum"].view(3, -1), self.state["second_moment"].view(-1)
            row, col = (self.state[name].view(3, self.shape[0], -1).transpose(0, 1)[which] for name in ("row", "col"))
            count = self.state["count"].expand(n) if "count" in self.state else None
        pieces = [
            Piece(
                *(region.view(run, self.start) for run in (self.g, self.w)),
                region.view(m, self.start).transpose(0, 1),
                region.view(v, self.start),
                region.rows,
                region.cols,
            )
            for region in regions
        ]
        return Stack((n, rows, cols), pieces, row, col, count)

    def whole(self, held: list[Region]) -> list[Stack]:
        """Stacks of all matrices: one where every region holds a part of all of them, else one for each matrix."""
        everything = slice(0, self.shape[0])
        if all(region.matrices == everything for region in held):
            return [self.stack(everything, held)]
        single = [r.of_matrix(n) for r in held for n in range(r.matrices.start, r.matrices.stop)]
        return [self.stack(slice(n, n + 1), [r for r in single if r.matrices.start == n]) for n in range(self.shape[0])]


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
