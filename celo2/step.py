"""The driver of an optimizer step: the steps of the rule in order, over batches of matrices of equal shape.

One device, replicas (DDP) and matrices that are split over ranks use the same code. They differ in two functions that the caller
passes: a reduction, which completes sums (a no-op or an all-reduce), and the function that orthogonalizes (on this rank, or on
the owner of each matrix). The mathematics is in `celo2.blocked` (matrices) and `celo2.rule` (vectors), the communication in
`celo2.distributed.collectives`.

Legend: N matrices of R rows and C columns. A batch: matrices of one shape that are orthogonalized together.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from celo2 import step_sizes, whitening
from celo2.blocked import Passes, block_elements, factors_of, first_layer, move_means_, squares_of
from celo2.distributed.collectives import add_up_, share_means_
from celo2.distributed.plan import Entry
from celo2.distributed.shard import SplitMatrix
from celo2.layout import form_of
from celo2.rule import RMS_EPS, SQUARE_FLOOR, Rule
from celo2.stack import (
    Direction,
    Gate,
    Stack,
    gathered,
    is_dtensor,
    local,
    local_gradient,
    part_of,
    scatter_,
    some_of,
    stack_of,
    whiteners_of,
)
from celo2.vectors import Vector, vector_of, vector_steps

# Newton–Schulz runs on matrices of one shape together: at most this many elements, or one matrix. CPU: 64 MB in float32. Other
# devices: 256 MB in bfloat16, or eight matrices of 2048 x 8192. Their 576 tiles of X Xᵀ (`celo2.kernels.symmetric`) use 87 % of
# 132 multiprocessors; the 72 tiles of one matrix use only 55 % (computed, not measured).
BATCH_ELEMENTS = {"cpu": 1 << 24}
DEFAULT_BATCH_ELEMENTS = 1 << 27


def batch_elements(device: torch.device) -> int:
    """The most elements for one call of Newton–Schulz on `device`, unless a single matrix is larger."""
    return BATCH_ELEMENTS.get(device.type, DEFAULT_BATCH_ELEMENTS)


Reduce = Callable[[list[Tensor]], None]  # replaces each tensor by its sum over the ranks that hold parts of the same matrices


def no_reduction(sums: list[Tensor]) -> None:
    """The reduction for whole matrices: their sums are complete already."""


@dataclass
class Context:
    """What an update needs besides the matrices: rule, passes and options."""

    rule: Rule  # on the device of the matrices
    passes: Passes
    ns_dtype: torch.dtype
    gate: Gate | None = None  # for a step that may turn out to be skipped
    has_step_sizes: bool = False  # `Rule.has_step_sizes`
    orthogonalized: int = 0  # how many matrices this rank has orthogonalized in this step


class Item(NamedTuple):
    """Matrices or a vector to update, and the options of the update."""

    part: Stack | Vector
    options: Mapping[str, Any]  # the param group; only `lr` and `weight_decay` are used
    orthogonalize: bool
    owner: int = 0  # the rank among the replicas that orthogonalizes this item
    whiteners: Mapping[str, Tensor] = {}  # (N, ·, ·), for a rule with whitening
    split: SplitMatrix | None = None  # for a matrix that no rank holds whole


Batch = list[Item]
# The functions that do steps 0 to 8: for whole matrices batch by batch, for split matrices all at once.
WholeDirections = Callable[[list[Item], Context], Iterator[tuple[Batch, Direction]]]
SplitDirections = Callable[[list[Item], Context, dist.ProcessGroup, Reduce], Sequence[Direction]]


@dataclass
class Work:
    """Everything that the rule updates on one device in one step."""

    whole: list[Item] = field(default_factory=list)
    split: dict[dist.ProcessGroup, list[Item]] = field(default_factory=lambda: defaultdict(list))
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (non-contiguous weight, its contiguous copy to update)
    means: dict[dist.ProcessGroup, list[tuple[Tensor, Sequence[slice]]]] = field(default_factory=lambda: defaultdict(list))

    def add(
        self, entry: Entry, state: Mapping[str, Tensor] | None, options: Mapping[str, Any], orthogonalize: bool, owner: int
    ) -> None:
        """Add this rank's part of a parameter; `state` is None if another rank keeps it."""
        shard = entry.local_shard
        form = form_of(shard.shape, options["matrices"], shard.start, shard.stop, shard.group is None)
        weight, g = local(entry.p).detach(), local_gradient(entry.p).contiguous()
        if is_dtensor(entry.p) and state is not None:
            state = {name: local(value) for name, value in state.items()}
        w = weight.contiguous()
        if w is not weight:
            self.copies.append((weight, w))
        here = self.whole if shard.group is None else self.split[shard.group]
        whiteners = whiteners_of(state)
        if form.by_reference:
            item = Item(vector_of(g, w, state, form), options, orthogonalize and form.axes is not None, owner, whiteners)
            here.append(item)
        for which, regions in form.whole:
            stack = stack_of(g, w, state, form.stack, which, regions)
            self.whole.append(Item(stack, options, orthogonalize, owner, some_of(whiteners, which)))
        for n, matrix in entry.split.items():
            which = slice(n, n + 1)
            stack = stack_of(g, w, state, form.stack, which, form.split.get(n, ()))
            here.append(Item(stack, options, orthogonalize, whiteners=some_of(whiteners, which), split=matrix))
        if entry.others is not None and state is not None and shard.group is not None:
            self.means[shard.group] += [(state[name].view(3, form.stack[0], -1), entry.others) for name in ("row", "col")]
            self.means[shard.group] += [(value[None], entry.others) for value in whiteners.values()]

    def update_(self, context: Context, whole_directions: WholeDirections, split_directions: SplitDirections) -> None:
        """Do steps 0 to 10 on all items."""
        if context.has_step_sizes:
            device = context.rule.weights["b0"].device
            self.whole = step_sizes.with_room(self.whole, device)
            self.split = {group: step_sizes.with_room(items, device) for group, items in self.split.items()}
        for batch, direction in whole_directions(self.whole, context):
            finish_([batch], [direction], context, no_reduction)
            del direction  # free its memory before the next direction is computed
        for group, items in self.split.items():
            reduce = functools.partial(add_up_, group=group)
            finish_([[item] for item in items], split_directions(items, context, group, reduce), context, reduce)
            share_means_(self.means[group], group)
        for weight, w in self.copies:
            weight.copy_(w)


