"""The driver of a step: the ten steps of the rule in order, over batches of equal matrices.

There is one way through a step. What differs between one device, replicas (DDP) and matrices that are split over ranks is handed
in: a reduction, which completes sums (nothing, or an all-reduce), and who orthogonalizes (this rank, or the owner of each
matrix). The mathematics is in `celo2.blocked` (matrices) and `celo2.rule` (vectors), the communication in
`celo2.distributed.collectives`.

Legend: N matrices of R rows and C columns. A batch is what is orthogonalized together: matrices of one shape.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from celo2 import blocked
from celo2.blocked import PLAIN, Passes
from celo2.distributed.collectives import add_up_
from celo2.distributed.plan import Entry
from celo2.distributed.shard import SplitMatrix
from celo2.layout import Direction, Stack, form_of, gathered, local, part_of, scatter_, stack_of
from celo2.rule import RMS_EPS, SQUARE_FLOOR, Rule
from celo2.vectors import Vector, VectorPasses, vector_of

# Newton–Schulz takes matrices of one shape together, up to this many elements or one matrix. CPU: 64 MB in float32. Elsewhere
# 256 MB in bfloat16: eight matrices of 2048 x 8192, whose 576 tiles of X Xᵀ (`celo2.kernels.symmetric`) keep 132
# multiprocessors busy to 87 %; the 72 tiles of one matrix, only to 55 % (computed, not measured).
BATCH_ELEMENTS = {"cpu": 1 << 24}
DEFAULT_BATCH_ELEMENTS = 1 << 27

Reduce = Callable[[list[Tensor]], None]  # replaces each tensor by its sum over the ranks that hold parts of the same matrices


def batch_elements(device: torch.device) -> int:
    """Elements that Newton–Schulz takes at once on `device`."""
    return BATCH_ELEMENTS.get(device.type, DEFAULT_BATCH_ELEMENTS)


def nothing(sums: list[Tensor]) -> None:
    """The reduction where every matrix is whole: its sums are complete."""


@functools.cache
def passes_for(device: torch.device) -> Passes:
    """The Triton kernels on NVIDIA GPUs of compute capability 8.0 (the first with bfloat16 products) or more, else PLAIN."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return PLAIN
    if torch.cuda.get_device_capability(device) < (8, 0):
        return PLAIN
    from celo2.kernels.passes import TRITON

    return TRITON


@dataclass
class Context:
    """What every update needs besides the matrices."""

    rule: Rule  # on the device of the matrices
    passes: Passes
    ns_dtype: torch.dtype
    orthogonalized: int = 0  # matrices that this rank has orthogonalized


class Item(NamedTuple):
    """Something to update, and how."""

    part: Stack | Vector
    options: Mapping[str, Any]  # the param group, whose `lr` and `weight_decay` count
    orthogonalize: bool
    owner: int = 0  # the rank among replicas that orthogonalizes it
    split: SplitMatrix | None = None  # of a matrix that no rank holds whole


Batch = list[Item]
# Who carries out steps 0 to 8: of whole matrices, batch by batch; of split matrices, all together.
Whole = Callable[[list[Item], Context], Iterator[tuple[Batch, Direction]]]
OverRanks = Callable[[list[Item], Context, dist.ProcessGroup, Reduce], list[Direction]]


@dataclass
class Work:
    """Everything that the rule updates on one device in one step."""

    whole: list[Item] = field(default_factory=list)
    split: dict[dist.ProcessGroup, list[Item]] = field(default_factory=lambda: defaultdict(list))
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (weight that is not contiguous, its copy to update)

    def add(
        self,
        entry: Entry,
        state: Mapping[str, Tensor] | None,
        options: Mapping[str, Any],
        orthogonalize: bool,
        owner: int,
    ) -> None:
        """Add what is here of a parameter; `state` is None where another rank keeps it."""
        shard = entry.local_shard
        form = form_of(shard.shape, options["matrices"], shard.start, shard.stop, shard.group is None)
        assert entry.p.grad is not None
        weight, g = local(entry.p).detach(), local(entry.p.grad).contiguous()
        w = weight.contiguous()
        if w is not weight:
            self.copies.append((weight, w))
        if form.by_reference:
            item = Item(vector_of(g, w, state, form), options, orthogonalize and form.axes is not None, owner)
            (self.whole if shard.group is None else self.split[shard.group]).append(item)
            return
        for which, regions in form.whole:
            self.whole.append(Item(stack_of(g, w, state, form.stack, which, regions), options, orthogonalize, owner))
        for n, matrix in entry.split.items():
            assert shard.group is not None
            stack = stack_of(g, w, state, form.stack, slice(n, n + 1), form.split.get(n, ()))
            self.split[shard.group].append(Item(stack, options, orthogonalize, split=matrix))

    def update_(self, context: Context, whole: Whole, over_ranks: OverRanks) -> None:
        """Steps 0 to 10 on everything; `whole` and `over_ranks` say who orthogonalizes whole and split matrices."""
        for batch, direction in whole(self.whole, context):
            finish_([batch], [direction], context, nothing)
            del direction  # before the next one is made
        for group, items in self.split.items():
            reduce = functools.partial(add_up_, group=group)
            finish_([[item] for item in items], over_ranks(items, context, group, reduce), context, reduce)
        for weight, w in self.copies:
            weight.copy_(w)


