"""The input of a step: matrices of equal shape as views of gradient, weight and accumulators, without copies.

`celo2.layout` finds once for each parameter which regions of which matrices are on this rank. Every step makes a `Stack` of them.

Legend: N matrices of R rows and C columns, K = 3 decays; n, r and c are those of a region or piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from celo2.whitening import WHITENERS

Direction = Tensor | list[Tensor]  # whole matrices: (N, R, C); a split matrix: one tensor (1, r, c) for each piece on this rank


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, without importing its module."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """The part of `tensor` on this rank, sharing its memory: the local shard of a DTensor, any other tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_gradient(p: Any) -> Tensor:
    """This rank's part of the gradient of `p`. A DTensor is first redistributed to the placements of `p`: a collective."""
    if is_dtensor(p.grad) and p.grad.placements != p.placements:
        return p.grad.redistribute(p.device_mesh, p.placements).to_local()
    return local(p.grad)


class Gate(NamedTuple):
    """Whether a step is taken or skipped. Only the device knows: the host enqueues the step and never waits for the answer."""

    taken: Tensor  # float32 (): 1, or 0 if the step is skipped
    bits: Tensor  # int32 (): -1, or 0 if the step is skipped; a mask for gradients, as NaN & 0 is 0, while NaN x 0 is NaN


def gate_of(found_inf: Tensor, device: torch.device) -> Gate:
    """The gate of a step that is skipped if `found_inf` (), float32, is 1."""
    taken = 1 - found_inf.to(device, non_blocking=True)
    return Gate(taken, -taken.int())


class Region(NamedTuple):
    """A block of a stack (N, R, C), and where its elements lie in a local shard of the flattened parameter."""

    matrices: slice
    rows: slice
    cols: slice
    size: tuple[int, int, int]  # (n, r, c)
    strides: tuple[int, int, int]  # between its matrices, rows and columns
    offset: int  # of its first element in the local shard

    def of(self, shard: Tensor) -> Tensor:
        """A view (n, r, c) of this region in a local shard, which is contiguous and may have any shape.

        Ignores the strides of `shard`: an axis of size 1 may have any stride in a contiguous tensor.
        """
        return shard.as_strided(self.size, self.strides, shard.storage_offset() + self.offset)

    def of_each(self, shards: Tensor) -> Tensor:
        """A view (n, K, r, c) of this region in K local shards of E elements (K, E), each contiguous."""
        (n, *size), (by_n, *strides) = self.size, self.strides
        offset = shards.storage_offset() + self.offset
        return shards.as_strided((n, len(shards), *size), (by_n, shards.stride(0), *strides), offset)

    def is_full(self, rows: int, cols: int) -> bool:
        """Whether this region holds whole matrices of `rows` x `cols`."""
        return self.size[1:] == (rows, cols)

    def of_matrix(self, n: int) -> Region:
        """The part of this region in matrix `n` of the stack."""
        offset = self.offset + (n - self.matrices.start) * self.strides[0]
        return self._replace(matrices=slice(n, n + 1), size=(1, *self.size[1:]), offset=offset)


class Piece(NamedTuple):
    """A part of N equal matrices: some of their rows and columns, the same ones for every matrix."""

    g: Tensor  # gradient (N, r, c), any float dtype, before clipping
    w: Tensor  # weight (N, r, c), any float dtype
    m: Tensor  # momenta (N, K, r, c), float32 or bfloat16
    v: Tensor  # second moment (N, r, c), like m
    rows: slice  # which of the R rows
    cols: slice  # which of the C columns


@dataclass(frozen=True)
class Stack:
    """N equal matrices with their accumulators: whole, or the pieces of them on this rank.

    `row` holds the means over the longer axis of a matrix, `col` the means over the shorter axis. So `row` has one entry for
    each row, or for each column where R > C.
    """

    shape: tuple[int, int, int]  # (N, R, C)
    pieces: Sequence[Piece]
    row: Tensor  # (N, K, R), or (N, K, C) where R > C, float32
    col: Tensor  # (N, K, C), or (N, K, R) where R > C, float32
    count: Tensor | None = None  # int32 (N,), the number of this step for each matrix; None if m and v are float32
    gradient_scale: Tensor | None = None  # (N,), 1 / RMS of the gradient, for a rule with `normalize_gradient`
    gate: Gate | None = None  # if it skips the step, gradients count as zero, and no accumulator moves
    step_size: Tensor | None = None  # (N,), float32, filled during steps 0 to 7, for a rule with step sizes