# Steps 0 to 7 as a generator: it yields sums over this rank's part of a matrix, and receives the sums over all ranks.
Steps = Generator[Tensor, Tensor, None]


def carry_out(parts: Sequence[Steps], reduce: Reduce) -> None:
    """Advance all generators together. They yield equally often, and one reduction completes the sums of all of them."""
    sums = [next(part) for part in parts]
    while sums:
        reduce(sums)
        complete, sums = sums, []
        for part, of_part in zip(parts, complete, strict=True):
            with suppress(StopIteration):
                sums.append(part.send(of_part))


def matrix_steps(stacks: Sequence[Stack], out: Direction | None, context: Context) -> Steps:
    """Write the directions of equal matrices, cut into the same pieces, into `out`. If it is None, only update accumulators."""
    rule, passes = context.rule, context.passes
    if context.gate is not None:
        stacks = [replace(stack, gate=context.gate) for stack in stacks]
    together = gathered(stacks, passes.gathers) if len(stacks) > 1 else stacks[0]  # copies; only the means if not `gathers`
    inputs = [together] if passes.gathers else stacks
    if rule.normalize_gradient:  # step 0; the passes multiply by this scale when they read the gradient
        squares = yield torch.cat([squares_of([p.g for p in s.pieces], s.shape[0], s.row.device) for s in inputs])
        scales = inverse_rms(squares, together, SQUARE_FLOOR).split([stack.shape[0] for stack in inputs])
        inputs = [replace(stack, gradient_scale=scale) for stack, scale in zip(inputs, scales, strict=True)]
    sums = yield passes.accumulate_(rule, inputs)  # steps 1 to 3
    move_means_(rule, together, sums)  # step 4
    if len(stacks) > 1:
        scatter_(together, stacks)
    if out is None:
        return
    if context.has_step_sizes:
        step_sizes.write_(rule, stacks, together, sums)
    factors = factors_of(together)
    factored_sums = yield passes.factor(inputs, factors)  # for step 6
    layer = first_layer(rule, together, sums, factored_sums)
    passes.emit_(rule, inputs, factors, layer, pieces_of(inputs, out))  # steps 5 to 7


def steps_of(batch: Batch, out: Direction | None, context: Context) -> Steps:
    """The generator that does steps 0 to 7 of a batch."""
    if isinstance(batch[0].part, Vector):
        return vector_steps(batch[0].part, out, context.rule, context.gate)
    return matrix_steps([item.part for item in batch if isinstance(item.part, Stack)], out, context)


# Step 8 where this rank holds every matrix whole and does all the work; otherwise see `celo2.distributed.owners`.


def orthogonalized_here(items: list[Item], context: Context) -> Iterator[tuple[Batch, Direction]]:
    """One device: the directions of whole matrices after step 8, one batch at a time."""
    for batch in batched(items):
        yield batch, direction_of(batch, context)