# Only this section orders steps 0 to 7.


def accumulate_(parts: Sequence[MatrixPasses | VectorPasses], rule: Rule, reduce: Reduce) -> None:
    """Steps 0 to 4: normalize and clip the gradients, move every accumulator."""
    if rule.normalize_gradient:
        squares = [part.gradient_squares() for part in parts]
        reduce(squares)
        for part, complete in zip(parts, squares, strict=True):
            part.normalize_gradients(complete)
    sums = [part.accumulate_(rule) for part in parts]
    reduce(sums)
    for part, complete in zip(parts, sums, strict=True):
        part.move_means_(rule, complete)


def directions_(parts: Sequence[MatrixPasses | VectorPasses], outs: Sequence[Direction], rule: Rule, reduce: Reduce) -> None:
    """Steps 0 to 7: write the direction that the MLP gives for each part into its place in `outs`."""
    accumulate_(parts, rule, reduce)
    sums = [part.square_sums(rule) for part in parts]
    reduce(sums)
    for part, complete, out in zip(parts, sums, outs, strict=True):
        part.emit_(rule, complete, out)


class MatrixPasses:
    """Equal matrices, cut into the same pieces, on their way through steps 0 to 7: the sums and factors between the passes.

    Where the passes ask for it (`Passes.gathers`), small matrices of several parameters are copied together and back.
    """

    def __init__(self, stacks: Sequence[Stack], passes: Passes) -> None:
        self.passes, self.sources = passes, stacks
        self.together = gathered(stacks, passes.gathers) if len(stacks) > 1 else stacks[0]
        self.stacks = [self.together] if passes.gathers else stacks

    def gradient_squares(self) -> Tensor:
        """For step 0: the sums of g² (N,)."""
        return torch.cat([blocked.gradient_squares(stack) for stack in self.stacks])

    def normalize_gradients(self, squares: Tensor) -> None:
        """Step 0, from the complete sums; the passes multiply as they read."""
        _, rows, cols = self.together.shape
        scale = (squares / (rows * cols) + SQUARE_FLOOR).rsqrt()
        sizes = [stack.shape[0] for stack in self.stacks]
        self.stacks = [replace(s, scale=part) for s, part in zip(self.stacks, scale.split(sizes), strict=True)]

    def accumulate_(self, rule: Rule) -> Tensor:
        """Steps 1 to 3; -> the sums of `Passes.accumulate_`."""
        return self.passes.accumulate_(rule, self.stacks)

    def move_means_(self, rule: Rule, sums: Tensor) -> None:
        """Step 4, from the complete sums."""
        self.sums = sums
        blocked.move_means_(rule, self.together, sums)
        if len(self.sources) > 1:
            scatter_(self.together, self.sources)

    def square_sums(self, rule: Rule) -> Tensor:
        """For step 6: the sums of the squared factored channels (N, 6)."""
        self.factors = blocked.factors_of(self.together)
        return self.passes.factor(self.stacks, self.factors)

    def emit_(self, rule: Rule, square_sums: Tensor, out: Direction) -> None:
        """Steps 5 to 7, from the complete sums."""
        layer = blocked.first_layer(rule, self.together, self.sums, square_sums)
        self.passes.emit_(rule, self.stacks, self.factors, layer, pieces_of(self.stacks, out))


# Step 8, where every matrix is whole and nobody shares the work; otherwise see `celo2.distributed.owners`.


def orthogonalized_here(items: list[Item], context: Context) -> Iterator[tuple[Batch, Direction]]:
    """One device: the orthogonalized directions of whole matrices, one batch at a time."""
    for batch in batched(items):
        yield batch, direction_of(batch, context)