def stack_of(
    g: Tensor, w: Tensor, state: Mapping[str, Tensor] | None, shape: tuple[int, int, int], which: slice, regions: Sequence[Region]
) -> Stack:
    """The matrices `which` of a stack of `shape` (N, R, C); `regions` are their parts in the contiguous local shards g and w."""
    n, (total, rows, cols) = which.stop - which.start, shape
    if state is None:  # another rank keeps the state: only the weights of this stack are used
        pieces = [Piece(r.of(g), r.of(w), r.of(g), r.of(g), r.rows, r.cols) for r in regions]
        return Stack((n, rows, cols), pieces, pieces[0].g, pieces[0].g)
    m, v = state["momentum"].view(3, -1), state["second_moment"].view(-1)
    pieces = [Piece(r.of(g), r.of(w), r.of_each(m), r.of(v), r.rows, r.cols) for r in regions]
    row, col = (state[name].view(3, total, -1).transpose(0, 1)[which] for name in ("row", "col"))
    return Stack((n, rows, cols), pieces, row, col, state["count"].expand(n) if "count" in state else None)


def stack_of_whole(g: Tensor, w: Tensor, m: Tensor, v: Tensor, row: Tensor, col: Tensor, count: Tensor | None = None) -> Stack:
    """A `Stack` of whole matrices: g, w, v (N, R, C), m (N, K, R, C); row, col and count as in `Stack`."""
    n, rows, cols = g.shape
    return Stack((n, rows, cols), [Piece(g, w, m, v, slice(0, rows), slice(0, cols))], row, col, count)


def part_of(stack: Stack, part: slice) -> Stack:
    """The matrices `part` of a stack."""
    _, rows, cols = stack.shape
    pieces = [Piece(p.g[part], p.w[part], p.m[part], p.v[part], p.rows, p.cols) for p in stack.pieces]
    count = None if stack.count is None else stack.count[part]
    step_size = None if stack.step_size is None else stack.step_size[part]
    return Stack((part.stop - part.start, rows, cols), pieces, stack.row[part], stack.col[part], count, step_size=step_size)


def gathered(stacks: Sequence[Stack], elements: bool) -> Stack:
    """One stack of copies of `stacks`, each of one piece. Without `elements` only row and col are copied, no pieces."""
    counts = [stack.count for stack in stacks if stack.count is not None]
    row, col = torch.cat([stack.row for stack in stacks]), torch.cat([stack.col for stack in stacks])
    together = Stack((len(row), *stacks[0].shape[1:]), [], row, col, torch.cat(counts) if counts else None, gate=stacks[0].gate)
    if not elements:
        return together
    g, w, m, v = (torch.cat(tensors) for tensors in zip(*(stack.pieces[0][:4] for stack in stacks), strict=True))
    return replace(together, pieces=stack_of_whole(g, w, m, v, row, col).pieces)


def scatter_(together: Stack, stacks: Sequence[Stack]) -> None:
    """Copy the accumulators of `together`, made by `gathered`, back into `stacks`."""
    moved = [(together.row, [s.row for s in stacks]), (together.col, [s.col for s in stacks])]
    for piece in together.pieces:
        moved += [(piece.m, [s.pieces[0].m for s in stacks]), (piece.v, [s.pieces[0].v for s in stacks])]
    for new, own in moved:
        torch._foreach_copy_(own, list(new.split([s.shape[0] for s in stacks])))


def whiteners_of(state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The whiteners (N, ·, ·) in the state of a parameter of N matrices; empty for a rule without whitening."""
    return {key: state[key].view(-1, *state[key].shape[-2:]) for key in WHITENERS if key in state} if state else {}


def some_of(whiteners: Mapping[str, Tensor], which: slice) -> dict[str, Tensor]:
    """The whiteners of the matrices `which`."""
    return {key: value[which] for key, value in whiteners.items()}