def direction_of(batch: Batch, context: Context) -> Tensor:
    """Do steps 0 to 8 on a batch of whole matrices; returns their directions (N, R, C)."""
    direction, done = room_for(batch, context), 0
    for chunk in chunks(batch, context.passes):
        n = count_of(chunk)
        carry_out([steps_of(chunk, direction[done : done + n], context)], no_reduction)
        done += n
    if not batch[0].orthogonalize:
        return direction
    context.orthogonalized += done
    return orthogonalized(direction, batch, context)


def orthogonalized(u: Tensor, batch: Batch, context: Context) -> Tensor:
    """Step 8 on the directions u (N, R, C) of a batch: whitening, if the rule has it, then Newton–Schulz."""
    if context.rule.whitening:
        taken = None if context.gate is None else context.gate.taken
        whitened = whitening.whiten_together_(u, [item.whiteners for item in batch], context.rule.whitening, taken)
        u = whitened.to(u.dtype)
    return context.passes.newton_schulz(u)


def room_for(batch: Batch, context: Context) -> Tensor:
    """An empty tensor for the directions (N, R, C) of a batch."""
    part, dtype = batch[0].part, context.ns_dtype if batch[0].orthogonalize else torch.float32
    return torch.empty(count_of(batch), *part.shape[1:], dtype=dtype, device=part.pieces[0].w.device)


# Steps 9 and 10.


def finish_(batches: list[Batch], directions: Sequence[Direction], context: Context, reduce: Reduce) -> None:
    """Scale every direction to RMS 1, or to its step size, and update the weights."""
    norms = []
    for batch, direction in zip(batches, directions, strict=True):
        tensors = direction if isinstance(direction, list) else [direction]
        norms.append(squares_of(tensors, count_of(batch), context.rule.weights["b0"].device))
    reduce(norms)
    for batch, direction, norm in zip(batches, directions, norms, strict=True):
        parts = [item.part for item in batch]
        scale_of_all = inverse_rms(norm, parts[0], RMS_EPS)
        if context.has_step_sizes:
            scale_of_all *= step_sizes.of(parts)
        scales = scale_of_all[:, None, None].split([part.shape[0] for part in parts])
        for item, scale, tensors in zip(batch, scales, pieces_of(parts, direction), strict=True):
            for piece, u in zip(item.part.pieces, tensors, strict=True):
                context.passes.apply_(piece.w, u, scale, item.options)


def inverse_rms(squares: Tensor, part: Stack | Vector, eps: float) -> Tensor:
    """1 / RMS (N,) of matrices of the shape of `part`, from their sums of squares (N,)."""
    _, rows, cols = part.shape
    return (squares / (rows * cols) + eps).rsqrt()


# How items become batches, and how batches become chunks that go through the passes together.


def batched(items: list[Item]) -> Iterator[Batch]:
    """All items in batches of one shape and one owner, each of at most `batch_elements` or of one matrix."""
    buckets: dict[tuple, list[Item]] = defaultdict(list)
    for place, item in enumerate(items):
        alone = place if isinstance(item.part, Vector) else None
        buckets[(item.owner, *item.part.shape[1:], item.orthogonalize, alone)].append(item)
    for bucket in buckets.values():
        part = bucket[0].part
        yield from [bucket] if isinstance(part, Vector) else sliced(bucket, batch_elements(part.row.device))


def chunks(batch: Batch, passes: Passes) -> Iterator[Batch]:
    """The parts of a batch that go through the passes together: as many small matrices as fill a block if `passes.gathers`."""
    part = batch[0].part
    if len(batch) > 1 and any(len(item.part.pieces) > 1 for item in batch):
        yield from ([item] for item in batch)
    elif passes.gathers and isinstance(part, Stack):
        yield from sliced(batch, block_elements(part.row.device))
    else:
        yield batch


def sliced(items: list[Item], elements: int) -> Iterator[Batch]:
    """The matrices of all items in order, in batches of at most `elements` elements or of one matrix."""
    _, rows, cols = items[0].part.shape
    limit = room = max(1, elements // (rows * cols))
    batch: Batch = []
    for item in items:
        start, n = 0, item.part.shape[0]
        while start < n:
            stop = min(start + room, n)
            if stop - start < n:
                assert isinstance(item.part, Stack)
                which = slice(start, stop)
                some = item._replace(part=part_of(item.part, which), whiteners=some_of(item.whiteners, which))
                batch.append(some)
            else:
                batch.append(item)
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def count_of(batch: Batch) -> int:
    """The number N of matrices in a batch."""
    return sum(item.part.shape[0] for item in batch)


def pieces_of(parts: Sequence[Stack | Vector], direction: Direction) -> list[list[Tensor]]:
    """For every part, the list of its pieces' tensors in `direction`."""
    if isinstance(direction, list):
        return [direction]
    of_parts = direction.split([part.shape[0] for part in parts])
    return [[u[:, p.rows, p.cols] for p in part.pieces] for part, u in zip(parts, of_parts, strict=True)]