def direction_of(batch: Batch, context: Context) -> Tensor:
    """Steps 0 to 8 on a batch of whole matrices: their directions (N, R, C)."""
    direction, done = room_for(batch, context), 0
    for chunk in chunks(batch, context.passes):
        n = sum(item.part.shape[0] for item in chunk)
        directions_([passes_over(chunk, context)], [direction[done : done + n]], context.rule, nothing)
        done += n
    if not batch[0].orthogonalize:
        return direction
    context.orthogonalized += done
    return context.passes.newton_schulz(direction)


def room_for(batch: Batch, context: Context) -> Tensor:
    """Room for the directions (N, R, C) of a batch."""
    n = sum(item.part.shape[0] for item in batch)
    dtype = context.ns_dtype if batch[0].orthogonalize else torch.float32
    return torch.empty(n, *batch[0].part.shape[1:], dtype=dtype, device=batch[0].part.pieces[0].w.device)


# Steps 9 and 10.


def finish_(batches: list[Batch], directions: Sequence[Direction], context: Context, reduce: Reduce) -> None:
    """Give every direction RMS 1 and move the weights."""
    norms = []
    for batch, direction in zip(batches, directions, strict=True):
        tensors = direction if isinstance(direction, list) else [direction]
        squares = torch.zeros(sum(item.part.shape[0] for item in batch), device=context.rule.weights["b0"].device)
        for u in tensors:
            squares += torch.linalg.vector_norm(u, dim=(1, 2), dtype=torch.float32).square()
        norms.append(squares)
    reduce(norms)
    for batch, direction, norm in zip(batches, directions, norms, strict=True):
        stacks = [item.part for item in batch]
        _, rows, cols = stacks[0].shape
        scale = (norm / (rows * cols) + RMS_EPS).rsqrt()[:, None, None]
        scales = scale.split([stack.shape[0] for stack in stacks])
        for item, own, tensors in zip(batch, scales, pieces_of(stacks, direction), strict=True):
            for piece, u in zip(item.part.pieces, tensors, strict=True):
                context.passes.apply_(piece.w, u, own, item.options)


# How items become batches, and chunks of batches that the passes take at once.


def batched(items: list[Item]) -> Iterator[Batch]:
    """All whole matrices, those of one shape and owner together, at most `batch_elements` or one matrix at a time."""
    buckets: dict[tuple, list[Item]] = defaultdict(list)
    for place, item in enumerate(items):
        alone = place if isinstance(item.part, Vector) else None
        buckets[(item.owner, *item.part.shape[1:], item.orthogonalize, alone)].append(item)
    for bucket in buckets.values():
        part = bucket[0].part
        limit = batch_elements(part.pieces[0].w.device) // (part.shape[1] * part.shape[2])
        yield from [bucket] if isinstance(part, Vector) else sliced(bucket, max(1, limit))


def chunks(batch: Batch, passes: Passes) -> Iterator[Batch]:
    """What of a batch goes through the passes together: small matrices until they fill a block, others as they are."""
    part = batch[0].part
    if len(batch) > 1 and any(len(item.part.pieces) > 1 for item in batch):
        yield from ([item] for item in batch)
    elif passes.gathers and isinstance(part, Stack):
        yield from sliced(batch, max(1, blocked.block_elements(part.row.device) // (part.shape[1] * part.shape[2])))
    else:
        yield batch


def sliced(items: list[Item], limit: int) -> Iterator[Batch]:
    """The matrices of all items in order, at most `limit` of them at a time."""
    batch: Batch = []
    room = limit
    for item in items:
        start, n = 0, item.part.shape[0]
        while start < n:
            stop = min(start + room, n)
            if stop - start < n:
                assert isinstance(item.part, Stack)
                batch.append(item._replace(part=part_of(item.part, slice(start, stop))))
            else:
                batch.append(item)
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def passes_over(batch: Batch, context: Context) -> MatrixPasses | VectorPasses:
    """A batch on its way through the passes."""
    if isinstance(batch[0].part, Vector):
        return VectorPasses(batch[0].part)
    return MatrixPasses([item.part for item in batch if isinstance(item.part, Stack)], context.passes)


def pieces_of(stacks: Sequence[Stack | Vector], direction: Direction) -> list[list[Tensor]]:
    """The tensor of `direction` for every piece of every stack."""
    if isinstance(direction, list):
        return [direction]
    of_stacks = direction.split([stack.shape[0] for stack in stacks])
    return [[u[:, p.rows, p.cols] for p in stack.pieces] for stack, u in zip(stacks, of_stacks, strict=True)]
